"""How native code reads a tensor: what it copies, what it refuses, what it finds plainly good."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.core import checks
from rlhf_kernels.kernels import native
from rlhf_kernels.kernels.native.boundary import DTYPE_CODES

cpu = native.module("cpu")
pytestmark = pytest.mark.skipif(cpu is None, reason="needs the CPU extension")

A, B, C = 2, 3, 4
PLAIN = torch.arange(A * B * C, dtype=torch.float32).reshape(A, B, C) / 7


@pytest.fixture(params=["as torch offers", "by attributes"], autouse=True)
def reading(request):
    """Both ways to read a tensor: by the DLPack interface of a new torch, and without it."""
    if request.param == "by attributes":
        cpu.learn_torch(int, int, DTYPE_CODES)  # a type that has no such interface
    yield request.param
    cpu.learn_torch(torch.Tensor, torch.nn.Parameter, DTYPE_CODES)


def penalty(x, out=None):
    """kl_penalty k1 of x against 0, which is x, over its shape as a grid."""
    out = torch.empty(x.shape) if out is None else out
    cpu.kl_penalty(x, torch.zeros(x.shape), 0, out, 1)
    return out


# Every one has the values of PLAIN.
LAYOUTS = {
    "contiguous": PLAIN.clone(),
    "transposed": PLAIN.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "rows that are no grid": PLAIN.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": torch.stack([PLAIN, -PLAIN], -1)[..., 0],
    "cut": torch.cat([PLAIN, PLAIN], -1)[..., :C],
    "negated": (-PLAIN)._neg_view(),
    "negated rows that are no grid": (-PLAIN)
    .transpose(0, 1)
    .contiguous()
    .transpose(0, 1)
    ._neg_view(),
    "with ones": PLAIN[:, None, :, None].expand(A, 1, B, 1, C).reshape(A, 1, B, 1, C).squeeze(3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_of_any_layout_is_its_values(layout):
    found = penalty(LAYOUTS[layout])
    assert torch.equal(found.reshape(A, B, C), PLAIN)


def test_a_broadcast_input_is_read_where_it_lies():
    row = PLAIN[0, 0]
    assert torch.equal(penalty(row.expand(A, B, C)), row.expand(A, B, C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_told_apart(dtype):
    assert torch.equal(penalty(PLAIN.to(dtype)), PLAIN.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_dtypes_of_masks_are_told_apart(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    x, out = torch.ones(2, 3), torch.empty(2, 3)
    cpu.whiten(x, mask, False, True, 1.0, out, 1)
    assert torch.equal(out, mask.float())


@pytest.mark.parametrize("parameter", [False, True])
def test_a_tensor_that_needs_a_gradient_is_read(parameter):
    x = torch.nn.Parameter(PLAIN.clone()) if parameter else PLAIN.clone().requires_grad_()
    assert torch.equal(penalty(x), PLAIN)


def test_a_view_is_read_from_where_it_starts():
    assert torch.equal(penalty(torch.cat([PLAIN, PLAIN + 1])[A:]), PLAIN + 1)


def test_a_tensor_of_no_dimension_is_one_token():
    assert penalty(torch.tensor(3.0)).item() == 3.0


@pytest.mark.parametrize("layout", ["rows that are no grid", "negated"])
def test_a_result_is_never_written_to_a_copy(layout):
    with pytest.raises(ValueError, match="result"):
        penalty(PLAIN, LAYOUTS[layout].clone(memory_format=torch.preserve_format)
                if layout != "negated" else LAYOUTS[layout])  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.empty(2, 3, device="meta"), (ValueError, RuntimeError), "memory|storage|pointer"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(2, 3, dtype=torch.int16), TypeError, "int16"),
        ([1.0, 2.0], AttributeError, "shape"),
    ],
)
def test_what_is_no_tensor_for_a_kernel_is_refused(bad, error, message):
    with pytest.raises(error, match=message):
        cpu.kl_penalty(bad, torch.zeros(2, 3), 0, torch.empty(2, 3), 1)


X, LABELS, MASK = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3).bool()
ROWS = torch.zeros(2, 3, 5)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("kinds", "tensors"),
    [
        ("f", [X]),
        ("ff", [X.bfloat16(), torch.nn.Parameter(X.half())]),
        ("fFfM", [X, None, X.t().contiguous().t(), None]),
        ("fm", [X, MASK]),
        ("fmm", [X, MASK.to(torch.uint8), MASK.to(torch.int16)]),
        ("rl", [ROWS, LABELS]),
        ("rl", [ROWS[0, 0], LABELS[0, 0].int()]),
    ],
)
def test_good_arguments_are_plain_where_torch_tells(kinds, tensors, reading):
    told = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and reading == "as torch offers"
    assert cpu.plain(kinds, *tensors) is told


@pytest.mark.parametrize(
    ("kinds", "tensors"),
    [
        ("f", [X.double()]),
        ("f", [X.to(torch.complex64)]),
        ("f", [LABELS]),
        ("f", [X.to(torch.float8_e4m3fn)]),
        ("fl", [X, LABELS.to(torch.int16)]),
        ("fl", [X, X]),
        ("fm", [X, X]),
        ("ff", [X, X[:1]]),
        ("ff", [X, X[0]]),
        ("ff", [X, None]),
        ("Ff", [None, X]),
        ("ff", [X]),
        ("rl", [ROWS, LABELS[:, :2]]),
        ("rl", [X[0, 0], LABELS]),
        ("ff", [X, X.as_subclass(Subclass)]),
        ("ff", [X, X.to_sparse()]),
        ("f", [X.to("meta")]),
        ("f", [torch.nested.nested_tensor([X])]),
        ("f", [[0.0]]),
        ("?", [X]),
    ],
)
def test_what_a_check_would_refuse_or_convert_is_not_plain(kinds, tensors):
    assert not cpu.plain(kinds, *tensors)


def test_nothing_is_plain_within_a_transform_or_if_it_is_fake():
    from torch._subclasses import FakeTensorMode

    seen = []
    torch.func.vmap(lambda x: seen.append(cpu.plain("f", x)) or x)(X)
    torch.func.grad(lambda x: seen.append(cpu.plain("f", x)) or x.sum())(X)
    with FakeTensorMode() as mode:
        seen.append(cpu.plain("f", mode.from_tensor(X)))
    assert seen == [False] * 3


def test_results_are_the_same_where_no_argument_is_plain(monkeypatch):
    """The checks one by one find the same arguments good."""
    calls = [
        lambda: rk.token_logprobs(ROWS, LABELS, entropy=True),
        lambda: rk.policy_loss(X, X, X, MASK),
        lambda: rk.value_loss(X, X, X + 1, MASK),
        lambda: rk.gae(X + 1, X, mask=MASK),
        lambda: rk.ppo_advantages(X[:, 0], X, X, X + 1, MASK),
    ]
    with rk.use_backend("cpu"):
        found = [call() for call in calls]
        monkeypatch.setattr(checks, "_plain", None)
        again = [call() for call in calls]
    for a, b in zip(found, again, strict=True):
        for x, y in zip(a, b, strict=True):
            x, y = (getattr(t, "tensor", t) for t in (x, y))
            assert x is y is None or torch.equal(x, y)
