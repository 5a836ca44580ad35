"""State between steps: controllers of the KL coefficient, and running moments of the reward."""

import math

import torch
from torch import Tensor

from .core import checks, option_checks


class _Controller:
    value: float

    def state_dict(self) -> dict[str, float]:
        """The coefficient as a plain number, without what is configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the result of `state_dict`."""
        self.value = float(state["value"])


class FixedKLController(_Controller):
    """A constant KL coefficient.

    Args:
        kl_coef: the coefficient, a finite number >= 0.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = float(option_checks.non_negative("FixedKLController", "kl_coef", kl_coef))

    def update(self, current_kl: float | Tensor, n_steps: int) -> float:
        """Returns the coefficient, unchanged."""
        return self.value


class AdaptiveKLController(_Controller):
    """A KL coefficient that adapts to a target KL (Ziegler et al., 1909.08593, section 2.2).

    Each update: value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon.

    Args:
        init_kl_coef: initial coefficient, a finite number >= 0.
        target: target KL, > 0, in the unit of the `current_kl` that is passed to `update`.
        horizon: time scale in the unit of `n_steps`, > 0.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        op = "AdaptiveKLController"
        self.value = float(option_checks.non_negative(op, "init_kl_coef", init_kl_coef))
        self.target = float(option_checks.positive(op, "target", target))
        self.horizon = float(option_checks.positive(op, "horizon", horizon))

    def update(self, current_kl: float | Tensor, n_steps: int) -> float:
        """Adapts the coefficient after `n_steps` steps with mean KL `current_kl`.

        Args:
            current_kl: mean KL; a number or a tensor of one element (reading it syncs the device).
            n_steps: steps since the last update, usually the number of sequences.

        Returns:
            The new coefficient.

        Raises:
            ValueError: current_kl is not finite; the coefficient would never recover.
        """
        kl = float(current_kl)
        if not math.isfinite(kl):
            raise ValueError(f"AdaptiveKLController: current_kl must be finite, got {kl}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon
        return self.value


class RunningMoments:
    """Mean and standard deviation of all elements so far (Welford; batches merged as by Chan).

    PPO-max (2307.04964) divides rewards by their running standard deviation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        # The sum of squared differences from the mean.
        self._m2 = 0.0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Adds the elements of `x` that the mask keeps.

        Args:
            x: any shape, floating, integer or bool; read on the host (a device sync).
            mask: the shape of x, bool or integer, nonzero = keep; or floating, of 0 and 1.

        Raises:
            ValueError: a kept element is not finite; the moments would never recover.
        """
        kept = checks.real("RunningMoments", "x", x).detach().double()
        if mask is not None:
            mask = checks.mask("RunningMoments", "mask", mask)
            checks.same_shape("RunningMoments", "mask", mask, "x", x.shape)
            kept = kept[mask != 0]
        count = kept.numel()
        if count == 0:
            return
        mean = kept.mean()
        mean, m2 = torch.stack([mean, (kept - mean).square().sum()]).tolist()
        if not math.isfinite(mean):
            raise ValueError("RunningMoments: every kept element of x must be finite")
        total, difference = self.count + count, mean - self.mean
        self._m2 += m2 + difference * difference * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1.0 for fewer than two elements, for safe division."""
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 1.0

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers."""
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the result of `state_dict`."""
        self.count = int(state["count"])
        self.mean, self._m2 = float(state["mean"]), float(state["m2"])
