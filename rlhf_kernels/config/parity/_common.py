"""How a preset refuses an argument."""

from typing import NoReturn, TypeVar

Config = TypeVar("Config")


def one_of(preset: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"PolicyLossConfig.{preset}: {name} must be one of {', '.join(allowed)}, got {value!r}"
        )


def inexpressible(preset: str, what: str, why: str) -> NoReturn:
    raise ValueError(f"PolicyLossConfig.{preset}: {what} cannot be expressed: {why}")
