"""Every argument of every operation, given what it is not: an error of ours that names it."""

import dataclasses
import inspect
import math

import numpy
import pytest
import torch

from tests.cases import calls as cases
from tests.cases.combinations import covering, products

import rlhf_kernels as rk

BACKENDS = ("reference", "cpu")
X = torch.ones(cases.B, cases.T)
#: What no argument takes that is a tensor.
NO_TENSORS = {
    "list": [[1.0]],
    "numpy array": numpy.ones((cases.B, cases.T)),
    "text": "x",
    "sparse": X.to_sparse(),
    "complex": X.to(torch.complex64),
    "quantised": torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
    "nested": torch.nested.nested_tensor([X[0], X[1]]),
    "float8": X.to(torch.float8_e4m3fn),
}
NO_NUMBERS = {
    "text": "1",
    "bool": True,
    "list": [1.0],
    "complex": 1j,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "nan": float("nan"),
    "inf": float("inf"),
    "numpy array": numpy.ones(2),
}
NO_NUMBERS["nested"] = torch.nested.nested_tensor([X[0], X[1]])
NO_INTEGERS = {
    "None": None,
    "-100.0": -100.0,
    "2**70": 2**70,
    "-2**70": -(2**70),
    "10**5000": 10**5000,
    "bool": True,
    "text": "-100",
    "numpy float": numpy.float32(3),
    "tensor of floats": torch.tensor(3.0),
    "two": torch.tensor([1, 2]),
}
NO_FLAGS = {"text": "yes", "None": None, "2": 2, "tensor": torch.tensor([True, False])}
NO_NAMES = {"None": None, "text": "no such", "1": 1, "list": ["k1"], "array": numpy.ones(2)}

INTEGERS = ("ignore_index", "chunk_tokens")
# Options of their own kinds.
OTHERS = ("config", "group", "support", "loss_weights")


def _bad_values(call, name):
    """Values by name that the argument `name` of the call must refuse."""
    annotation = str(inspect.signature(getattr(rk, call.op)).parameters[name].annotation)
    if annotation == str(bool):
        return NO_FLAGS
    if name in INTEGERS:
        optional = "None" in annotation
        return {k: v for k, v in NO_INTEGERS.items() if not (optional and v is None)}
    # "same" or a number is no name.
    if "Literal" in annotation and "float" not in annotation:
        optional = "Optional" in annotation or "None" in annotation
        return {k: v for k, v in NO_NAMES.items() if not (optional and v is None)}
    if "Tensor" in annotation and name not in (
        "normalizer",
        "temperature",
        "margin",
        "groups",
        "kl",
        "gamma",
        "lam",
        "value_lam",
    ):
        optional = "None" in annotation
        bad = NO_TENSORS if optional else NO_TENSORS | {"None": None}
        return bad | ({"0-d": torch.tensor(1)} if name != "x" else {})
    if name == "groups":
        bad = NO_INTEGERS | {"sparse": NO_TENSORS["sparse"], "None": None}
        # The ids of two sequences.
        return {k: v for k, v in bad.items() if call.op == "group_advantages" or k != "two"}
    bad = NO_NUMBERS | {"sparse": NO_TENSORS["sparse"], "complex tensor": torch.tensor(1j)}
    return bad if "None" in annotation else bad | {"None": None}


def _arguments(call):
    signature = inspect.signature(getattr(rk, call.op)).parameters
    return [name for name in signature if name not in OTHERS]


def _richest(op):
    """The call with the most tensors: each argument is then looked at."""
    found = cases.calls(op, covering if op.endswith("policy_loss") else products)
    return max(found, key=lambda c: len(c.tensors) - 10 * ("indptr" in c.tensors))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_a_wrong_argument_is_named(op, name):
    plain = op in cases.PLAIN
    tried = 0
    with rk.use_backend("auto" if plain else name):
        call = _richest(op)
        call.run(call.tensors)
        for argument in _arguments(call):
            for label, value in _bad_values(call, argument).items():
                given = {**call.tensors, **call.options, argument: value}
                case = f"{op} {argument}={label}"
                try:
                    getattr(rk, op)(**given)
                except (TypeError, ValueError) as error:
                    text = str(error)
                    assert text.startswith(f"{op}: "), f"{case}: {text}"
                    assert argument in text, f"{case}: {text}"
                    assert "incompatible" not in text, f"{case}: {text}"
                    tried += 1
                else:
                    raise AssertionError(f"{case} was accepted")
    assert tried > 5


@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_another_device_is_named(op):
    call = _richest(op)
    for argument, value in list(call.tensors.items())[1:]:
        given = {**call.tensors, **call.options, argument: value.to("meta")}
        if argument == "normalizer":
            continue
        with pytest.raises(ValueError, match=f"{argument} must be on .* device cpu, got meta"):
            getattr(rk, op)(**given)


def test_numbers_are_what_torch_takes_for_one():
    x = torch.randn(2, 3)
    expected = rk.gae(x, x, gamma=0.5, lam=0.25)
    for half, quarter in (
        (numpy.float32(0.5), numpy.float64(0.25)),
        (numpy.float16(0.5), torch.tensor(0.25)),
        (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25).bfloat16()),
    ):
        for name in BACKENDS:
            with rk.use_backend(name):
                found = rk.gae(x, x, gamma=half, lam=quarter)
            torch.testing.assert_close(found, expected)
    logits, labels = torch.randn(2, 5), torch.tensor([1, 3])
    skipped = rk.token_logprobs(logits, labels, ignore_index=3).logprobs
    for index in (numpy.int64(3), numpy.uint8(3), torch.tensor(3), torch.tensor(3).int()):
        found = rk.token_logprobs(logits, labels, ignore_index=index, entropy=numpy.bool_(False))
        assert torch.equal(found.logprobs, skipped) and found.entropy is None
    with pytest.raises(
        TypeError, match=r"gamma must be a number, got a tensor .* needs a gradient"
    ):
        rk.gae(x, x, gamma=torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("large", [2**70, 1e308])
def test_large_numbers_are_numbers(name, large):
    """An integer that 64 bits do not hold is the number that it is; so is a bound beyond fp32."""
    x, mask = torch.tensor([[-0.5, -1.0, -2.0]]), torch.ones(1, 3, dtype=torch.bool)
    old = x - 0.25
    ratio = math.exp(0.25)
    with rk.use_backend(name):
        loss = rk.policy_loss(x, old, torch.ones(1, 3), mask=mask, normalizer=large)[0]
        torch.testing.assert_close(loss.double(), torch.tensor(-3 * 1.2 / large).double())
        kept = rk.ppo_advantages(
            torch.tensor([7.0]), x, None, x, mask=mask, reward_clip=large, whiten=False
        )
        torch.testing.assert_close(kept.rewards, torch.tensor([[0.0, 0.0, 7.0]]))
        config = rk.PolicyLossConfig(normalizer=large)
        assert rk.policy_loss(x, old, torch.ones(1, 3), mask=mask, config=config)[0] == loss
        half = rk.value_loss(x, old, x + 1, mask=mask, normalizer=large)[0]
        torch.testing.assert_close(half.double(), torch.tensor(1.5 / large).double())
        loss = rk.value_loss(x, old, x, mask=mask, clip_range=large)[0]
        assert loss == 0
        assert torch.equal(rk.whiten(x, eps=large).abs() < 1e-9, mask)
        config = rk.PolicyLossConfig(clip_low=None, clip_high=large)
        loss = rk.policy_loss(x, old, torch.ones(1, 3), mask=mask, config=config)[0]
        torch.testing.assert_close(loss, torch.tensor(-ratio))
    if large == 2**70:
        kl = rk.ppo_advantages(torch.zeros(1), x, old, x, mask=mask, kl_coef=large, whiten=False)
        torch.testing.assert_close(kl.rewards, torch.full((1, 3), -0.25 * large))
        found = rk.reward_model_loss(torch.zeros(2), torch.ones(2), margin=large)[0]
        torch.testing.assert_close(found, torch.tensor(float(large)))
        assert rk.preference_loss(*torch.tensor([[1.0], [0.0], [0.0], [0.0]]), beta=large)[0] == 0


def test_numbers_of_a_configuration_are_named():
    for field in dataclasses.fields(rk.PolicyLossConfig):
        if not isinstance(field.default, str | bool) and "aggregation" not in field.name:
            for bad in (10**400, -(10**400), 10**5000):
                try:
                    rk.PolicyLossConfig(**{field.name: bad})
                except ValueError as error:
                    assert str(error).startswith("PolicyLossConfig: "), error
                else:  # a clamp may be as wide as one likes
                    assert "clamp" in field.name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_bad_normalizer_tensor_names_the_operation_called(name, bad):
    call = _richest("linear_policy_loss")
    given = {**call.tensors, **call.options, "normalizer": torch.tensor(bad)}
    with rk.use_backend(name), pytest.raises(ValueError, match=r"^linear_policy_loss: normalizer"):
        rk.linear_policy_loss(**given)


@pytest.mark.parametrize("name", BACKENDS)
def test_groups_and_supports_are_named(name):
    logits, labels = torch.randn(2, 5), torch.tensor([1, 3])
    with rk.use_backend(name):
        for bad in ("x", 0, [labels], torch.ones(2)):
            with pytest.raises(TypeError, match="token_logprobs: support"):
                rk.token_logprobs(logits, labels, support=bad)
            with pytest.raises(TypeError, match="token_logprobs: group"):
                rk.token_logprobs(logits, labels, group=bad)
        with pytest.raises(TypeError, match="support indptr must be a Tensor"):
            rk.token_logprobs(logits, labels, support=(None, labels))
