"""How a preset refuses an argument."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from ..options import PolicyLossOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Preset(Protocol):
    """The constructor that a preset calls. PolicyLossConfig imports the presets, not vice versa."""

    def __init__(self, **options: "Unpack[PolicyLossOptions]") -> None: ...


Config = TypeVar("Config", bound=Preset)


def one_of(preset: str, name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"PolicyLossConfig.{preset}: {name} must be one of {', '.join(allowed)}, got {value!r}"
        )


def inexpressible(preset: str, what: str, why: str) -> NoReturn:
    raise ValueError(f"PolicyLossConfig.{preset}: {what} cannot be expressed: {why}")


def require(preset: str, name: str, expected: str) -> NoReturn:
    """Raises ValueError for options that the trainer does not combine."""
    raise ValueError(f"PolicyLossConfig.{preset}: {name} must be {expected}")


def refuse(preset: str, name: str, value: str, reasons: Mapping[str, str]) -> None:
    """Raises ValueError with the reason if the trainer's option `value` cannot be expressed."""
    if value in reasons:
        inexpressible(preset, f"{name}={value!r}", reasons[value])
