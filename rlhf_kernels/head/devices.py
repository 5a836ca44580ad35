"""What the head does in another way on another kind of device."""

import torch


def is_cpu(device: torch.device) -> bool:
    """Whether the host reads a number without waiting, and blocks of a product stay in a cache."""
    return device.type == "cpu"


def mixes(device: torch.device) -> bool:
    """Whether products of 16-bit operands may leave their fp32 sums in fp32: cuBLAS, hipBLASLt."""
    return device.type == "cuda"
