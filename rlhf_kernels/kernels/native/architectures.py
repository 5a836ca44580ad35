"""The architectures that the CUDA extension is built for, against a device's."""

import functools
from types import ModuleType

import torch

# Compute capability of the first GPUs with clusters of blocks.
CLUSTERS = 90


def of(extension: ModuleType | None) -> tuple[str, ...]:
    """Such as "sm_90" or "compute_90"; empty if the extension is not built."""
    return () if extension is None else tuple(extension.architectures)


@functools.cache
def suit(architectures: tuple[str, ...], device: torch.device, least: int = 0) -> bool:
    """Whether there is code for a device, of capability `least` or later.

    That is machine code for its compute capability, or PTX of an earlier one.
    """
    major, minor = torch.cuda.get_device_capability(device)
    codes = [(kind, int(n)) for kind, _, n in (a.partition("_") for a in architectures)]
    return any(
        10 * major + minor >= n >= least and (kind == "compute" or n // 10 == major)
        for kind, n in codes
    )
