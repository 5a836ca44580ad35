"""mask= of every operation on tokens: what lies under it changes nothing and gets no gradient."""

import dataclasses

import pytest
import torch

from tests.cases import calls as cases

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends

NAN = float("nan")
MASK = torch.tensor([[True, False, True], [True, True, False]])
#: What is put under the mask, by argument, where it is not NaN: no value of its kind.
SPOILED = {"labels": -7, "temperature": -1.0}
PER_TOKEN = (
    "logits", "ref_logits", "hidden", "ref_hidden", "labels", "temperature", "logprobs",
    "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "values", "old_values",
    "returns", "rewards", "x",
)  # fmt: skip


def _calls(op):
    """Padded calls that are given a mask, of whatever kind it was, as MASK."""
    for call in cases.calls(op):
        if "mask" in call.tensors and "cu_seqlens" not in call.tensors:
            yield call._replace(tensors={**call.tensors, "mask": MASK})


MASKED = [op for op in cases.OPERATIONS if any(True for _ in _calls(op))]


def _spoiled(call):
    """The call's tensors, with something else under the mask."""
    found = dict(call.tensors)
    for name in PER_TOKEN:
        t = found.get(name)
        if t is not None and t.shape[:2] == MASK.shape:
            found[name] = t.clone()
            found[name][~MASK] = SPOILED.get(name, NAN)
    return found


def _run(call, tensors):
    """Results and gradients."""
    tensors = {k: t.clone().requires_grad_(k in call.differentiable) for k, t in tensors.items()}
    results = cases.outputs(call.run(tensors))
    moving = [r.sum() for r in results if r.requires_grad]
    wanted = [tensors[k] for k in call.differentiable]
    found = torch.autograd.grad(moving, wanted, allow_unused=True) if moving else ()
    return results, dict(zip(call.differentiable, found, strict=False))


def test_every_operation_on_tokens_takes_a_mask():
    # These take one value per sequence.
    others = {"preference_loss", "kto_loss", "reward_model_loss", "group_advantages"}
    assert set(MASKED) == set(cases.OPERATIONS) - others


@pytest.mark.parametrize("op", MASKED)
def test_what_lies_under_the_mask_changes_nothing(backend, op):
    for call in _calls(op):
        results, gradients = _run(call, call.tensors)
        again, others = _run(call, _spoiled(call))
        for a, b in zip(results, again, strict=True):
            assert torch.equal(a, b), call.label
            if a.shape == MASK.shape:
                assert (b[~MASK] == 0).all() and b.isfinite().all(), call.label
        for name, g in gradients.items():
            assert (g is None) == (others[name] is None), call.label
            if g is None:
                continue
            assert torch.equal(g, others[name]), f"{call.label} {name}"
            if g.shape[:2] == MASK.shape:
                assert (g[~MASK] == 0).all(), f"{call.label} {name}"


@pytest.mark.parametrize("op", ("token_logprobs", "linear_token_logprobs"))
def test_a_masked_token_is_an_ignored_one(backend, op):
    for call in _calls(op):
        found = _run(call, call.tensors)
        tensors = {k: t for k, t in call.tensors.items() if k != "mask"}
        ignored = call.options.get("ignore_index", -100)
        tensors["labels"] = torch.where(MASK, tensors["labels"], ignored)
        expected = _run(call, tensors)
        for a, b in zip(found[0], expected[0], strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())


def test_ignored_labels_beyond_the_dtype_of_labels(backend):
    """The label of a masked token is not one that the dtype cuts short to a real one."""
    logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int32)
    expected = rk.token_logprobs(logits, labels, mask=MASK).logprobs
    found = rk.token_logprobs(logits, labels, mask=MASK, ignore_index=-(2**32)).logprobs
    assert torch.equal(found, expected) and (found[~MASK] == 0).all() and (found[MASK] < 0).all()


@pytest.mark.parametrize(
    ("function", "shapes", "like"),
    [
        (rk.token_logprobs, ((2, 3, 5), (2, 3)), "labels"),
        (rk.kl_divergence, ((2, 3, 5), (2, 3, 5)), "logits without V"),
        (rk.kl_penalty, ((2, 3), (2, 3)), "logprobs"),
        (rk.whiten, ((2, 3),), "x"),
    ],
)
def test_a_mask_of_another_shape_is_named(function, shapes, like):
    tensors = [torch.zeros(shape) for shape in shapes]
    if function is rk.token_logprobs:
        tensors[1] = tensors[1].long()
    with pytest.raises(ValueError, match=f"mask must have the shape of {like}, "):
        function(*tensors, mask=MASK[:, :2])


def test_the_head_multiplies_no_masked_token():
    """The row kernel is given the logits of kept tokens alone."""
    rows = []
    backend = backends.get("cpu")
    plain = backend.launchers["token_logprobs"]

    def counted(logits, *rest):
        rows.append(logits.shape[0])
        return plain(logits, *rest)

    counting = dataclasses.replace(
        backend, launchers={**backend.launchers, "token_logprobs": counted}
    )
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    before = backends.install(counting)
    try:
        with rk.use_backend("cpu"):
            result = rk.linear_token_logprobs(hidden, weight, labels, mask=MASK)
    finally:
        backends.install(before)
    assert rows == [int(MASK.sum())]
    assert (result.logprobs[MASK] < 0).all()
