"""Patches verl in a process that imports it; for VERL_USE_EXTERNAL_MODULES and "verl.plugins".

Every Ray worker imports verl, and verl imports this module. It does nothing unless
VERL_USE_EXTERNAL_MODULES names it or RLHF_KERNELS_VERL is 1 or losses.
"""

import logging
import os

_SWITCH = os.environ.get("RLHF_KERNELS_VERL", "").strip().lower() or "0"
_NAMED = __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")

if _SWITCH not in ("0", "1", "losses"):
    raise ValueError(f"RLHF_KERNELS_VERL: expected 0, 1 or losses, got {_SWITCH!r}")
if _SWITCH != "0" or _NAMED:
    from . import verl

    try:
        verl.patch(losses=_SWITCH == "losses")
    except verl.IncompatibleError:
        # verl ignores exceptions of its plug-ins, so log this one.
        logging.getLogger(__name__).exception("rlhf_kernels: verl is not patched")
        raise
