"""Checks of options: numbers, integers, flags, names. Each returns the value as kernels take it.

A number is a Python or numpy number, or a 0-d tensor, whose value is then read on the host. A
tensor that requires a gradient or is on the meta device is refused. A bool is not a number.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_NUMBER = (int, float, torch.SymInt, torch.SymFloat)
_INTEGER = (int, torch.SymInt)
_INT64 = (-(2**63), 2**63 - 1)
_LARGEST = 1e308


# Types of options whose equal values can stand for one another. A tensor's value may change.
_REPEATED = frozenset((int, float, bool, str, type(None)))

Checked = TypeVar("Checked")


def remembered(check: Callable[..., Checked]) -> Callable[..., Checked]:
    """`check`, a function of options, with the results for recent options cached.

    Most calls have the options of the call before. A check that raises is not cached.
    """
    known = functools.lru_cache(maxsize=64, typed=True)(check)

    def run(*options: object) -> Checked:
        if _REPEATED.issuperset(map(type, options)) and not torch.compiler.is_compiling():
            return known(*options)
        return check(*options)

    return run


def _scalar(value: object) -> object:
    """A 0-d tensor or numpy scalar as a Python number; any other value, or a bool, unchanged."""
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype is not torch.bool
        readable = not value.requires_grad and value.device.type != "meta"
        return value.item() if value.dim() == 0 and real and readable else value
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _got(value: object) -> str:
    """Describes a value of the wrong type for a message."""
    if isinstance(value, Tensor):
        grad = " that needs a gradient" if value.requires_grad else ""
        if value.is_nested:  # a nested tensor has no single shape
            return f"a nested tensor of {value.dtype}{grad}"
        where = " on the meta device, which holds no number" if value.device.type == "meta" else ""
        return f"a tensor of shape {shown(value.shape)} and {value.dtype}{where}{grad}"
    return type(value).__name__


def _finite(value: float) -> bool:
    """math.isfinite, as torch.compile traces it for a symbolic number.

    It takes such a number to be below infinity unless that is NaN, and writes the largest float as
    infinity; so numbers beyond 1e308 count as infinite.
    """
    return -math.inf < value < math.inf and -_LARGEST <= value <= _LARGEST


def shown(value: object) -> str:
    """A value for a message: a shape, a number, any other object.

    A symbolic number of torch.compile has no text; a cast makes it a constant of the graph.
    """
    if isinstance(value, torch.Size):
        sizes = ", ".join([f"{int(n)}" for n in value])
        return f"({sizes}{',' if len(value) == 1 else ''})"
    # Python refuses to print very long integers.
    if isinstance(value, int) and not -(2**128) < value < 2**128:
        return f"an integer of {value.bit_length()} bits"
    if torch.compiler.is_compiling() and isinstance(value, int | float):
        return f"{int(value)}" if isinstance(value, int) else f"{float(value)}"
    return f"{value!r}"


def number(op: str, name: str, value: Any) -> float:
    """Requires a finite number."""
    if type(value) is float and _finite(value):  # the common case
        return value
    if type(value) not in _NUMBER:
        value = _scalar(value)
    if type(value) not in _NUMBER:
        raise TypeError(f"{op}: {name} must be a number, got {_got(value)}")
    found: float = value
    # torch.compile traces comparisons of symbolic floats, but not math.isfinite.
    finite = _finite(found)
    if finite and isinstance(found, int) and not torch.compiler.is_compiling():
        finite = found.bit_length() <= 1023
    if not finite:
        raise ValueError(f"{op}: {name} must be finite, got {shown(found)}")
    # Torch cannot multiply by an integer beyond 64 bits.
    if isinstance(found, int) and not _INT64[0] <= found <= _INT64[1]:
        return float(found)
    return found


def positive(op: str, name: str, value: object) -> float:
    """Requires a finite number above zero."""
    if type(value) is float and 0.0 < value <= _LARGEST:  # the common case
        return value
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be a finite number > 0, got {shown(value)}")
    return value


def non_negative(op: str, name: str, value: object) -> float:
    """Requires a finite number of at least zero."""
    value = number(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {shown(value)}")
    return value


def rate(op: str, name: str, value: object) -> float:
    """Requires a number in [0, 1]."""
    if type(value) is float and 0.0 <= value <= 1.0:  # the common case
        return value
    value = number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {shown(value)}")
    return value


def integer(op: str, name: str, value: Any, *, low: int = _INT64[0], what: str = "") -> int:
    """Requires an integer in [low, 2^63); `what` adds an alternative to the message."""
    if type(value) is int and low <= value <= _INT64[1]:  # the common case
        return value
    if type(value) not in _INTEGER:
        value = _scalar(value)
    if type(value) not in _INTEGER:
        raise TypeError(f"{op}: {name} must be an integer{what}, got {_got(value)}")
    found: int = value
    if found < low:
        raise ValueError(f"{op}: {name} must be an integer >= {low}{what}, got {shown(found)}")
    if found > _INT64[1]:
        raise ValueError(f"{op}: {name} must be an integer of 64 bits{what}, got {shown(found)}")
    return found


def flag(op: str, name: str, value: object) -> bool:
    """Requires a bool, of Python or numpy."""
    if value is True or value is False:
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{op}: {name} must be a bool, got {_got(value)}")


def one_of(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Requires one of the strings in `allowed`."""
    if not isinstance(value, str):
        raise TypeError(
            f"{op}: {name} must be one of the strings {', '.join(allowed)}, got {_got(value)}"
        )
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
