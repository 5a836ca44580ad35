"""Products of 16-bit operands into fp32, whether this torch has them or not."""

import pytest
import torch

from rlhf_kernels.head import products

CALLS = {"mm": torch.mm, "addmm": torch.addmm}


@pytest.fixture(params=[True, False], ids=["out_dtype", "no out_dtype"])
def signature(request, monkeypatch):
    """torch.mm and torch.addmm with the argument out_dtype, done in fp32, or without it."""
    seen = []

    def mixed(name):
        def call(*operands, out_dtype=None, out=None, **options):
            seen.append((name, out_dtype))
            if out_dtype is not None:
                assert request.param, "a torch before 2.8 has no out_dtype"
                operands = [t.to(out_dtype) for t in operands]
            return CALLS[name](*operands, out=out, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(torch, name, mixed(name))
    monkeypatch.setattr(products, "_MIXED_PRODUCTS", request.param)
    monkeypatch.setattr(products, "_WIDE_ROWS", 3)
    return request.param, seen


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_into_fp32(signature, dtype, add):
    a, b = torch.randn(5, 4).to(dtype), torch.randn(7, 4).to(dtype).T
    # What is not to be added to must not be read.
    out = torch.randn(5, 7) if add else torch.full((5, 7), torch.nan)
    expected = a.double() @ b.double() + (out if add else 0)
    products.matmul_into(out, a, b, add)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    mixed, seen = signature
    assert seen == ([("addmm" if add else "mm", torch.float32)] if mixed else [("addmm", None)] * 3)


@pytest.mark.parametrize("add", [False, True])
def test_operands_of_one_dtype_need_neither(signature, add):
    a, b, out = torch.randn(5, 4), torch.randn(4, 7), torch.randn(5, 7)
    expected = a @ b + (out if add else 0)
    products.matmul_into(out, a, b, add)
    torch.testing.assert_close(out, expected)
    assert [dtype for _, dtype in signature[1]] == [None]


def test_detection_follows_the_version_of_torch():
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    assert products._MIXED_PRODUCTS == (version >= (2, 8))
