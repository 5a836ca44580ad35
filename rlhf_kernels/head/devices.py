"""Facts about kinds of devices on which the head decides."""

import torch


def is_cpu(device: torch.device) -> bool:
    """Whether numbers are read without waiting, and a cache holds blocks of products."""
    return device.type == "cpu"


def mixes(device: torch.device) -> bool:
    """Whether 16-bit operands can have an fp32 product: from cuBLAS and hipBLASLt."""
    return device.type == "cuda"
