"""Environment variables, read once at import. docs/backends.md has the table."""

import os
from typing import Literal, get_args

#: Names that use_backend takes; "auto" chooses by device.
BackendName = Literal["auto", "reference", "cpu", "cuda", "triton"]
BACKEND_NAMES: tuple[BackendName, ...] = get_args(BackendName)

_backend = os.environ.get("RLHF_KERNELS_BACKEND", "auto").strip().lower() or "auto"
if _backend not in BACKEND_NAMES:
    raise ValueError(
        f"RLHF_KERNELS_BACKEND: expected one of {', '.join(BACKEND_NAMES)}, got {_backend!r}"
    )

#: Backend forced for the whole process, or "auto".
BACKEND: str = _backend

#: Instruction set of the CPU kernels, or None for the best one of this machine.
CPU_ISA: str | None = os.environ.get("RLHF_KERNELS_CPU_ISA", "").strip().lower() or None

_check = os.environ.get("RLHF_KERNELS_CHECK", "").strip() or "0"
if _check not in ("0", "1"):
    raise ValueError(f"RLHF_KERNELS_CHECK: expected 0 or 1, got {_check!r}")

#: Whether GPU calls validate labels, temperatures, offsets, normalizer, weights and supports first.
#: Bad values then raise, at the cost of a host sync, instead of turning the result into NaN.
CHECK: bool = _check == "1"
