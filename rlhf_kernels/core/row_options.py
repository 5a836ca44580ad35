"""Options of rows of logits: what every operation that reads a vocabulary shares.

An option is added here, and then where it means something: in the checks, the reference and the
kernels. Everything between carries the tuple whole.
"""

from typing import Any, NamedTuple

from torch import Tensor

from . import temperature_rules


class RowOptions(NamedTuple):
    """Options as operators, the head and launchers take them.

    A schema has the fields one by one, in this order (`ops._operator`).

    temperature: of all tokens, 1 where each has its own.
    softcap: c of c tanh(x / c), 0 for none.
    entropy: whether entropies are wanted.
    ignore_index: label of tokens to skip.
    """

    temperature: float
    softcap: float
    entropy: bool
    ignore_index: int


class RowArguments(NamedTuple):
    """The same as a caller gives them, checked: numbers, but for a temperature per token."""

    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    entropy: bool
    ignore_index: int

    def of_logits(self) -> dict[str, Any]:
        """By name, for a reference that is given logits, whose scale is 1."""
        return {k: v for k, v in self._asdict().items() if k != "logit_scale"}

    def effective_temperature(self) -> float | Tensor:
        """What the logits are divided by before they are scaled."""
        if isinstance(self.temperature, Tensor):
            return temperature_rules.scaled(self.temperature, self.logit_scale)
        return self.temperature / self.logit_scale

    def split(self) -> tuple[Tensor | None, RowOptions]:
        """(temperatures per token or None, options of all tokens).

        scale * x under a cap c and a temperature T is x under c / scale and T / scale.
        """
        temperature = self.effective_temperature()
        cap = 0.0 if self.softcap is None else self.softcap / self.logit_scale
        if isinstance(temperature, Tensor):
            return temperature, RowOptions(1.0, cap, self.entropy, self.ignore_index)
        return None, RowOptions(temperature, cap, self.entropy, self.ignore_index)
