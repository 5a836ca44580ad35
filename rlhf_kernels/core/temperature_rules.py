"""Bounds of temperatures and caps of logits, and how logit_scale changes both.

Kernels take effective values: scale * x with cap c and temperature T equals x with cap c / scale
and temperature T / scale. Both effective values and the scale must lie between 2^-60 and 2^60.
Outside these bounds 1 / T^2, or a difference of two logits over T, overflows or underflows fp32,
and finite logits would give NaN.
"""

import torch
from torch import Tensor

from .option_checks import shown

# csrc/math.h: good_temperature.
LOWEST, HIGHEST = 2.0**-60, 2.0**60
_EXPECTED = "between 2^-60 and 2^60 (8.7e-19 and 1.2e18)"


def check(
    op: str,
    temperature: float | Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    prefix: str = "",
) -> None:
    """Raises ValueError for a number out of bounds. Does not read a temperature tensor.

    `prefix` goes before the names of the options in a message.
    """
    if logit_scale != 1.0:
        _within(op, prefix, "logit_scale", logit_scale)
    if softcap is not None:
        _within(op, prefix, "softcap", softcap, logit_scale)
    if not isinstance(temperature, Tensor):
        _within(op, prefix, "temperature", temperature, logit_scale)


def _within(op: str, prefix: str, name: str, value: float, logit_scale: float = 1.0) -> None:
    # Multiplied instead of value / logit_scale, which may overflow.
    if not LOWEST * logit_scale <= value <= HIGHEST * logit_scale:
        name = prefix + name
        scaled = "" if logit_scale == 1.0 else f" / {prefix}logit_scale ({shown(logit_scale)})"
        raise ValueError(f"{op}: {name}{scaled} must lie {_EXPECTED}, got {name} {shown(value)}")


def scaled(temperature: Tensor, logit_scale: float) -> Tensor:
    """Temperatures per token divided by the scale, in fp32 (fp64 stays)."""
    if logit_scale == 1.0:
        return temperature
    wide = temperature if temperature.dtype == torch.float64 else temperature.float()
    return wide / logit_scale


def bad(temperature: Tensor) -> Tensor:
    """True where an effective temperature is out of bounds or NaN."""
    return ~((temperature >= LOWEST) & (temperature <= HIGHEST))


def error(op: str, position: int, got: float | None = None, where: str = "") -> ValueError:
    """The error for the effective temperature at flat `position`."""
    over = "" if op == "token_logprobs" else "over logit_scale "
    came = "" if got is None else f", got {got}"
    return ValueError(
        f"{op}: temperature at flat position {position}{where} must be a finite number > 0, "
        f"{over}{_EXPECTED}{came}"
    )
