"""Integrations into trainers: `trl`, `verl`, `openrlhf`, with patch(), unpatch() and patched().

patch() imports and replaces functions; importing this package does neither.
"""

import importlib

from ._patch import IncompatibleError, Report

__all__ = ["NAMES", "IncompatibleError", "Report", "reports"]

NAMES = ("trl", "verl", "openrlhf")


def reports() -> dict[str, Report]:
    """The report of each integration in this process; imports the installed trainers."""
    return {name: importlib.import_module(f"{__name__}.{name}").report() for name in NAMES}
