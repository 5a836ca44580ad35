"""On the emulated kernels the head takes its way on a GPU."""

import contextlib

import pytest


@pytest.fixture(autouse=True)
def _way_on_a_gpu(request):
    device = request.config.getoption("--device") or "cpu"
    with contextlib.ExitStack() as stack:
        if device == "cpu" and "backend" in request.fixturenames:
            if request.getfixturevalue("backend") == "cuda":
                from tests.head import gpu_way

                stack.enter_context(gpu_way.taken())
        yield
