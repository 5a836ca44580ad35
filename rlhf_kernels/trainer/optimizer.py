"""AdamW's learning rate at a step, and its state from a checkpoint."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .config import OptimConfig, require
from .finite import finite
from .tree import check_like


def rate_factor(config: OptimConfig, step: int) -> float:
    """The fraction of the peak learning rate after `step` steps: linear warmup times schedule.

    The schedule falls from the first step on, also during the warmup. transformers' schedules start
    after the warmup and have a rate of 0 in the first step.
    """
    done = step / config.total_steps
    fade = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.lr_schedule]
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * fade


def load_adamw(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores AdamW's state, with or without accelerate's wrapper.

    Args:
        optimizer: must have the groups and weights of the optimizer that was saved.
        state: the `state_dict` of that optimizer.

    Raises:
        UserError: groups have other keys or types; moments have other shapes or are not finite.
    """
    groups = "param_groups"
    own = optimizer.state_dict()[groups]
    for i, (found, like) in enumerate(zip(state[groups], own, strict=True)):
        check_like(found, like, f"optimizer.{groups}.{i}")
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        names = {"step", "exp_avg", "exp_avg_sq"}
        require(moments.keys() == names, "optimizer", str(sorted(names)), sorted(moments))
        for name in ("exp_avg", "exp_avg_sq"):
            shape = getattr(moments[name], "shape", moments[name])
            require(shape == weight.shape, f"optimizer.{name}", str(weight.shape), shape)
        steps = moments["step"]
        require(isinstance(steps, Tensor) and steps.dim() == 0, "optimizer.step", "one", steps)
        require(finite(moments.values()), "optimizer", "finite moments", "NaN or infinity")
