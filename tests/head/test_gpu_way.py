"""The head's way on a GPU, taken on the emulated kernels: what it costs, and its numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.head import gpu_way
from tests.head.head_cases import drawn
from tests.kernels import emulated_cuda
from tests.kernels.launchers import with_launchers
from tools import head_traffic

import rlhf_kernels as rk
from rlhf_kernels.core import data_checks, tracing
from rlhf_kernels.core.pair_options import PairOptions
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.head import chunks
from rlhf_kernels.kernels import backends
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal

TOKENS, H, V = 24, 16, 520


@pytest.fixture(autouse=True)
def kernels():
    with emulated_cuda.installed(), rk.use_backend("cuda"):
        yield


class Problem:
    """A head with [2, 12] tokens, some of them masked, some without an advantage."""

    def __init__(self, dtype=torch.bfloat16):
        hidden, self.weight, labels = drawn(TOKENS, H, V, dtype)
        self.hidden = hidden.detach().view(2, -1, H).requires_grad_()
        self.labels = labels.view(2, -1)
        self.mask = torch.rand(2, 12) < 0.75
        self.old, self.advantages = torch.randn(2, 12) - 6, torch.randn(2, 12)
        self.advantages[:, 3:5] = 0
        self.ref = [t.detach() for t in drawn(TOKENS, H, V, dtype)[:2]]
        self.ref[0] = self.ref[0].view(2, -1, H)
        self.kept, self.spoilt = int(self.mask.sum()), False

    def call(self, op, **options):
        if op == "linear_token_logprobs":
            found = rk.linear_token_logprobs(
                self.hidden, self.weight, self.labels, self.mask, entropy=True, **options
            )
            return found.logprobs, found.entropy
        if op == "linear_kl_divergence":
            return (
                rk.linear_kl_divergence(self.hidden, self.weight, *self.ref, self.mask, **options),
            )
        loss, metrics = rk.linear_policy_loss(
            self.hidden, self.weight, self.labels, self.old, self.advantages, self.mask, **options
        )
        return loss, metrics.tensor

    def spoil(self):
        """Makes everything about masked tokens unusable."""
        self.spoilt = True
        with torch.no_grad():
            for t in (self.hidden, self.ref[0], self.old, self.advantages):
                t[~self.mask] = torch.nan
        self.labels[~self.mask] = V + 7

    def run(self, op, **options):
        """Results and gradients."""
        results = self.call(op, **options)
        moving = [r for r in results if r.requires_grad]
        ups = [torch.linspace(0.5, 1.5, r.numel()).view(r.shape) for r in moving]
        for up in ups if self.spoilt else ():
            if up.shape == self.mask.shape:
                up.masked_fill_(~self.mask, torch.nan)
        gradients = torch.autograd.grad(moving, (self.hidden, self.weight), ups)
        return *(r.detach() for r in results), *gradients


# Operation, its options; how often the host waits, forward and backward.
CALLS = {
    "logprobs": ("linear_token_logprobs", {}, 1, 1),
    "kl": ("linear_kl_divergence", {}, 1, 1),
    "policy, idle tokens": (
        "linear_policy_loss",
        {"config": rk.PolicyLossConfig.reinforce()},
        1,
        0,
    ),
    "policy, entropy": (
        "linear_policy_loss",
        {"config": rk.PolicyLossConfig.ppo(entropy_coef=0.1)},
        1,
        0,
    ),
    "policy, two sweeps": (
        "linear_policy_loss",
        {"config": rk.PolicyLossConfig.gspo(clip_low=0.2, clip_high=0.3)},
        1,
        0,
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


@each_call
def test_the_host_waits_once_a_pass(name):
    op, options, forward, backward = CALLS[name]
    problem = Problem()
    with gpu_way.counted() as cost:
        results = problem.call(op, **options)
        assert cost.syncs == forward
        results[0].sum().backward()
        assert cost.syncs == forward + backward


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "kl"])
def test_the_host_waits_once_a_pass_over_a_sharded_vocabulary_too(name, group):
    op, options, forward, backward = CALLS[name]
    problem = Problem()
    with gpu_way.taken():
        expected = problem.run(op, **options)
    with gpu_way.counted() as cost:
        results = problem.call(op, **options, group=group)
        assert cost.syncs == forward
        results[0].sum().backward()
        assert cost.syncs == forward + backward
    with gpu_way.taken():
        found = problem.run(op, **options, group=group)
    for a, e in zip(found, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, e, rtol=4 * eps, atol=4 * eps * float(e.abs().max()))


@pytest.mark.parametrize("more", ("exact", "some", "all"))
@each_call
def test_nothing_waits_where_the_number_of_tokens_is_given(name, more):
    op, options, *_ = CALLS[name]
    problem = Problem()
    with gpu_way.taken():
        expected = problem.run(op, **options)
    kept = {"exact": problem.kept, "some": problem.kept + 2, "all": TOKENS}[more]
    problem.spoil()
    with gpu_way.counted() as cost:
        found = problem.run(op, kept_tokens=kept, **options)
    assert cost.syncs == 0
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == e.dtype
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, e, rtol=4 * eps, atol=4 * eps * float(e.abs().max()))
    hidden = found[-2]
    assert (hidden[~problem.mask] == 0).all() and hidden.abs().max() > 0


@each_call
def test_too_small_a_number_raises_or_gives_nan(name, monkeypatch):
    op, options, *_ = CALLS[name]
    problem = Problem()
    few = {"kept_tokens": problem.kept - 1, **options}
    first = {"kept_tokens": int(problem.mask[0].sum()), **options}
    with pytest.raises(ValueError, match=f"kept_tokens must be at least .*, {problem.kept}, got"):
        problem.call(op, **few)
    # As on a GPU, where nobody looks.
    monkeypatch.setattr(data_checks, "can_read_on_host", lambda t: False)
    with gpu_way.taken():
        results = problem.run(op, **few)
        # A sequence of which nothing is missing, and none of the other.
        whole = problem.run(op, **first)
        none = problem.run(op, **options | {"kept_tokens": 0})
    for *found, gradient in (results, whole, none):
        assert found[0].isnan().any() and found[-1][problem.mask].isnan().any()
        assert gradient.isnan().all()
    results = problem.run(op, **options | {"kept_tokens": problem.kept})
    assert all(r.isfinite().all() for r in results)
    # No token, as said.
    problem.mask[:] = False
    problem.spoil()
    with gpu_way.taken():
        *_, hidden, weight = problem.run(op, **options | {"kept_tokens": 0})
    assert (hidden == 0).all() and (weight == 0).all()


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("policy")])
@pytest.mark.parametrize("divisor", (-1.0, 0.0, torch.inf, -torch.inf, torch.nan))
def test_a_bad_normalizer_gives_nan(name, divisor, monkeypatch):
    op, options, *_ = CALLS[name]
    problem = Problem()
    with pytest.raises(ValueError, match="normalizer must be a finite number > 0"):
        problem.run(op, normalizer=torch.tensor(divisor), **options)
    # As on a GPU, where nobody looks.
    monkeypatch.setattr(data_checks, "can_read_on_host", lambda t: False)
    with gpu_way.taken():
        loss, _, hidden, weight = problem.run(op, normalizer=torch.tensor(divisor), **options)
        assert loss.isnan() and hidden.isnan().any() and weight.isnan().all()
        results = problem.run(op, normalizer=torch.tensor(3.0), **options)
        assert all(r.isfinite().all() for r in results)


# Bytes per logit to and from row kernels, forward and backward; heads; most launches of a call of
# one chunk, forward and backward, and of each further chunk.
COSTS = {
    "logprobs": (4, 6, 1, (13, 14), 14),
    "kl": (8, 10, 2, (12, 14), 16),
    "policy, idle tokens": (10, 0, 1, (48, 4), 16),
    "policy, entropy": (10, 0, 1, (42, 4), 18),
    "policy, two sweeps": (10, 0, 1, (42, 4), 13),
}


@pytest.mark.parametrize("chunks_of_call", (1, 2, 3))
@each_call
def test_launches_and_bytes_of_a_call(name, chunks_of_call):
    op, options, *_ = CALLS[name]
    forward, backward, heads, (first, second), more = COSTS[name]
    problem = Problem()
    problem.mask[:], problem.advantages[:] = True, 1.0
    size = TOKENS // chunks_of_call
    with gpu_way.counted() as cost:
        results = problem.call(op, chunk_tokens=size, **options)
        assert cost.rows == forward * TOKENS * V
        between = cost.launches
        assert between <= first + more * (chunks_of_call - 1)
        results[0].sum().backward()
    assert cost.rows == (forward + backward) * TOKENS * V
    assert cost.launches - between <= second + more * (chunks_of_call - 1)
    logits, weight, hidden = TOKENS * V, V * H, TOKENS * H
    # The logits, and their fp32 sums; again for a second pass over them.
    sweeps = heads * (1 if name in ("policy, idle tokens", "policy, entropy") else 2)
    expected = sweeps * (2 * hidden + 2 * weight * chunks_of_call + 4 * logits)
    expected += 2 * logits + 2 * weight * chunks_of_call + 2 * hidden
    # The gradient of the weight: once in its own dtype, or summed in fp32.
    sums = 2 * weight if chunks_of_call == 1 else 4 * weight + 8 * weight * (chunks_of_call - 1)
    assert cost.products == expected + 2 * logits + 2 * hidden + sums
    if sweeps == 1:
        # What the report predicts from.
        predicted = head_traffic.traffic(TOKENS, H, V, size, one_kernel=False)
        assert (cost.products, cost.rows) == (predicted.products, predicted.rows)
    # Nothing else reads or writes the logits of a chunk; the gradient of the weight is rounded, and
    # scaled in its place.
    passes = [("_to_copy", 6 * weight)] if chunks_of_call > 1 else []
    passes += [("scale", 4 * weight)] if op == "linear_policy_loss" else []
    assert cost.rest_of(min(2 * size * V, 4 * weight)) == passes


def test_chunks_of_a_gpu():
    """Two to four thousand tokens within the memory that they may take, of today's models."""
    with gpu_way.taken():
        for vocab in (32_000, 128_256, 151_936, 262_144):
            size = chunks.chunk_size(torch.device("cpu"), vocab, torch.bfloat16)
            assert 2048 <= size <= 4096 and size * vocab * 6 <= 4 * 2**30


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_the_gradient_is_scaled_in_its_place_where_the_graph_goes(dtype):
    problem = Problem(dtype)

    def loss():
        return problem.call("linear_policy_loss", config=rk.PolicyLossConfig.reinforce())[0]

    leaves = (problem.hidden, problem.weight)
    with gpu_way.taken():
        kept = loss()
        saved = kept.grad_fn.saved_tensors
        before = [t.clone() for t in saved]
        found = [torch.autograd.grad(kept, leaves, torch.tensor(1.5), retain_graph=True)]
        for t, e in zip(saved, before, strict=True):
            assert_bitwise_equal(t, e)
        # Twice: what the first left is whole.
        found += [torch.autograd.grad(kept, leaves, torch.tensor(1.5))]
        last = loss()
        memory = [t.data_ptr() for t in last.grad_fn.saved_tensors[:2]]
        found += [torch.autograd.grad(last, leaves, torch.tensor(1.5))]
    for g, leaf, e in zip(found[0], leaves, before, strict=False):
        assert g.dtype == dtype
        assert_bitwise_equal(g, (e * 1.5).to(dtype).view(leaf.shape))
    for other in found[1:]:
        for g, e in zip(other, found[0], strict=True):
            assert_bitwise_equal(g, e)
    # Those of fp16 are kept in fp32.
    same = [g.data_ptr() == m for g, m in zip(found[2], memory, strict=True)]
    assert all(same) == (dtype != torch.float16)


class _Factors(TorchDispatchMode):
    """Counts 16-bit tensors times an fp32 number on the device: a GPU rounds it to 16 bits."""

    def __init__(self):
        super().__init__()
        self.rounded = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mul", "mul_"):
            a, b = args
            self.products += 1
            self.rounded += a.dtype != torch.float32 and a.dim() > b.dim() == 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", (False, True))
@pytest.mark.parametrize("traced", (False, True))
def test_no_upstream_gradient_is_rounded_to_16_bits(traced, kept, monkeypatch):
    # As Triton's backend, which has no kernel for it.
    if not traced:
        monkeypatch.setattr(tracing, "dispatch_modes", lambda: 0)
    problem = Problem()
    with gpu_way.taken(), with_launchers("cuda", scale_inplace=None):
        loss, _ = problem.call("linear_policy_loss")
        with _Factors() as factors:
            torch.autograd.grad(
                loss, (problem.hidden, problem.weight), torch.tensor(1 / 3), retain_graph=kept
            )
    assert factors.products == 2 and factors.rounded == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_scaled_in_place(dtype):
    scale = backends.get("cuda").launchers["scale_inplace"]
    # Whole and not, aligned and not; and more than twice what the blocks of a launch take at once.
    shapes = [(3, 0), (1 << 12, 0), (70_003, 0), (70_003, 1)]
    shapes += [(9_000_001, 0)] if dtype == torch.float32 else []
    for size, before in shapes:
        memory = torch.randn(size + before).to(dtype)
        values, expected = memory[before:], memory.clone()
        expected[before:] *= torch.tensor(1.7)
        assert scale(values, torch.tensor(1.7)).data_ptr() == values.data_ptr()
        assert_bitwise_equal(memory, expected)
        scale(values, torch.tensor(1.0))
        assert_bitwise_equal(memory, expected)
    assert scale(torch.empty(0, 4, dtype=dtype), torch.tensor(2.0)).shape == (0, 4)


@pytest.mark.parametrize("name", ("cuda", "triton"))
@pytest.mark.parametrize("vocab", (7, 517, 1032))
def test_a_gradient_in_16_bits_is_that_in_fp32_rounded(name, vocab):
    rows = 5
    logits = 3 * torch.randn(rows, vocab)
    logits[1, 3:6] = -torch.inf
    ref = torch.randn(rows, vocab)
    labels = torch.randint(0, vocab, (rows,))
    labels[2] = -100
    g, h = torch.randn(rows), torch.randn(rows)
    g[3] = h[3] = 0
    options = RowOptions(0.7, 0.0, True, -100)
    kernels = backends.get(name).kernels.rows

    def logprobs(out, logits, _):
        _, _, stats, *_ = kernels.token_logprobs(logits, labels, None, options)
        kernels.token_logprobs_backward_into(out, logits, labels, None, stats, g, h, options)

    def divergence(*options):
        options = PairOptions(0.7, *options)

        def run(out, logits, ref):
            _, stats, _ = kernels.kl_divergence(logits, ref, options)
            kernels.kl_divergence_backward_into(out, logits, ref, stats, g, options)

        return run

    jsd = divergence(True, 0.3, 4.0, 2.0, 1.1)
    for run in (logprobs, divergence(True), divergence(False), jsd):
        exact = torch.empty_like(logits)
        run(exact, logits, ref)
        assert exact.nan_to_num().abs().max() > 0
        # Side by side, and at every place of a row behind a multiple of 16 bytes.
        for before in range(0, 10, 3):
            memory = torch.full((rows, vocab + before + 5), 7.0, dtype=torch.bfloat16)
            out = memory[:, before : before + vocab]
            own = torch.full((rows, vocab + before), 9.0)[:, before:].copy_(logits)
            run(out, own, ref)
            if name == "cuda":
                assert_bitwise_equal(out.contiguous(), exact.bfloat16())
            else:
                # The interpreter cuts off what the format has no room for.
                error = (out.double() - exact.double()).abs()
                ulp = torch.finfo(torch.bfloat16).eps * exact.double().abs()
                assert (error <= ulp).logical_or(exact.isnan() & out.isnan()).all()
            assert (memory[:, :before] == 7).all() and (memory[:, before + vocab :] == 7).all()
