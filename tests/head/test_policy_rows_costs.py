"""What linear_policy_loss costs on a GPU where one kernel takes a chunk, over several chunks."""

import pytest
import torch

from tests.head import gpu_way
from tests.head.head_cases import drawn
from tests.kernels import emulated_cuda
from tools import head_traffic

import rlhf_kernels as rk
from rlhf_kernels.testing import generator

# The least vocabulary that the kernel is chosen for.
TOKENS, H, VOCAB = 24, 16, 15 * 1024 + 1

# Whether tokens are masked, and whether their number is given; how often the host waits; most
# launches of a forward pass in one chunk, and of each further chunk.
CALLS = {
    "all, counted": (False, False, 1, 39, 6),
    "all, as said": (False, True, 0, 31, 7),
    "some, counted": (True, False, 1, 45, 12),
    "some, as said": (True, True, 0, 45, 13),
}


@pytest.fixture(autouse=True)
def kernels():
    with emulated_cuda.installed(), rk.use_backend("cuda"):
        yield


# As many chunks as 8,192 to 65,536 tokens have in those of 4,096.
@pytest.mark.parametrize("chunks", (1, 2, 4, 8, 16))
@pytest.mark.parametrize("name", CALLS)
def test_launches_waits_and_bytes_of_a_call(name, chunks):
    masked, given, waits, first, more = CALLS[name]
    hidden, weight, labels = drawn(TOKENS, H, VOCAB, torch.bfloat16)
    random = generator(3)
    old, advantages = torch.randn(2, TOKENS, generator=random) - 6
    mask = torch.ones(TOKENS, dtype=torch.bool)
    if masked:
        mask[::8] = False
    kept = int(mask.sum())
    size = -(-kept // chunks)
    chunks = -(-kept // size)
    options = {"chunk_tokens": size} | ({"kept_tokens": kept} if given else {})
    tokens = [t.view(2, -1) for t in (labels, old, advantages, mask)]
    with gpu_way.counted() as cost:
        loss, _ = rk.linear_policy_loss(hidden.view(2, -1, H), weight, *tokens, **options)
        launches = cost.launches
        # A gradient that is summed over chunks is rounded at the end.
        assert launches <= first + more * (chunks - 1) + (chunks > 1)
        torch.autograd.grad(loss, (hidden, weight))
    assert cost.syncs == waits
    assert cost.launches - launches <= 3
    # One for each chunk; the loss and its metrics; the scale of two gradients.
    assert cost.kernels == {"policy_rows": chunks, "policy_loss": 2, "scale": 2}
    predicted = head_traffic.traffic(kept, H, VOCAB, size, one_kernel=True)
    assert (cost.products, cost.rows) == (predicted.products, predicted.rows)
    # Nothing else reads or writes as much as the logits of a chunk, or a weight of their size.
    passes = [("_to_copy", 6 * VOCAB * H)] if chunks > 1 else []
    passes.append(("scale", 4 * VOCAB * H))
    assert cost.rest_of(min(2 * size, 4 * H) * VOCAB) == passes
