"""How native code reads a tensor: what it copies, and what it refuses."""

import pytest
import torch

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
    yield
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
    x, out, moments = torch.ones(2, 3), torch.empty(2, 3), torch.empty(6, dtype=torch.float64)
    cpu.whiten(x, mask, False, True, 1.0, moments, out, 1)
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
