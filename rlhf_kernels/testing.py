"""Tools to test the operations, and code built on them: fp64 oracles and error budgets.

The budget: an element's error against the fp64 oracle may be at most twice the error of plain torch
in the working dtype plus one rounding. The additional rounding is needed where plain torch happens
to be exact: a kernel that is not worse would fail.

Matrix products have another budget. GEMMs round differently on different machines, so the bound of
an element is computed from its operands (`product_bound`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import backends
from .ops import _calls

# Lengths around the kernels' boundaries: a lane, a vector less one, unrolled steps, a block.
RAGGED_SIZES = (1, 7, 31, 127, 257, 4096, 4099, 8200)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Roundings by which `check_operation` lets an element be off. Coarse: the tests allow far less.
ROUNDINGS = 64


def generator(seed: int) -> torch.Generator:
    """A seeded generator on the default device; it can only make tensors on that device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def to_float64(value: Any) -> Any:
    """`value` with every floating tensor as fp64, detached, with the same requires_grad."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, tuple | list):
        return type(value)(to_float64(v) for v in value)
    if isinstance(value, dict):
        return {k: to_float64(v) for k, v in value.items()}
    return value


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    torch_result: Tensor,
    *,
    scale: Tensor | float = 0.0,
    factor: float = 2.0,
) -> None:
    """Requires |actual - oracle| <= factor * (|torch_result - oracle| + one rounding), per element.

    Args:
        actual: result under test; its dtype sets the size of one rounding.
        oracle: fp64 result on the same inputs. NaN and infinities must match exactly.
        torch_result: plain torch in the working dtype on the same inputs.
        scale: magnitude of intermediate values whose difference is `actual` (max(|x_y - m|, log V)
            for a log-probability), if it is larger than that of the result.
        factor: allowed multiple.

    Raises:
        AssertionError: names the position, the three values and the budget of the worst element.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    a, t = actual.detach().double(), torch_result.detach().double()
    o = oracle.detach().double()
    finite = o.isfinite()
    same = (a == o) | (a.isnan() & o.isnan())
    if not bool((same | finite).all()):
        at = int((~(same | finite)).reshape(-1).nonzero()[0])
        raise AssertionError(f"at {at}: {a.reshape(-1)[at]}, expected {o.reshape(-1)[at]}")
    info = torch.finfo(actual.dtype)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=o.device).detach()
    magnitude = torch.maximum(o.abs(), scale.expand_as(o))
    one_rounding = info.eps * magnitude + info.smallest_normal
    # A torch result that overflowed does not enlarge the budget.
    torch_error = torch.where(t.isfinite(), (t - o).abs(), 0.0)
    excess = (a - o).abs() - factor * (torch_error + one_rounding)
    excess = torch.where(finite, torch.where(a.isfinite(), excess, torch.inf), -torch.inf)
    if excess.numel() and float(excess.max()) > 0:
        at = int(excess.argmax())
        raise AssertionError(
            f"at flat position {at}: got {a.reshape(-1)[at]:.9g}, fp64 {o.reshape(-1)[at]:.9g}, "
            f"torch {t.reshape(-1)[at]:.9g}; error {(a - o).abs().reshape(-1)[at]:.3g} over budget "
            f"by {float(excess.max()):.3g}"
        )


#: c of `product_bound`. The sum of n products rounds n times, by at most eps / 2 of the sum so far.
#: Roundings have random signs and add up as a random walk. Their sum stays below
#: eps * sqrt(n) / 2 * (|a| @ |b|), and far below if terms cancel or a library sums in blocks, as
#: every GEMM does. 4 covers the worst such walk in a block of 64 terms of the same sign.
PRODUCT_ROUNDINGS = 4.0


def product_bound(
    a: Tensor,
    b: Tensor,
    *,
    a_error: Tensor | None = None,
    b_error: Tensor | None = None,
    c: float = PRODUCT_ROUNDINGS,
) -> Tensor:
    """Bound of |got - a @ b| per element: c * eps * (|a| @ |b|), for sums in float32.

    The error of a computed operand is multiplied by the other operand and added. The rounding of a
    result to 16 bits is part of `assert_within_bound`.

    Args:
        a: [..., n, k], exact values.
        b: [..., k, m], exact values.
        a_error: bound of the error of a, with its shape; None for an input.
        b_error: bound of the error of b, with its shape; None for an input.
        c: roundings; see PRODUCT_ROUNDINGS.

    Returns:
        The bounds [..., n, m], float64.
    """
    a, b = a.detach().double().abs(), b.detach().double().abs()
    bound = c * torch.finfo(torch.float32).eps * (a @ b)
    if a_error is not None:
        bound = bound + a_error.double() @ b
    if b_error is not None:
        bound = bound + a @ b_error.double()
    return bound


def assert_within_bound(actual: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Requires |actual - exact| <= bound + one rounding to the dtype of `actual`, per element.

    Args:
        actual: result under test.
        exact: float64 result on the same inputs. NaN and infinities must match exactly.
        bound: bound of the error before the last rounding, broadcast to the result's shape.

    Raises:
        AssertionError: names the position, the two values and the bound of the worst element.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    info = torch.finfo(actual.dtype)
    a, e = actual.detach().double(), exact.detach().double()
    bound = torch.as_tensor(bound, dtype=torch.float64, device=e.device).detach().expand_as(e)
    # The last rounding is half a unit in the last place; subnormal numbers share the smallest unit.
    allowed = bound + info.eps / 2 * (e.abs() + bound) + info.eps * info.smallest_normal
    same = (a == e) | (a.isnan() & e.isnan())
    excess = torch.where(same, 0.0, (a - e).abs() / allowed)
    # A bound of NaN counts as exceeded.
    known = a.isfinite() & e.isfinite() & ~excess.isnan()
    excess = torch.where(same | known, excess, torch.inf)
    if excess.numel() and float(excess.max()) > 1:
        at = int(excess.argmax())
        raise AssertionError(
            f"at flat position {at} of {tuple(a.shape)}: got {a.reshape(-1)[at]:.9g}, exact "
            f"{e.reshape(-1)[at]:.9g}; error {(a - e).abs().reshape(-1)[at]:.3g}, bound "
            f"{allowed.reshape(-1)[at]:.3g}; {int((excess > 1).sum())} elements beyond theirs"
        )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Requires the same shape, dtype and bits (NaN equals NaN of the same bits).

    Raises:
        AssertionError: names the first differing position and both values.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} "
            f"{expected.dtype}"
        )
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    view = views[actual.element_size()]
    a = actual.detach().contiguous().view(view).reshape(-1)
    e = expected.detach().contiguous().view(view).reshape(-1)
    differs = a != e
    if bool(differs.any()):
        at = int(differs.nonzero()[0])
        raise AssertionError(
            f"{int(differs.sum())} of {a.numel()} elements differ in bits, first at flat position "
            f"{at}: {actual.detach().reshape(-1)[at].item()!r}, expected "
            f"{expected.detach().reshape(-1)[at].item()!r}"
        )


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` w.r.t. the inputs that require grad.

    Args:
        function: returns one tensor or several.
        inputs: the arguments of the function.
        upstream: one gradient per output; ones if None.

    Returns:
        One gradient per input that requires grad, zeros if autograd has none.
    """
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if upstream is None:
        upstream = tuple(torch.ones_like(o) for o in outputs)
    wanted = tuple(i for i in inputs if i.requires_grad)
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs],
        wanted,
        [g.to(o.dtype) for o, g in pairs],
        allow_unused=True,
        materialize_grads=True,
    )


def random_mask(rows: int, cols: int, *, keep: float = 0.7, seed: int = 0) -> Tensor:
    """A bool mask [rows, cols] with gaps inside rows; the last row is all False if rows > 2."""
    mask = torch.rand(rows, cols, generator=generator(seed)) < keep
    if rows > 2:
        mask[-1] = False
    return mask


def check_operation(
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    size: int = 1031,
) -> dict[str, Any]:
    """Compares an operation, forward and gradient, with its reference in fp64 on the same inputs.

    Args:
        function: a public operation, such as `rlhf_kernels.gae`.
        device: device of the tensors.
        dtype: dtype of the floating inputs.
        size: tokens of a row, or the vocabulary of an operation on logits or a head.

    Returns:
        operation, device, dtype, `error` (the largest, in roundings of the result's dtype, or of
        the logits' where a product makes them, at its largest magnitude; None where a result is
        not finite), ok, and a message where the operation raised or gave what is not finite.
    """
    result: dict[str, Any] = {
        "operation": function.__name__,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "error": None,
        "ok": False,
    }
    inputs = _calls.Inputs(5, size, dtype, device, torch.Generator().manual_seed(0))
    # On CPU the library rounds logits of 16-bit operands to 16 bits.
    product = torch.finfo(dtype).eps if function.__name__.startswith("linear_") else 0.0
    try:
        errors = []
        for call in _calls.examples(function, inputs):
            actual = _calls.results(call)
            exact = call._replace(tensors=to_float64(call.tensors))
            with backends.use_backend(backends.REFERENCE):
                expected = _calls.results(exact)
            for a, e in zip(actual, expected, strict=True):
                unit = max(torch.finfo(a.dtype).eps, product) * max(1.0, float(e.abs().max()))
                errors.append(float((a.double() - e).abs().max()) / unit)
        if all(map(math.isfinite, errors)):
            result["error"] = round(max(errors), 2)
        else:
            result["message"] = "a result is not finite"
        # max(errors) could miss a NaN, depending on its position.
        result["ok"] = all(error <= ROUNDINGS for error in errors)
    except Exception as error:
        # The report states what is broken instead of aborting.
        result["message"] = f"{type(error).__name__}: {error}"
    return result
