"""Fixtures shared by the tests: every operation test runs on each backend of its device.

`pytest tests --device cuda` runs tests on tensors of another device: those that take `backend`,
and those marked `gpu`. All other tests are for the CPU.
"""

import contextlib
import importlib.util
import os

import pytest
import torch

from tests.kernels import quick_interpreter


def pytest_addoption(parser):
    parser.addoption(
        "--device", help="run the operation tests on tensors of this device, and those marked gpu"
    )


def _device(config):
    return torch.device(config.getoption("--device") or "cpu")


def _backends(device):
    """The backends for tests of operations; on a GPU the CUDA extension is used if it is built."""
    if device.type == "cpu":
        return "reference", "cpu", "cuda", "triton"
    from rlhf_kernels.kernels import native

    cuda = device.type == "cuda" and native.unavailable_reason("cuda") is None
    return ("reference", "cuda", "triton") if cuda else ("reference", "triton")


def pytest_configure(config):
    """The quick suite draws the same examples every time; `make test-all` explores new ones."""
    # Triton reads this when it is first imported, which is later. The option is known only from
    # here on. Kernels for CPU tensors run in Triton's interpreter even if there is a GPU.
    if _device(config).type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton"):
            quick_interpreter.quicken()
    # The marker belongs to pytest-xdist, which may not be installed.
    config.addinivalue_line("markers", "xdist_group: tests that must not run side by side")
    # Tests that run only on a GPU do not need hypothesis.
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True)
        if "not slow" in config.option.markexpr:
            settings.load_profile("repeatable")
    if config.getoption("--device"):
        torch.set_default_device(_device(config))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = _backends(_device(metafunc.config))
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") is None:
        absent = pytest.mark.skip(reason="runs on a device that is named: --device cuda")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(absent)
    elif _device(config).type != "cpu":
        chosen = [i for i in items if "backend" in i.fixturenames or i.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
        items[:] = chosen


@pytest.fixture
def backend(request):
    """Forces each backend of the device in turn. A missing backend is a failure, not a skip."""
    import rlhf_kernels as rk

    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and _device(request.config).type == "cpu":
            from tests.kernels import emulated_cuda

            stack.enter_context(emulated_cuda.installed())
        stack.enter_context(rk.use_backend(request.param))
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
