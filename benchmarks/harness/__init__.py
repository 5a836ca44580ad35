"""The types of benchmark points, and their measurement."""

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
