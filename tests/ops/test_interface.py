"""What surrounds the numbers: masks, rewards, dtypes of a head, offsets, second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.cases import calls as cases

import rlhf_kernels as rk
from rlhf_kernels.core import checks, data_checks

DIFFERENTIABLE = [op for op in cases.OPERATIONS if cases.calls(op)[0].differentiable]
MASKED = [op for op in cases.OPERATIONS if any("mask" in c.tensors for c in cases.calls(op))]
PACKED = [op for op in cases.OPERATIONS if any("cu_seqlens" in c.tensors for c in cases.calls(op))]


def _same(actual, expected):
    for a, e in zip(cases.outputs(actual), cases.outputs(expected), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_second_derivative_is_right_or_refused(backend, op):
    plain = backend == "reference" or op in cases.PLAIN
    call = cases.calls(op)[1]
    tensors = cases.leaves(call, call.differentiable)
    tensors = {
        k: t.detach().double().requires_grad_(t.requires_grad)
        if plain and t.is_floating_point() else t
        for k, t in tensors.items()
    }  # fmt: skip
    wanted = [tensors[k] for k in call.differentiable]
    result = cases.outputs(call.run(tensors))[0].sum()
    found = torch.autograd.grad(result, wanted, create_graph=True, allow_unused=True)
    found = [g for g in found if g is not None]
    if not plain:
        assert all(g.requires_grad for g in found)
        # Whatever it reaches through, also beside a loss that is right.
        for loss in (sum(g.square().sum() for g in found), result + found[0].sum()):
            with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
                loss.backward(retain_graph=True)
            # Autograd then runs only what leads to these inputs.
            with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
                loss.backward(inputs=wanted, retain_graph=True)
            with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
                torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        return

    def penalty(*values):
        own = dict(zip(call.differentiable, values, strict=True))
        result = cases.outputs(call.run({**tensors, **own}))[0].sum()
        found = torch.autograd.grad(result, values, create_graph=True, allow_unused=True)
        return sum(g.square().sum() for g in found if g is not None)

    if penalty(*wanted).requires_grad:
        assert torch.autograd.gradcheck(penalty, wanted, atol=1e-4)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_second_derivative_is_never_left_out(backend, op):
    """What is asked for is a tensor on the way, what is behind it, or the upstream gradient."""
    if backend == "reference" or op in cases.PLAIN:
        return
    call = cases.calls(op)[0]
    first = call.tensors[call.differentiable[0]].clone().requires_grad_()
    inner = first * 1.0  # nobody holds it when the second derivative is asked for
    result = cases.outputs(call.run({**call.tensors, call.differentiable[0]: inner}))[0].sum()
    del inner
    (g,) = torch.autograd.grad(result, first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
        torch.autograd.grad(result + g.square().sum(), first, retain_graph=True)
    own = first.detach() * 1.0
    own = own.requires_grad_() * 1.0
    result = cases.outputs(call.run({**call.tensors, call.differentiable[0]: own}))[0].sum()
    (g,) = torch.autograd.grad(result, own, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
        torch.autograd.grad(result + g.square().sum(), own, retain_graph=True)
    upstream = torch.ones((), requires_grad=True)
    (g,) = torch.autograd.grad(result, own, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: .*create_graph=True"):
        torch.autograd.grad(g.sum() + upstream, upstream)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_first_derivatives_in_every_way(backend, op):
    """Twice through a kept graph, through checkpoints, with create_graph: all the same bits."""
    call = cases.calls(op)[0]
    names = call.differentiable

    def loss(*values):
        own = {k: v * 1.0 for k, v in zip(names, values, strict=True)}
        return cases.outputs(call.run({**call.tensors, **own}))[0].sum()

    values = [call.tensors[k].clone().requires_grad_() for k in names]
    expected = torch.autograd.grad(loss(*values), values, allow_unused=True)
    kept = loss(*values)
    for _ in range(2):
        found = torch.autograd.grad(kept, values, retain_graph=True, allow_unused=True)
        _same(found, expected)
    _same(torch.autograd.grad(kept, values, create_graph=True, allow_unused=True), expected)
    for reentrant in (False, True):
        leaves = [v.detach().requires_grad_() for v in values]
        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
        _same([v.grad for v in leaves], expected)
    leaves = [v.detach().requires_grad_() for v in values]
    loss(*leaves).backward(create_graph=True)
    # As an optimizer and gradient clipping treat it.
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad.detach().mul_(0.5)


@pytest.mark.parametrize("op", MASKED)
def test_masks_of_every_dtype(backend, op):
    calls = [call for call in cases.calls(op) if "mask" in call.tensors]
    integers = torch.int64, torch.uint8
    floats = torch.float32, torch.bfloat16, torch.float64
    met = set()
    for i, call in enumerate(calls):
        mask = call.tensors["mask"] != 0
        names = [n for n in ("mask", "dones") if n in call.tensors]
        expected = call.run({**call.tensors, "mask": mask})
        # A call takes seconds in Triton's interpreter, where kernels get bools in the place of
        # floats: one call has one of these dtypes, the next another.
        turns = backend == "triton" and len(calls) >= len(floats)
        for dtype in (*integers, *(floats[i % 3 : i % 3 + 1] if turns else floats)):
            met.add(dtype)
            own = {n: (call.tensors[n] != 0).to(dtype) for n in names}
            _same(call.run({**call.tensors, **own}), expected)
        for name in names:
            for bad in (0.5, float("nan"), 2.0, -1.0):
                soft = (call.tensors[name] != 0).float()
                soft.view(-1)[1] = bad
                with pytest.raises(TypeError, match=rf"{op}: {name} must be .*{name}\.bool\(\)"):
                    call.run({**call.tensors, name: soft})
    assert met == {*integers, *floats}


def test_rewards_may_be_integers_and_bools(backend):
    scores, steps = torch.tensor([1, 0, 3, 1]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    x = torch.randn(2, 3)

    def all_of(r, s):
        return (
            rk.group_advantages(r, 2),
            rk.group_advantages(r, 2, baseline="greedy", greedy_rewards=r.flip(0)),
            rk.gae(s, x, bootstrap_values=s[:, 0]),
            rk.discounted_returns(s, gamma=0.5),
            rk.ppo_advantages(r[:2], x, x, x, mask=None, kl_coef=0.1),
            rk.whiten(s),
            rk.policy_loss(x, x, s, mask=torch.ones(2, 3, dtype=torch.bool)).loss,
            rk.reward_model_loss(x[:, 0], x[:, 1], margin=r[:2]).loss,
        )

    expected = all_of(scores.float(), steps.float())
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        r, s = (scores.clamp(max=1), steps) if dtype is torch.bool else (scores, steps)
        if dtype is torch.bool:
            expected = all_of(r.float(), s.float())
        _same(all_of(r.to(dtype), s.to(dtype)), expected)
    # Exact beyond fp32's integers.
    large = torch.tensor([2**24, 2**24 + 1])
    found = rk.group_advantages(large, 2, scale="none")
    assert found.tolist() == [-0.5, 0.5]


BAD_OFFSETS = (
    [0, 3, 5], [0, 4, 2, 6], [1, 6], [0, 7], [0, -1, 6], [0, 3], [2, 4], [-(2**40), 6], [0, 2**62],
    [6, 0], [0, 2**31, 6], [6], [0, 6, 6, 5],
)  # fmt: skip


@pytest.mark.parametrize("op", PACKED)
def test_bad_offsets_name_the_operation(backend, op, monkeypatch):
    # GPUs poison instead, unless asked to look.
    monkeypatch.setattr("rlhf_kernels.core.env.CHECK", True)
    for call in cases.calls(op):
        if "cu_seqlens" not in call.tensors:
            continue
        for offsets in BAD_OFFSETS:
            for dtype in (torch.int64, torch.int32):
                if dtype is torch.int32 and max(map(abs, offsets)) >= 2**31:
                    continue
                bad = torch.tensor(offsets, dtype=dtype)
                tensors = {**call.tensors, "cu_seqlens": bad}
                for name in ("scores", "bootstrap_values", "weights"):
                    if name in tensors:
                        tensors[name] = torch.zeros(len(offsets) - 1)
                # Also with gaps between the entries.
                spread = torch.stack([bad, bad + 1], -1)[:, 0]
                for given in (bad, spread):
                    with pytest.raises(ValueError, match=f"^{op}: cu_seqlens must"):
                        call.run({**tensors, "cu_seqlens": given})
        for bad in (torch.zeros(0).long(), torch.tensor([[0, 6]]), torch.tensor(6)):
            with pytest.raises(ValueError, match=f"^{op}: cu_seqlens must be 1-D"):
                call.run({**call.tensors, "cu_seqlens": bad})
        with pytest.raises(TypeError, match=f"^{op}: cu_seqlens must be int32 or int64"):
            call.run({**call.tensors, "cu_seqlens": torch.tensor([0.0, 6.0])})


def test_offsets_that_may_not_be_looked_at_poison(monkeypatch):
    monkeypatch.setattr(data_checks, "can_read_on_host", lambda t: False)
    x, mask = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    for offsets in BAD_OFFSETS:
        bad = torch.tensor(offsets)
        if len(offsets) > 1:
            assert rk.sequence_logprobs(x, mask=mask, cu_seqlens=bad).isnan().all(), offsets
    found = rk.sequence_logprobs(x, mask=mask, cu_seqlens=torch.tensor([0, 2, 6]))
    assert torch.equal(found, torch.zeros(2))


def _head_calls(hidden, weight, bias):
    """Results of the three heads, by name, as functions of the operands."""
    labels = torch.randint(weight.shape[0], hidden.shape[:-1])
    old, advantages = torch.zeros(hidden.shape[:-1]) - 2, torch.randn(hidden.shape[:-1])
    ref = torch.randn(hidden.shape), torch.randn(weight.shape)
    config = rk.PolicyLossConfig.reinforce()

    def kl(h, w, b):
        own = ref[0].to(hidden.dtype).to(h.dtype), ref[1].to(w.dtype)
        return rk.linear_kl_divergence(h, w, *own, bias=b).sum()

    return {
        "logprobs": lambda h, w, b: rk.linear_token_logprobs(h, w, labels, bias=b).logprobs.sum(),
        "small chunks": lambda h, w, b: rk.linear_token_logprobs(
            h, w, labels, bias=b, chunk_tokens=4, batch_invariant=rk_kernels()
        ).logprobs.sum(),
        "kl": kl,
        "policy": lambda h, w, b: rk.linear_policy_loss(
            h, w, labels, old, advantages, mask=labels >= 0, bias=b, config=config
        ).loss,
        "support": lambda h, w, b: rk.linear_token_logprobs(
            h, w, labels, bias=b,
            support=(torch.arange(labels.numel() + 1), labels.reshape(-1).long()),
        ).logprobs.sum(),
    }  # fmt: skip


def rk_kernels():
    from rlhf_kernels.kernels import backends

    return backends.select("token_logprobs", torch.device("cpu")) != "reference"


def _with_gradients(function, operands):
    operands = [t.detach().clone().requires_grad_() for t in operands]
    result = function(*operands)
    result.backward()
    return [result.detach(), *(t.grad for t in operands)]


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
def test_sixteen_bit_hidden_states_and_an_fp32_head(backend, half):
    """The product in fp32: what the upcast hidden state gives, its gradient rounded once."""
    hidden, weight, bias = torch.randn(3, 5, 8).to(half), torch.randn(11, 8), torch.randn(11)
    for name, function in _head_calls(hidden, weight, bias).items():
        found = _with_gradients(function, (hidden, weight, bias))
        expected = _with_gradients(function, (hidden.float(), weight, bias))
        assert found[1].dtype == half and found[2].dtype == torch.float32, name
        expected[1] = expected[1].to(half)
        for f, e in zip(found, expected, strict=True):
            tolerance = torch.finfo(f.dtype).eps
            torch.testing.assert_close(f, e, rtol=8 * tolerance, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtypes", [(a, b) for a in checks.FLOATING for b in checks.FLOATING])
def test_autocast_casts_as_linear_does(backend, dtypes):
    hidden, weight = torch.randn(3, 5, 8).to(dtypes[0]), torch.randn(11, 8).to(dtypes[1])
    labels = torch.randint(11, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        logits = F.linear(h, w)
        assert logits.dtype == torch.bfloat16
        rk.token_logprobs(logits, labels).logprobs.sum().backward()
        expected = rk.token_logprobs(logits, labels).logprobs
        a, b = (t.clone().requires_grad_() for t in (hidden, weight))
        found = rk.linear_token_logprobs(a, b, labels).logprobs
        # The kernels of a simulated GPU keep the logits in fp32; others round them as F.linear.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-6)
        found.sum().backward()
        assert (a.grad.dtype, b.grad.dtype) == dtypes
        for f, e in ((a.grad, h.grad), (b.grad, w.grad)):
            torch.testing.assert_close(f, e, rtol=2**-5, atol=2**-5)
        for function in _head_calls(hidden, weight, None).values():
            result = function(*(t.clone().requires_grad_() for t in (hidden, weight)), None)
            assert result.dtype == torch.float32
            result.backward()


def test_other_mixtures_are_named():
    for a, b in (
        (torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32), (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
    ):  # fmt: skip
        hidden, weight = torch.zeros(2, 4).to(a), torch.zeros(5, 4).to(b)
        with pytest.raises(TypeError, match=f"weight must have hidden's dtype {a}.*got {b}"):
            rk.linear_token_logprobs(hidden, weight, torch.tensor([0, 1]))
        with pytest.raises(TypeError, match=f"ref_weight must have ref_hidden's dtype {a}"):
            rk.linear_kl_divergence(*(torch.zeros(2, 4), torch.zeros(5, 4)), hidden, weight)
    hidden, weight = torch.zeros(2, 4).double(), torch.zeros(5, 4)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"float64.*got torch\.bfloat16"):
        rk.linear_token_logprobs(hidden, weight, torch.tensor([0, 1]))


def test_distributed_tensors_are_named(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for op in cases.OPERATIONS:
            call = cases.calls(op)[0]
            heads = [n for n in call.tensors if n in ("weight", "ref_weight")]
            biases = {n.replace("weight", "bias"): call.tensors[n][:, 0] for n in heads}
            for name, t in (call.tensors | biases).items():
                if t.dim() == 0:
                    continue
                given = {**call.tensors, name: distribute_tensor(t, mesh, [Shard(0)])}
                shown = rf"{name} must be .*DTensor.*{name}\.full_tensor\(\).*group="
                with pytest.raises(TypeError, match=f"^{op}: {shown}"):
                    call.run(given)
    finally:
        dist.destroy_process_group()
