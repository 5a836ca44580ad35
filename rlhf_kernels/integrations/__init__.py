"""Drop-in for trainers: `trl`, `verl` and `openrlhf`, each with patch(), unpatch() and patched().

Nothing is imported or replaced before patch() is called.
"""

import importlib

from ._patch import IncompatibleError, Report

__all__ = ["NAMES", "IncompatibleError", "Report", "reports"]

NAMES = ("trl", "verl", "openrlhf")


def reports() -> dict[str, Report]:
    """What each integration finds in this process; imports the trainers that are installed."""
    return {name: importlib.import_module(f"{__name__}.{name}").report() for name in NAMES}
