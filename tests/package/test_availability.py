"""`supports` says what a call does."""

import dataclasses
import warnings

import pytest
import torch

from tests.run_python import BLOCK_EXTENSION, run_python

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends, triton
from rlhf_kernels.ops import _calls
from rlhf_kernels.ops._availability import OPERATION_NAMES, Support

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2)


def _call(function, dtype, device):
    inputs = _calls.Inputs(
        rows=2, size=4, dtype=torch.float32, device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0), vocabulary=8,
    )  # fmt: skip
    call = _calls.example(function, inputs)
    own = {k: t.to(dtype) if t.is_floating_point() else t for k, t in call.tensors.items()}
    return call.run({k: t.detach().to(device) for k, t in own.items()})


def test_names_are_those_of_the_operations():
    assert sorted(OPERATION_NAMES) == sorted(f.__name__ for f in _calls.OPERATIONS)


@pytest.mark.parametrize("name", ("auto", "reference", "cpu"))
@pytest.mark.parametrize("function", _calls.OPERATIONS, ids=lambda f: f.__name__)
def test_what_is_said_is_what_a_call_does(function, name, monkeypatch):
    served = []
    chosen = backends.chosen
    monkeypatch.setattr(
        backends, "chosen", lambda *args: served.append(found := chosen(*args)) or found
    )
    with rk.use_backend(name):
        for dtype in DTYPES:
            said = rk.supports(function.__name__, dtype=dtype)
            served.clear()
            if said.backend is None:
                with pytest.raises((TypeError, RuntimeError, ValueError)):
                    _call(function, dtype, "cpu")
                continue
            _call(function, dtype, "cpu")
            assert {*served} <= {said.backend}
            assert (said.reason is None) == (said.backend == "cpu")
        expected = "reference" if name == "reference" else "cpu"
        plain = not hasattr(torch.ops.rlhf_kernels, function.__name__)
        assert rk.supports(function.__name__).backend == ("torch" if plain else expected)


def test_reasons():
    assert rk.supports("gae") == rk.supports("gae", device=torch.device("cpu")) == ("cpu", None)
    assert rk.supports("kto_loss").reason == "it is a few lines of torch"
    assert rk.supports("gae", device="meta") == (
        "reference", "no backend has kernels for meta tensors",
    )  # fmt: skip
    found = rk.supports("gae", dtype=torch.float64)
    assert found == Support(None, "cpu takes float32, bfloat16, float16, not float64")
    with rk.use_backend("reference"):
        assert rk.supports("gae", dtype=torch.float64) == (
            "reference", "the reference backend is selected by name",
        )  # fmt: skip
    with rk.use_backend("cpu"):
        found = rk.supports("token_logprobs", device="cuda")
        assert found.backend is None and found.reason.endswith("'cpu' does not serve cuda tensors")


def test_a_backend_without_the_operation_leaves_it_to_the_next(monkeypatch):
    cpu = backends.get("cpu")
    fewer = {k: v for k, v in cpu.launchers.items() if k != "token_logprobs"}
    before = backends.install(dataclasses.replace(cpu, launchers=fewer))
    try:
        expected = Support("reference", "cpu: it lacks this operation")
        # A head has no kernel of its own: it needs the kernel of rows.
        assert rk.supports("token_logprobs") == rk.supports("linear_policy_loss") == expected
        assert rk.supports("gae").backend == "cpu"
    finally:
        backends.install(before)


@pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter")
def test_the_interpreter_serves_what_it_is_asked_for():
    with rk.use_backend("triton"):
        assert rk.supports("policy_loss") == ("triton", None)


def test_a_question_warns_of_nothing_and_keeps_the_warning_of_a_call():
    code = (
        BLOCK_EXTENSION
        + """
import warnings, torch
import rlhf_kernels as rk
with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = rk.supports("gae")
assert found.backend == "reference", found
assert found.reason.startswith("cpu: extension _cpu could not be imported"), found
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    rk.gae(torch.zeros(1, 2), torch.zeros(1, 2))
assert "backend 'cpu' is not available" in str(said[0].message)
"""
    )
    run_python("-c", code)


@pytest.mark.parametrize("arguments, error, sentence", [
    (("dpo_loss",), ValueError, "supports: op must be one of .*token_logprobs"),
    ((None,), ValueError, "supports: op must be one of"),
    (("gae", torch.int32), ValueError, "supports: dtype must be floating, got torch.int32"),
    (("gae", "float32"), TypeError, "supports: dtype must be a torch.dtype, got str"),
])  # fmt: skip
def test_what_is_no_operation_or_dtype(arguments, error, sentence):
    op, *dtype = arguments
    with pytest.raises(error, match=sentence):
        rk.supports(op, **dict(zip(["dtype"], dtype, strict=False)))
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        rk.supports("gae", device="abacus")
