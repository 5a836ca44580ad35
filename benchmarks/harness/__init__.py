"""What points are made of and measured with."""

from .case import Case, Missing, Overwriting, Provider, Settings, compiled, points

__all__ = ["Case", "Missing", "Overwriting", "Provider", "Settings", "compiled", "points"]
