"""The products of a head by each library, and of 16-bit operands into fp32 by each torch."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.head import gemm

CALLS = {"mm": torch.mm, "addmm": torch.addmm}


@pytest.fixture(params=["sums", "products", None], ids=["2.11", "2.8", "2.6"])
def signature(request, monkeypatch):
    """torch.mm and torch.addmm with the argument out_dtype, done in fp32, or without it.

    "products": addmm adds to a tensor of the operands' dtype alone.
    """
    seen = []

    def mixed(name):
        def call(*operands, out_dtype=None, out=None, **options):
            seen.append((name, out_dtype))
            if out_dtype is not None:
                assert request.param, "a torch before 2.8 has no out_dtype"
                same = operands[0].dtype == operands[-1].dtype
                assert same or request.param == "sums", "self and mat2 must have the same dtype"
                operands = [t.to(out_dtype) for t in operands]
            return CALLS[name](*operands, out=out, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(torch, name, mixed(name))
    monkeypatch.setattr(gemm, "_MIXED_PRODUCTS", request.param is not None)
    monkeypatch.setattr(gemm, "_MIXED_SUMS", request.param == "sums")
    monkeypatch.setattr(gemm, "_WIDE_ROWS", 3)
    monkeypatch.setattr(gemm, "_SUMMED_ROWS", 2)
    return request.param, seen


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_into_fp32(signature, dtype, add):
    a, b = torch.randn(5, 4).to(dtype), torch.randn(7, 4).to(dtype).T
    # What is not to be added to must not be read.
    out = torch.randn(5, 7) if add else torch.full((5, 7), torch.nan)
    expected = a.double() @ b.double() + (out if add else 0)
    gemm.matmul_into(out, a, b, add)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    mixed, seen = signature
    whole, parts = [("addmm" if add else "mm", torch.float32)], [("mm", torch.float32)] * 3
    by_torch = {"sums": whole, "products": parts if add else whole, None: [("addmm", None)] * 3}
    assert seen == by_torch[mixed]


@pytest.mark.parametrize("add", [False, True])
def test_operands_of_one_dtype_need_neither(signature, add):
    a, b, out = torch.randn(5, 4), torch.randn(4, 7), torch.randn(5, 7)
    expected = a @ b + (out if add else 0)
    gemm.matmul_into(out, a, b, add)
    torch.testing.assert_close(out, expected)
    assert [dtype for _, dtype in signature[1]] == [None]


def test_detection_follows_the_version_of_torch():
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    assert gemm._MIXED_PRODUCTS == (version >= (2, 8))
    assert gemm._MIXED_SUMS == (version >= (2, 11))


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch.mm"])
def library(request, monkeypatch):
    """All products that oneDNN can do by oneDNN, in small blocks, or none; counts its calls."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    calls, linear = [], gemm._linear
    operations = frozenset(("logits", "hidden")) if request.param else frozenset()
    monkeypatch.setattr(gemm, "_onednn_operations", lambda: operations)
    monkeypatch.setattr(gemm, "_linear", lambda x, w: calls.append(x.shape) or linear(x, w))
    monkeypatch.setattr(gemm, "_COPIED_BYTES", 0)
    monkeypatch.setattr(gemm, "_COPIED_ROWS", 3)
    monkeypatch.setattr(gemm, "_COPIED_COLUMNS", 5)
    monkeypatch.setattr(gemm, "_WIDE_ROWS", 7)
    return request.param, calls


def _laid_out(layout, *shape):
    rows, columns = shape
    found = {
        "plain": lambda: torch.randn(shape),
        "rows apart": lambda: torch.randn(rows, columns + 3)[:, 1 : columns + 1],
        "every second row": lambda: torch.randn(2 * rows, columns)[::2],
        "transposed": lambda: torch.randn(columns, rows).T,
        "columns apart": lambda: torch.randn(rows, 2 * columns)[:, ::2],
        "one row": lambda: torch.randn(1, columns).expand(rows, columns),
    }[layout]()
    assert found.shape == shape
    return found


LAYOUTS = ("plain", "rows apart", "every second row", "transposed", "columns apart", "one row")


@pytest.mark.parametrize("add", [None, False, True], ids=["logits", "hidden", "added to hidden"])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_rows", LAYOUTS)
def test_products_of_every_layout(library, of_rows, of_weight, add):
    by_onednn, calls = library
    plain = of_weight in ("plain", "rows apart", "every second row")
    for n, words, width in ((8, 17, 4), (1, 17, 4), (8, 1, 4), (8, 17, 1), (0, 3, 2), (3, 0, 2)):
        weight = _laid_out(of_weight, words, width)
        rows = _laid_out(of_rows, n, width if add is None else words)
        second = weight.T if add is None else weight
        # What is not to be added to must not be read; the result may be a part of a larger one.
        out = torch.full((n, second.shape[1] + 2), torch.nan)[:, 1:-1]
        before = torch.zeros(out.shape)
        if add:
            before = out.copy_(torch.randn(out.shape)).clone()
        if add is None:
            gemm.logits_into(out, rows, weight)
        else:
            gemm.hidden_into(out, rows, weight, add)
        assert_within_product_bound(out, rows, second, before)
        if n == 8 and words == 17 and width == 4:
            assert bool(calls) == (by_onednn and plain)


def assert_within_product_bound(found, a, b, added):
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = (a.shape[1] + 2) * torch.finfo(torch.float32).eps * (size + added.abs())
    assert ((found - (exact + added)).abs() <= bound).all()


@pytest.mark.parametrize("add", [False, True])
def test_fp16_is_widened(library, add):
    hidden, weight, g = torch.randn(8, 4).half(), torch.randn(17, 4).half(), torch.randn(8, 17)
    logits, out = torch.empty(8, 17), torch.randn(8, 4)
    before = out.clone() if add else torch.zeros_like(out)
    gemm.logits_into(logits, hidden, weight)
    gemm.hidden_into(out, g, weight, add)
    assert_within_product_bound(logits, hidden.float(), weight.float().T, torch.zeros(8, 17))
    assert_within_product_bound(out, g, weight.float(), before)
    assert bool(library[1]) == library[0]
    # A shard without columns adds nothing, and what was in the memory is not read.
    out = before.clone() if add else torch.full((8, 4), torch.nan)
    gemm.hidden_into(out, g[:, :0], weight[:0], add)
    assert torch.equal(out, before)


@pytest.mark.parametrize("vendor, family, flags, expected", [
    ("AuthenticAMD", 25, "fpu avx512f", {"logits", "hidden"}),
    ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16", {"logits", "hidden"}),
    ("AuthenticAMD", 25, "fpu avx2", set()),
    ("AuthenticAMD", 23, "fpu avx512f", set()),
    ("GenuineIntel", 6, "fpu avx512f", set()),
    (None, 6, "fpu avx512f", set()),
])  # fmt: skip
def test_the_library_is_chosen_by_the_cpu(monkeypatch, vendor, family, flags, expected):
    text = f"cpu family\t: {family}\nmodel\t\t: 17\nflags\t\t: {flags} sse\n"
    text = text if vendor is None else f"processor\t: 0\nvendor_id\t: {vendor}\n{text}"
    monkeypatch.setattr(gemm.Path, "read_text", lambda self: text)
    chosen = gemm._onednn_operations.__wrapped__
    assert chosen() == expected
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert chosen() == set()

    def missing(self):
        raise FileNotFoundError

    monkeypatch.undo()
    monkeypatch.setattr(gemm.Path, "read_text", missing)
    assert chosen() == set()


def test_whoever_turns_onednn_off_has_torch_mm(library):
    hidden, weight, out = torch.randn(8, 4), torch.randn(17, 4), torch.empty(8, 17)
    with torch.backends.mkldnn.flags(enabled=False):
        gemm.logits_into(out, hidden, weight)
        gemm.hidden_into(torch.empty(8, 4), out, weight)
    assert not library[1]


# Multiples of what a library multiplies at a time, and sizes that are none.
WIDTHS = (1, 7, 32, 33, 41, 100, 577, 640, 1001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gap", (0, 4))
def test_a_row_of_a_product_reads_no_other(width, gap, dtype):
    """Some libraries read on behind a row, times zero: NaN there would come to this row."""
    g = torch.Generator().manual_seed(width)
    memory = torch.full((70, width + gap), torch.nan, dtype=dtype)
    a = memory[:, :width]
    a.copy_(torch.randn(a.shape, generator=g))
    a[5], a[40] = torch.nan, torch.inf
    others = torch.ones(70).bool()
    others[[5, 40]] = False
    weight = torch.randn(48, width, generator=g).to(dtype)
    out = torch.empty(70, 48, dtype=torch.float32 if dtype == torch.float16 else dtype)
    products = {
        "logits": lambda: gemm.logits_into(out, a, weight),
        "hidden": lambda: gemm.hidden_into(out, a, weight.T.contiguous()),
        "wide": lambda: gemm.hidden_into(out[:, :16], a, weight.T[:, :16].contiguous()),
    }
    for name, product in products.items():
        if dtype == torch.float16:
            a = memory[:, :width].float() if name != "logits" else memory[:, :width]
        product()
        rows = out[:, :16] if name == "wide" else out
        assert rows[others].isfinite().all(), name
        exact = a[others].double() @ weight.T.double()[:, : rows.shape[1]]
        scale = a[others].double().abs() @ weight.T.double().abs()[:, : rows.shape[1]]
        error = (rows[others].double() - exact).abs()
        assert (
            error
            <= 4 * torch.finfo(torch.float32).eps * scale + torch.finfo(out.dtype).eps * exact.abs()
        ).all()
        assert not rows[~others].isfinite().any(), name


@pytest.mark.parametrize("vocab", (40, 1001))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_tokens_gradient_reads_no_others(vocab, dtype):
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.full((40, 45), torch.nan, dtype=dtype)[:, :41]
    hidden.copy_(torch.randn(40, 41, generator=g))
    hidden.requires_grad_()
    weight = torch.randn(vocab, 41, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (40,), generator=g)
    with rk.use_backend("cpu"):
        found = rk.linear_token_logprobs(hidden, weight, labels).logprobs
        kl = rk.linear_kl_divergence(hidden, weight, hidden.detach() * 1.1, weight.detach())
    assert found.isfinite().all() and kl.isfinite().all()
    upstream = torch.ones(40)
    upstream[7] = torch.nan
    for result in (found, kl):
        (gradient,) = torch.autograd.grad(result, hidden, upstream, retain_graph=True)
        assert gradient.isnan().all(1).nonzero().flatten().tolist() == [7]
        assert gradient[torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    "rows, width", [(256, 576), (257, 576), (1024, 768), (1408, 576), (600, 960)]
)
def test_rows_that_onednn_would_give_to_one_of_two_threads(monkeypatch, threads, amx, rows, width):
    """They are multiplied in parts that it gives to both."""
    monkeypatch.setattr(gemm, "_has_amx", lambda: amx)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = []
    into = gemm.matmul_into
    monkeypatch.setattr(
        gemm, "matmul_into", lambda out, *a: (sizes.append(len(out)), into(out, *a))
    )
    g, weight = torch.randn(rows, 40).bfloat16(), torch.randn(40, width).bfloat16()
    for add in (False, True):
        sizes.clear()
        out = torch.full((rows, width), float(add)).bfloat16()
        gemm.hidden_into(out, g, weight, add)
        parts = amx and threads == 2 and 256 < rows < 1408 and width < 960
        assert sum(sizes) == rows and max(sizes) == (256 if parts else rows)
        exact = g.double() @ weight.double() + float(add)
        torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-5)
    sizes.clear()
    gemm.hidden_into(out, g, weight, exact=True)
    assert sizes == [rows]


def test_batch_invariance_needs_products_of_one_size(monkeypatch):
    """A row that is in a part of another size could have other bits."""
    monkeypatch.setattr(gemm, "_has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes = []
    into = gemm.matmul_into
    monkeypatch.setattr(
        gemm, "matmul_into", lambda out, *a: (sizes.append(len(out)), into(out, *a))
    )
    torch.manual_seed(0)
    weight, labels = torch.randn(500, 768).bfloat16(), torch.randint(500, (600,))
    hidden = torch.randn(600, 768).bfloat16()

    def gradient(order):
        x = hidden[order].requires_grad_()
        options = {"batch_invariant": True, "chunk_tokens": 300}
        logprobs = rk.linear_token_logprobs(x, weight, labels[order], **options).logprobs
        return torch.autograd.grad(logprobs.sum(), x)[0]

    order = torch.arange(600)
    assert torch.equal(gradient(order)[order.flip(0)], gradient(order.flip(0)))
    assert set(sizes) == {300}
