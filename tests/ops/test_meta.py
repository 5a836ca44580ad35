"""Tensors of the meta device: shapes and dtypes as of any other, or an error that names them."""

import inspect

import pytest
import torch

from tests.cases import calls as cases

import rlhf_kernels as rk


def on_meta(call):
    return {
        k: t.to("meta").requires_grad_(k in call.differentiable) for k, t in call.tensors.items()
    }


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_results_and_gradients_are_those_of_any_device(op, name):
    for call in cases.calls(op):
        with rk.use_backend(name):
            tensors = on_meta(call)
            found = cases.outputs(call.run(tensors))
            expected = cases.outputs(call.run(call.tensors))
        kinds = [(t.shape, t.dtype, "meta") for t in expected]
        assert [(t.shape, t.dtype, t.device.type) for t in found] == kinds, call.label
        losses = [t.sum() for t in found if t.requires_grad]
        assert bool(losses) == bool(call.differentiable)
        if losses:
            sum(losses).backward()
            for key in call.differentiable:
                assert tensors[key].grad.shape == tensors[key].shape, f"{call.label}: {key}"


@pytest.mark.parametrize("op", [op for op in cases.OPERATIONS if op not in cases.PLAIN])
def test_a_backend_by_name_refuses_them(op, backend):
    if backend == "reference":
        return
    for call in cases.calls(op):
        message = f"^{op}: backend '{backend}' does not serve meta tensors"
        with pytest.raises(RuntimeError, match=message):
            call.run(on_meta(call))


@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_one_among_others_is_named(op):
    for call in cases.calls(op):
        first, *rest = call.tensors
        for name in rest:
            pattern = f"^{op}: .*{'support ' if name.startswith('ind') else ''}{name} must be on"
            with pytest.raises(ValueError, match=f"{pattern} .* device cpu, got meta"):
                call.run({**call.tensors, name: call.tensors[name].to("meta")})
        if not rest:
            continue
        with pytest.raises(ValueError, match=f"^{op}: .* must be on .* device meta, got cpu"):
            call.run({k: t.to("meta") if k == first else t for k, t in call.tensors.items()})


@pytest.mark.parametrize("op", cases.OPERATIONS)
def test_a_number_on_it_is_no_number(op):
    call = cases.calls(op)[0]
    for name, parameter in inspect.signature(getattr(rk, op)).parameters.items():
        kind = str(parameter.annotation)
        if not ("int" in kind or "float" in kind) or name in call.tensors:
            continue
        number = torch.tensor(1, device="meta") if "int" in kind else torch.tensor(1.0).to("meta")
        given = {**call.tensors, **call.options, name: number}
        given = {k: v for k, v in given.items() if k not in ("indptr", "indices")}
        with pytest.raises((TypeError, ValueError), match=f"^{op}: {name} must .*meta"):
            getattr(rk, op)(**given)
