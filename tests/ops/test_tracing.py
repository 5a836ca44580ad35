"""Every operation, compiled, exported and traced, is the one that runs eagerly."""

import copy
import pickle
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.cases import calls as cases
from tests.cases.combinations import covering, pairs, products

import rlhf_kernels as rk
from rlhf_kernels.ops import _operator

BACKENDS = ("reference", "cpu")
each_backend = pytest.mark.parametrize(
    "op, name",
    [
        (op, name)
        for op in cases.OPERATIONS
        # Plain torch is the same everywhere.
        for name in (("auto",) if op in cases.PLAIN else BACKENDS)
    ],
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def _close(actual, expected, label):
    assert len(actual) == len(expected), label
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None), label
        if e is not None:
            assert a.dtype == e.dtype, label
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6, msg=lambda m: f"{label}: {m}")


def _weighted(results):
    return sum((r * torch.linspace(0.5, 1.5, r.numel()).view(r.shape)).sum() for r in results)


def _gradients(run, call, needs, only_first):
    """(results, gradients) of a weighted sum of all results, or of the first alone."""
    tensors = cases.leaves(call, needs)
    results = cases.outputs(run(tensors))
    moving = [r for r in results if r.requires_grad][: 1 if only_first else None]
    assert bool(moving) == bool(needs)
    if moving:
        sum(
            (r * torch.linspace(0.5, 1.5, r.numel()).view(r.shape)).sum() for r in moving
        ).backward()
    return [r.detach() for r in results], [tensors[k].grad for k in needs]


def _compare_compiled(call, needs, compiler="aot_eager"):
    run = torch.compile(call.run, backend=compiler, fullgraph=True, dynamic=True)
    for only_first in (False, True) if needs else (False,):
        label = f"{call.op} {call.label} gradients of {needs}"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*alias.*")
            actual = _gradients(run, call, needs, only_first)
        for a, e in zip(actual, _gradients(call.run, call, needs, only_first), strict=True):
            _close(a, e, label)


def _rotating(op):
    """A few calls, each with one choice of the inputs that need gradients."""
    for i, call in enumerate(cases.calls(op)):
        choices = cases.wanted(call, full=False)
        yield call, choices[-1 - i % len(choices)]


@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_two_compiled_calls_are_eager(op):
    """In one graph: what is made for the first must not be in the way of the second."""
    found = list(_rotating(op))
    found = [found[0], found[len(found) // 2]]
    tensors = [cases.leaves(*call) for call in found]

    def run(tensors):
        return [call.run(own) for (call, _), own in zip(found, tensors, strict=True)]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*alias.*")
        results = [cases.outputs(r) for r in compiled(tensors)]
        firsts = [r[0] for r, (_, needs) in zip(results, found, strict=True) if needs]
        if firsts:
            _weighted(firsts).backward()
    for (call, needs), own, result in zip(found, tensors, results, strict=True):
        expected = _gradients(call.run, call, needs, True)
        actual = [r.detach() for r in result], [own[k].grad for k in needs]
        for a, e in zip(actual, expected, strict=True):
            _close(a, e, f"{op} {call.label} gradients of {needs}")


@pytest.mark.slow
@each_backend
def test_compiled_is_eager(op, name):
    """Every value of every option, with every choice of the inputs that need gradients."""
    with rk.use_backend(name):
        for call in cases.calls(op):
            for needs in cases.wanted(call):
                torch._dynamo.reset()
                _compare_compiled(call, needs)


@pytest.mark.slow
@each_backend
def test_compiled_is_eager_with_all_combinations(op, name):
    """Every combination of options on the kernels; every pair of them in plain torch.

    There the compiler traces torch's own operations, which takes five times as long.
    """
    with rk.use_backend(name):
        combine = products if name == "cpu" else pairs
        for i, call in enumerate(cases.calls(op, combine)):
            choices = cases.wanted(call)
            torch._dynamo.reset()
            _compare_compiled(call, choices[i % len(choices)])


@pytest.mark.slow
@pytest.mark.parametrize("op", ("linear_token_logprobs", "policy_loss", "token_logprobs", "gae"))
def test_inductor(op):
    for call, needs in list(_rotating(op))[:2]:
        torch._dynamo.reset()
        _compare_compiled(call, needs, compiler="inductor")


@pytest.mark.parametrize("op", ("value_loss", "policy_loss", "linear_policy_loss"))
def test_metrics_by_name_in_a_graph(op):
    call = cases.calls(op)[0]

    def run(tensors):
        loss, metrics = call.run(tensors)
        return loss, metrics["loss"] + metrics["tokens"], metrics

    actual = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)(call.tensors)
    expected = run(call.tensors)
    _close(actual[:2], expected[:2], op)
    assert type(actual[2]) is type(expected[2])
    assert actual[2].as_dict() == pytest.approx(expected[2].as_dict())


@pytest.mark.parametrize("op", ("value_loss", "policy_loss", "linear_policy_loss"))
def test_metrics_are_a_mapping(op):
    call = cases.calls(op)[0]

    def use(tensors):
        metrics = call.run(tensors).metrics
        total = sum(metrics[name] for name in metrics) + len(metrics)
        first, *_ = metrics.values()
        return total, first, dict(metrics), dict(**metrics), "tokens" in metrics, metrics.get("x")

    metrics = call.run(call.tensors).metrics
    assert isinstance(metrics, Mapping) and len(metrics) == len(list(metrics)) > 5
    assert "tokens" in metrics and "no_such_metric" not in metrics and 0 not in metrics
    assert all(t.dim() == 0 and t.data_ptr() >= metrics.tensor.data_ptr() for t in metrics.values())
    assert metrics.as_dict() == {name: t.item() for name, t in metrics.items()}
    with pytest.raises(KeyError, match=r"metrics are loss, .*tokens; got 'no_such_metric'"):
        metrics["no_such_metric"]
    for again in (pickle.loads(pickle.dumps(metrics)), copy.deepcopy(metrics)):
        assert type(again) is type(metrics) and again.as_dict() == metrics.as_dict()
    assert "'tokens': tensor(" in repr(metrics) and repr(metrics).startswith(type(metrics).__name__)
    leaves, spec = torch.utils._pytree.tree_flatten(metrics)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 1 and again.tensor is metrics.tensor

    expected = use(call.tensors)
    actual = torch.compile(use, backend="eager", fullgraph=True, dynamic=True)(call.tensors)
    _close(actual[:2], expected[:2], op)
    for a, e in zip(actual[2:4], expected[2:4], strict=True):
        assert a.keys() == e.keys()
        _close(list(a.values()), list(e.values()), op)
    assert actual[4:] == expected[4:] == (True, None)


def _memory(tensors):
    return [t.untyped_storage()._cdata for t in tensors if t is not None]


@each_backend
def test_results_share_no_memory(op, name, monkeypatch):
    """Neither with one another nor with an argument: the public results and the operators'."""
    checked = []

    def apart(results, arguments, label):
        found = _memory(results)
        assert len(set(found)) == len(found), f"{label}: results share memory"
        assert not set(found) & set(_memory(arguments)), f"{label}: a result is an argument's"
        checked.append(label)

    launch = _operator.Operator.__call__

    def call_operator(self, *args, **how):
        results = launch(self, *args, **how)
        apart(cases.outputs(results), cases.outputs(args), self.name)
        return results

    monkeypatch.setattr(_operator.Operator, "__call__", call_operator)
    with rk.use_backend(name):
        for call in cases.calls(op, covering if op.endswith("policy_loss") else products):
            for needs in cases.wanted(call):
                tensors = cases.leaves(call, needs)
                results = cases.outputs(call.run(tensors))
                apart(results, list(tensors.values()), call.label)
                moving = [r for r in results if r.requires_grad]
                if moving:
                    found = torch.autograd.grad(
                        moving, [tensors[k] for k in needs],
                        [torch.full_like(r, 2.0) for r in moving], allow_unused=True,
                    )  # fmt: skip
                    apart(found, list(tensors.values()), f"gradients of {call.label}")
    assert checked


class _Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, **tensors):
        return self.call.run(tensors)


@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=pytest.mark.slow)))
@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_export(op, strict):
    for name in BACKENDS if strict else ("cpu",):
        with rk.use_backend(name):
            for call in cases.calls(op)[-1 if not strict else 0 :]:
                expected = cases.outputs(call.run(call.tensors))
                program = torch.export.export(
                    _Module(call), args=(), kwargs=call.tensors, strict=strict
                )
                actual = cases.outputs(program.module()(**call.tensors))
                _close(actual, expected, f"{name} {op} {call.label}")


def _step(call, needs):
    """Results and gradients of a call as a function of its tensors."""

    def run(tensors):
        tensors = {k: t.detach().requires_grad_(k in needs) for k, t in tensors.items()}
        results = cases.outputs(call.run(tensors))
        sums = [r.sum() for r in results if r.requires_grad]
        if not sums:
            return results
        wanted = [tensors[k] for k in needs]
        return results + list(torch.autograd.grad(sums, wanted, allow_unused=True))

    return run


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_make_fx(op, mode):
    for name in BACKENDS:
        with rk.use_backend(name):
            for call, needs in list(_rotating(op))[: 2 if mode == "symbolic" else 4]:
                run = _step(call, needs)
                expected = run(call.tensors)
                graph = make_fx(run, tracing_mode=mode)(call.tensors)
                other = {
                    k: t * 0.5 if t.is_floating_point() and "mask" not in k else t
                    for k, t in call.tensors.items()
                }
                label = f"{name} {call.op} {call.label}"
                _close(graph(call.tensors), expected, label)
                # What was recorded is the operation, not its result.
                _close(graph(other), run(other), label)


def test_soft_masks_are_found_in_a_graph():
    x, mask = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 1.0]] * 2)
    run = torch.compile(
        lambda mask: rk.whiten(x, mask=mask), backend="aot_eager", fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(run(mask), rk.whiten(x, mask=mask.bool()))
    with pytest.raises(RuntimeError, match="mask must be bool or integer"):
        run(mask * 0.5)


_NAN, _INF = float("nan"), float("inf")
_X, _LABELS, _KEEP = torch.ones(6, 8), torch.arange(6), torch.ones(2, 3, dtype=torch.bool)
_Y = torch.ones(2, 3)
# By name: a call of one argument; its values, the first two right, so that it becomes symbolic.
_WRONG = {
    "kept_tokens": (
        lambda k: rk.linear_token_logprobs(_X, _X, _LABELS, kept_tokens=k),
        (6, 7, -1, -2, 2**70, "a", 1.5, True),
    ),
    "chunk_tokens": (
        lambda k: rk.linear_token_logprobs(_X, _X, _LABELS, chunk_tokens=k),
        (6, 7, 0, -2, 2**200, "a", 1.5),
    ),
    "temperature": (
        lambda k: rk.token_logprobs(_X, _LABELS, temperature=k),
        (1.5, 0.5, -1.0, 0.0, 1e-30, _NAN, _INF, -_INF, "a"),
    ),
    "gamma": (lambda k: rk.gae(_Y, _Y, mask=_KEEP, gamma=k), (0.5, 0.7, -1.0, _NAN, _INF, "a")),
    "clip_range": (
        lambda k: rk.value_loss(_Y, _Y, _Y, _KEEP, clip_range=k),
        (0.2, 0.3, -1.0, _INF, _NAN, "a"),
    ),
    "tau": (
        lambda k: rk.group_advantages(_LABELS.float(), 3, baseline="log-mean-exp", tau=k),
        (0.5, 0.7, -1.0, 0.0, 1.7e308, _INF, _NAN, "a"),
    ),
    "groups": (lambda k: rk.group_advantages(_LABELS.float(), groups=k), (2, 3, 4, 0, "a")),
    "shape": (lambda k: rk.kl_penalty(_X, torch.ones(6, k)), (8, 8, 4, 5)),
    "labels": (lambda k: rk.token_logprobs(_X, torch.zeros(k).long()), (6, 6, 4, 5)),
    "head": (lambda k: rk.linear_token_logprobs(_X, torch.ones(9, k), _LABELS), (8, 8, 4, 5)),
}


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", _WRONG)
def test_compiled_calls_refuse_in_the_words_of_eager_ones(name, fullgraph):
    call, (first, second, *wrong) = _WRONG[name]
    compiled = torch.compile(call, backend="eager", fullgraph=fullgraph)
    compiled(first), compiled(second)
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as expected:
            call(value)
        with pytest.raises(Exception) as found:
            compiled(value)
        assert str(expected.value) in str(found.value), value
