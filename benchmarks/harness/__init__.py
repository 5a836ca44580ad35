"""The building blocks of benchmark points."""

from .case import (
    SHORT,
    Case,
    Missing,
    Overwriting,
    Point,
    Provider,
    Settings,
    against,
    exact,
    points,
    sized,
)

__all__ = ["SHORT", "Case", "Missing", "Overwriting", "Point", "Provider", "Settings"]
__all__ += ["against", "exact", "points", "sized"]
