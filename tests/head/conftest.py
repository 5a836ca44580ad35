"""On the emulated kernels the head takes its way on a GPU."""

import contextlib

import pytest


@pytest.fixture
def columns_multiplied(monkeypatch):
    """How many columns of logits each product of a head gave, in order."""
    from rlhf_kernels.head.products import TiledHead

    seen, project = [], TiledHead.project

    def watched(head, hidden, columns=slice(None)):
        logits = project(head, hidden, columns)
        seen.append(logits.shape[1])
        return logits

    monkeypatch.setattr(TiledHead, "project", watched)
    return seen


@pytest.fixture(autouse=True)
def _way_on_a_gpu(request):
    device = request.config.getoption("--device") or "cpu"
    with contextlib.ExitStack() as stack:
        if device == "cpu" and "backend" in request.fixturenames:
            if request.getfixturevalue("backend") == "cuda":
                from tests.head import gpu_way

                stack.enter_context(gpu_way.taken())
        yield
