"""A native launch allocates its results, and scratch once on a GPU."""

import pytest
import torch

import rlhf_kernels as rk


@pytest.fixture
def scratch(backend, monkeypatch):
    """The dtypes of buffers that are not results, in order, of a native backend."""
    if backend not in ("cpu", "cuda"):
        pytest.skip("of native backends")
    allocated, empty = [], torch.empty

    def watched(*args, dtype=None, **kwargs):
        allocated.append(dtype)
        return empty(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch, "empty", watched)
    yield lambda: [d for d in allocated if d is not torch.float32]
    monkeypatch.undo()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_a_scan_allocates_scratch_once(whiten, general, packed, backend, scratch):
    rewards, values = torch.randn(2, 5, 3000)
    offsets = {}
    if packed:
        rewards, values = rewards.flatten(), values.flatten()
        offsets["cu_seqlens"] = torch.tensor([0, 4000, 15000], dtype=torch.int32)
    rk.gae(rewards, values, whiten=whiten, value_lam=0.9 if general else None, **offsets)
    # A padded scan with rates per step takes a warp or more for each sequence, and no tiles.
    needed = whiten or packed or not general
    assert scratch() == [torch.uint8] * (backend == "cuda" and needed)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_group_advantages_and_whiten_allocate_scratch_once(scale, backend, scratch):
    rk.group_advantages(torch.randn(12), 4, scale=scale)
    assert scratch() == [torch.uint8] * (backend == "cuda" and scale == "batch")
    rk.whiten(torch.randn(3, 1000))
    assert scratch()[-1:] == [torch.uint8] * (backend == "cuda")


def test_gradients_of_many_labels_allocate_scratch_once(backend, scratch):
    logits = torch.randn(3, 4, 50, requires_grad=True)
    logprobs = rk.token_logprobs(logits, torch.randint(50, (3, 4, 7)))
    before = len(scratch())
    logprobs.logprobs.sum().backward()
    assert scratch()[before:] == [torch.uint8] * (backend == "cuda")
