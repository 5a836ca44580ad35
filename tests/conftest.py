"""Fixtures shared by the tests: every operation test runs on each backend of this machine."""

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, chosen before they are loaded.
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import rlhf_kernels as rk


def pytest_configure(config):
    """The quick suite draws the same examples every time; `make test-all` explores new ones."""
    settings.register_profile("repeatable", derandomize=True)
    if "not slow" in config.option.markexpr:
        settings.load_profile("repeatable")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    """Each backend in turn, forced. A missing kernel backend is a failure, not a skip."""
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
