"""Fixtures shared by the tests: every operation test runs on each backend of this machine."""

import pytest
import torch
from hypothesis import settings

import rlhf_kernels as rk


def pytest_configure(config):
    """The quick suite draws the same examples every time; `make test-all` explores new ones."""
    settings.register_profile("repeatable", derandomize=True)
    if "not slow" in config.option.markexpr:
        settings.load_profile("repeatable")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend in turn, forced. A missing CPU extension is a failure, not a skip."""
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
