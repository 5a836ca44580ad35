"""Fixtures shared by the tests: every operation test runs on each backend of this machine."""

import pytest
import torch

import rlhf_kernels as rk

KERNEL_BACKENDS = tuple(b for b in rk.available_backends("cpu") if b != "reference")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend in turn, forced. A missing CPU extension is a failure, not a skip."""
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
