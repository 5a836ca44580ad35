"""The fused LM head on every backend: values, gradients, skipped tokens, chunks, errors."""

import pytest
import torch

from tests.head.bounds import HeadBounds, assert_all_within, logprobs_bounds
from tests.head.head_cases import (
    CONFIGS,
    OPTIONS,
    B,
    H,
    T,
    V,
    drawn,
    operands,
    policy_bounds_of,
    policy_problem,
    run_policy,
)

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config.metrics import POLICY_METRICS
from rlhf_kernels.core import data_checks
from rlhf_kernels.testing import assert_bitwise_equal, to_float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_token_logprobs_match_fp64(backend, options, dtype):
    hidden, weight, bias, labels = operands(dtype)
    labels[:, 3:5] = -100
    upstream = torch.randn(2, B, T)
    upstream[:, 0, 6:9] = 0

    def run(function, h, w, b, up, **more):
        logprobs, entropy, *_ = function(h, w, labels, bias=b, entropy=True, **more)
        loss = (logprobs * up[0]).sum() + (entropy * up[1]).sum()
        return (logprobs, entropy, *torch.autograd.grad(loss, (h, w, b)))

    actual = run(rk.linear_token_logprobs, hidden, weight, bias, upstream, chunk_tokens=16,
                 **options)  # fmt: skip
    exact = run(reference.linear_token_logprobs, *to_float64((hidden, weight, bias)),
                upstream.double(), **to_float64(options))  # fmt: skip
    head = HeadBounds(hidden, weight, bias, **options)
    assert_all_within(actual, exact, logprobs_bounds(head, labels, upstream, tokens=16))
    assert (actual[0][:, 3:5] == 0).all() and (actual[2][:, 3:5] == 0).all()
    assert (actual[2][0, 6:9] == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_divergence_matches_fp64(backend, direction):
    hidden, weight, bias, _ = operands()
    ref_hidden, ref_weight, _, _ = operands(width=H // 2, seed=1)
    mask = torch.rand(B, T) < 0.7
    upstream = torch.randn(B, T)

    def run(function, h, w, b, rh, rw, up, **more):
        kl = function(h, w, rh, rw, bias=b, mask=mask, direction=direction, temperature=0.8,
                      logit_scale=0.5, **more)  # fmt: skip
        return (kl, *torch.autograd.grad((kl * up).sum(), (h, w, b)))

    arguments = (hidden, weight, bias, ref_hidden, ref_weight)
    actual = run(rk.linear_kl_divergence, *arguments, upstream, chunk_tokens=16)
    exact = run(reference.linear_kl_divergence, *to_float64(arguments), upstream.double())
    options = {"temperature": 0.8, "logit_scale": 0.5}
    head, ref = HeadBounds(*arguments[:3], **options), HeadBounds(*arguments[3:], **options)
    reverse = direction == "reverse"
    gradient = head.kl_gradient(ref, reverse, upstream * mask)
    bounds = (head.kl(ref, reverse, mask.shape) * mask, *head.products(gradient))
    assert_all_within(actual, exact, bounds)
    assert (actual[0][~mask] == 0).all() and (actual[1][~mask] == 0).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_policy_loss_matches_fp64(backend, config):
    leaves, tokens, constants = policy_problem()
    actual = run_policy(
        rk.linear_policy_loss, leaves, tokens, **constants, config=config, chunk_tokens=16
    )
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), config=config,
    )  # fmt: skip
    assert_all_within(actual, exact, policy_bounds_of(leaves, tokens, constants, config=config))


@pytest.mark.parametrize("packed", [False, True])
def test_policy_loss_is_the_composition(backend, packed):
    (hidden, weight, bias), (labels, old, _, mask), constants = policy_problem()
    config = CONFIGS["grpo"]
    advantages, cu_seqlens = torch.randn(B), None
    if packed:
        hidden = hidden.detach().reshape(B * T, H).requires_grad_()
        cu_seqlens = torch.tensor([0, 5, 5, B * T])
        labels, old, mask = labels.flatten(), old.flatten(), mask.flatten()
        constants = {k: v.flatten() for k, v in constants.items()}
    leaves = (hidden, weight, bias)
    tokens = (labels, old, advantages, mask)
    fused = run_policy(
        rk.linear_policy_loss, leaves, tokens, **constants, cu_seqlens=cu_seqlens, config=config
    )
    logits = hidden @ weight.T + bias
    own = rk.token_logprobs(logits, labels.masked_fill(~mask, -100), temperature=0.8, entropy=True)
    result = rk.policy_loss(
        own.logprobs, old, advantages, mask=mask, entropy=own.entropy, cu_seqlens=cu_seqlens,
        config=config, **constants,
    )  # fmt: skip
    gradients = torch.autograd.grad(result.loss, leaves)
    composed = (result.loss, result.metrics.tensor, *gradients)
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens),
        **to_float64(constants), cu_seqlens=cu_seqlens, config=config,
    )  # fmt: skip
    bounds = policy_bounds_of(leaves, tokens, constants, cu_seqlens=cu_seqlens, config=config)
    for results in (fused, composed):
        assert_all_within(results, exact, bounds)


def test_policy_loss_with_a_reference_head(backend):
    leaves, tokens, _ = policy_problem()
    ref_head = operands(width=H // 2, seed=2)[:3]
    labels, mask = tokens[0], tokens[3]
    kept = labels.masked_fill(~mask, -100)
    ref_hidden, ref_weight, ref_bias = to_float64(ref_head)
    ref = reference.linear_token_logprobs(
        ref_hidden, ref_weight, kept, bias=ref_bias, temperature=0.8
    )[0].detach()
    config = CONFIGS["grpo"]
    swept = run_policy(
        rk.linear_policy_loss, leaves, tokens, ref_hidden=ref_head[0], ref_weight=ref_head[1],
        ref_bias=ref_head[2], config=config,
    )  # fmt: skip
    constants = {"ref_logprobs": ref}
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), to_float64(tokens), **constants,
        config=config,
    )  # fmt: skip
    ref_error = HeadBounds(*ref_head, temperature=0.8).logprobs(kept)
    bounds = policy_bounds_of(leaves, tokens, constants, ref_error=ref_error, config=config)
    assert_all_within(swept, exact, bounds)


def test_ignored_hidden_states_are_not_read(backend):
    hidden, weight, _, labels = operands(bias=False)
    labels[:, 2:4] = -100
    dirty = hidden.detach().clone()
    dirty[:, 2:4] = torch.nan
    results = []
    for h in (hidden, dirty.requires_grad_()):
        logprobs = rk.linear_token_logprobs(h, weight, labels).logprobs
        results.append((logprobs, *torch.autograd.grad(logprobs.sum(), (h, weight))))
    for a, e in zip(*results, strict=True):
        assert_bitwise_equal(a, e)
    assert results[0][2].abs().max() > 0


def test_frozen_weight_has_no_gradient_buffer(backend):
    hidden, weight, bias, labels = operands()
    weight, bias = weight.detach(), bias.detach()
    logprobs = rk.linear_token_logprobs(hidden, weight, labels, bias=bias).logprobs
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert gradient.abs().max() > 0
    assert weight.grad is None and bias.grad is None


def test_nothing_to_do_gives_connected_zeros(backend):
    hidden, weight, bias, labels = operands()
    result = rk.linear_token_logprobs(
        hidden, weight, torch.full_like(labels, -100), bias=bias, entropy=True
    )
    assert (result.logprobs == 0).all() and (result.entropy == 0).all()
    for g in torch.autograd.grad(result.logprobs.sum(), (hidden, weight, bias)):
        assert (g == 0).all()
    empty = rk.linear_token_logprobs(hidden[:0], weight, labels[:0], bias=bias).logprobs
    assert empty.shape == (0, T)
    (g,) = torch.autograd.grad(empty.sum(), weight)
    assert (g == 0).all()


@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 1000])
def test_chunks_change_rounding_only(chunk):
    *leaves, labels = operands()

    def run(function, hidden, weight, bias, **options):
        logprobs = function(hidden, weight, labels, bias=bias, **options)[0]
        return (logprobs, *torch.autograd.grad(logprobs.sum(), (hidden, weight, bias)))

    with rk.use_backend("cpu"):
        found = run(rk.linear_token_logprobs, *leaves, chunk_tokens=chunk)
    exact = run(reference.linear_token_logprobs, *to_float64(leaves))
    bounds = logprobs_bounds(HeadBounds(*leaves), labels, (torch.ones(B, T),))
    assert_all_within(found, exact, (bounds[0], *bounds[2:]))


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    """No tensor as large as all logits is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    hidden, weight, bias, labels = operands()
    hidden = hidden.detach().repeat(1, 20, 1).requires_grad_()
    labels = labels.repeat(1, 20)
    with rk.use_backend("cpu"), Watch():
        logprobs = rk.linear_token_logprobs(
            hidden, weight, labels, bias=bias, chunk_tokens=16
        ).logprobs
        logprobs.sum().backward()
    assert 0 < largest <= max(16 * V, hidden.numel(), weight.numel()) < labels.numel() * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["cpu", "triton"])
def test_batch_invariance(kernels, dtype):
    """A token alone, in batches of any size and at any place: the same bits, and its gradient's."""
    hidden, weight, labels = drawn(70, 96, 1003 if kernels == "cpu" else 131, dtype)
    old, advantages = torch.randn(70) - 7, torch.randn(70)
    options = {"chunk_tokens": 32, "batch_invariant": True}

    def run(rows):
        h = hidden.detach()[rows].requires_grad_()
        own = rk.linear_token_logprobs(h, weight, labels[rows], entropy=True, **options)
        kl = rk.linear_kl_divergence(
            h, weight, hidden.detach()[rows].flip(-1), weight.detach(), **options
        )
        loss = rk.linear_policy_loss(
            h[:, None], weight, labels[rows, None], old[rows, None], advantages[rows, None],
            mask=torch.ones(len(rows), 1, dtype=torch.bool),
            config=rk.PolicyLossConfig.reinforce(aggregation="constant", normalizer=3.0), **options,
        ).loss  # fmt: skip
        total = (own.logprobs.sum() + own.entropy.sum(), loss, kl.sum())
        return own.logprobs, own.entropy, kl, *(torch.autograd.grad(t, h)[0] for t in total)

    with rk.use_backend(kernels):
        whole = run(torch.arange(70))
        for rows in (torch.tensor([41]), torch.tensor([3, 41, 69]), torch.arange(69, 20, -1)):
            for a, e in zip(run(rows), whole, strict=True):
                assert_bitwise_equal(a, e[rows])
                assert a.abs().max() > 0


def test_batch_invariance_is_refused_where_it_does_not_hold():
    hidden, weight, _, labels = operands(bias=False)
    with rk.use_backend("reference"), pytest.raises(ValueError, match="batch_invariant"):
        rk.linear_token_logprobs(hidden, weight, labels, batch_invariant=True)


def test_label_out_of_range_names_its_position(backend):
    hidden, weight, _, labels = operands(bias=False)
    labels[0, :4] = -100
    labels[1, 2] = V
    with pytest.raises(IndexError, match=rf"position {T + 2} is {V};"):
        rk.linear_token_logprobs(hidden, weight, labels)


@pytest.mark.parametrize("bad", [V, -1, -100, -(2**63)])
def test_policy_loss_finds_bad_labels_of_kept_tokens(backend, bad, monkeypatch):
    hidden, weight, _, labels = operands(bias=False)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = False
    tokens = torch.zeros(B, T), torch.ones(B, T)
    labels[0, 1] = bad

    def run():
        return rk.linear_policy_loss(
            hidden, weight, labels, *tokens, mask=mask, config=rk.PolicyLossConfig.ppo()
        ).loss

    assert run().isfinite()
    labels[1, 2] = bad
    with pytest.raises(IndexError, match=rf"position {T + 2} is {bad};"):
        run()
    if backend == "triton":
        # As on a GPU, where nobody looks: no label is skipped.
        monkeypatch.setattr(data_checks, "can_read_on_host", lambda t: False)
        assert run().isnan()


def test_bad_arguments(backend):
    hidden, weight, bias, labels = operands()
    with pytest.raises(ValueError, match=r"hidden must be \[..., 24\]"):
        rk.linear_token_logprobs(hidden[..., :-1], weight, labels)
    with pytest.raises(TypeError, match="weight must have hidden's dtype"):
        rk.linear_token_logprobs(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"bias must be \[V\]"):
        rk.linear_token_logprobs(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="labels must have the shape of hidden without H"):
        rk.linear_token_logprobs(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="chunk_tokens must be an integer >= 1"):
        rk.linear_token_logprobs(hidden, weight, labels, chunk_tokens=0)
    few = pytest.raises(ValueError, match=f"kept_tokens must be at least .*, {B * T}, got 2")
    with few:
        rk.linear_token_logprobs(hidden, weight, labels, kept_tokens=2)
    with few:
        rk.linear_kl_divergence(hidden, weight, hidden, weight, kept_tokens=2)
    support = torch.arange(B * T + 1), labels.flatten()
    with few:
        rk.linear_token_logprobs(hidden, weight, labels, support=support, kept_tokens=2)
    with pytest.raises(ValueError, match="chunk_tokens must be an integer >= 1"):
        rk.linear_token_logprobs(hidden, weight, labels, support=support, chunk_tokens=0)
    with pytest.raises(ValueError, match="logit_scale must be a finite number > 0"):
        rk.linear_token_logprobs(hidden, weight, labels, logit_scale=-1.0)
    with pytest.raises(ValueError, match="ref_hidden and ref_weight must have the tokens"):
        rk.linear_kl_divergence(hidden, weight, hidden[:, 1:], weight)
    tokens = (labels, torch.zeros(B, T), torch.zeros(B, T))
    mask = torch.ones(B, T, dtype=torch.bool)
    config = rk.PolicyLossConfig.ppo()
    with few:
        rk.linear_policy_loss(hidden, weight, *tokens, mask, kept_tokens=2, config=config)
    with pytest.raises(ValueError, match="ref_hidden and ref_weight must be given together"):
        rk.linear_policy_loss(hidden, weight, *tokens, mask=mask, ref_hidden=hidden, config=config)
    with pytest.raises(ValueError, match="ref_logprobs must be given, since kl_coef"):
        rk.linear_policy_loss(hidden, weight, *tokens, mask=mask, config=rk.PolicyLossConfig.grpo())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_without_old_logprobs_they_are_the_policys_own(backend, config):
    leaves, (labels, _, *rest), constants = policy_problem()
    tokens = (labels, None, *rest)
    actual = run_policy(
        rk.linear_policy_loss, leaves, tokens, **constants, config=config, chunk_tokens=16
    )
    exact = run_policy(
        reference.linear_policy_loss, to_float64(leaves), (labels, None, *to_float64(rest)),
        **to_float64(constants), config=config,
    )  # fmt: skip
    hidden, weight, bias = leaves
    own = reference.linear_token_logprobs(
        hidden, weight, labels.masked_fill(~rest[1], -100), bias=bias, temperature=0.8
    )[0].detach()
    bounds = policy_bounds_of(leaves, (labels, own, *rest), constants, config=config)
    assert_all_within(actual, exact, bounds)
    # To the bit, whatever a product rounds to.
    found = dict(zip(POLICY_METRICS, actual[1].tolist(), strict=True))
    assert found["ratio_min"] == found["ratio_max"] == found["ratio_mean"] == 1
    assert found["k1_old"] == found["k3_old"] == found["clip_frac_low"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_a_kept_graph_stand_alone(backend, dtype):
    leaves, tokens, constants = policy_problem(dtype)

    def run():
        return rk.linear_policy_loss(*leaves[:2], *tokens, bias=leaves[2], **constants).loss

    kept = run()
    for up in torch.tensor([1.0, 1.5, 1.0]):
        found = torch.autograd.grad(kept, leaves, up, retain_graph=True)
        for g, e in zip(found, torch.autograd.grad(run(), leaves, up), strict=True):
            assert_bitwise_equal(g, e)
            # Whoever has it may change it.
            g.mul_(7)
    (first,) = torch.autograd.grad(kept, leaves[1], retain_graph=True)
    torch.autograd.grad(kept, leaves[0], torch.tensor(1.5))
    assert_bitwise_equal(first, torch.autograd.grad(run(), leaves[1])[0])


def test_a_batch_of_upstream_gradients(backend):
    leaves, tokens, constants = policy_problem()
    loss, _ = rk.linear_policy_loss(*leaves[:2], *tokens, bias=leaves[2], **constants)

    def run(up):
        return torch.autograd.grad(loss, leaves, up, retain_graph=True)

    for batched, one in zip(torch.func.vmap(run)(torch.tensor([1.0, 2.0])), run(None), strict=True):
        assert_bitwise_equal(batched, torch.stack((one, 2 * one)))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_contiguous_whatever_the_strides(backend, masked):
    leaves, (*tokens, mask), constants = policy_problem()
    if masked:
        mask = torch.zeros_like(mask)
    tokens = (*tokens, mask)
    moved = [t.detach().mT.contiguous().mT for t in leaves[:2]]
    # The tokens are a dimension that collapses.
    moved[0] = leaves[0].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    moved = [*(t.requires_grad_() for t in moved), leaves[2]]
    expected = run_policy(rk.linear_policy_loss, leaves, tokens, **constants)
    found = run_policy(rk.linear_policy_loss, moved, tokens, **constants)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
        assert a.is_contiguous() or backend == "reference"


@pytest.mark.parametrize("kept", [-1, B * T])
def test_opcheck(kept):
    hidden, weight, bias, labels = (t.detach() for t in operands())
    op = torch.ops.rlhf_kernels.linear_token_logprobs
    options = (0.9, 0.0, True, -100, True, True, True)
    args = (hidden, weight, bias, labels, None, *options, 16, kept)
    torch.library.opcheck(op.default, (*args, "cpu"))
    _, _, stats, collisions, _ = op(*args, "cpu")
    g = torch.randn(B, T)
    back = (hidden, weight, bias, labels, None, *options, stats, collisions, g, g, g, g, 16, kept)
    torch.library.opcheck(
        torch.ops.rlhf_kernels.linear_token_logprobs_backward.default,
        (*back, [True, True, False], "cpu"),
    )


@pytest.mark.parametrize("given", [False, True])
def test_compiles_without_graph_break(given):
    torch._dynamo.reset()

    def step(hidden, weight, labels):
        found = rk.linear_token_logprobs(
            hidden * 1, weight, labels, entropy=True,
            kept_tokens=labels.numel() if given else None,
        )  # fmt: skip
        return found.logprobs.sum() - 0.01 * found.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, weight, _, labels = operands(bias=False)
    for length in (3, 7, 13):
        arguments = hidden[:, :length].detach().requires_grad_(), weight, labels[:, :length]
        actual = torch.autograd.grad(compiled(*arguments), arguments[:2])
        expected = torch.autograd.grad(step(*arguments), arguments[:2])
        for a, e in zip(actual, expected, strict=True):
            assert_bitwise_equal(a, e)


def test_gradcheck_of_the_reference():
    hidden, weight, bias, labels = operands()
    leaves = to_float64((hidden[:, :3], weight[:9, :], bias[:9]))
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    torch.autograd.gradcheck(
        lambda h, w, b: reference.linear_token_logprobs(
            h, w, labels[:, :3] % 9, bias=b, softcap=5.0, logit_scale=0.5, entropy=True
        )[:2],
        leaves,
    )
