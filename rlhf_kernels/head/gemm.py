"""The three products of a head: logits, the gradient of hidden states, and that of the weight.

A product goes to the library that is fastest at it on this CPU, by a table of measurements. It is
never timed at run time: libraries add in different orders, so the choice decides bits.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..core.layout import Memory
from . import devices

Operation = Literal["logits", "hidden"]

# Rows of an fp16 weight that are widened at a time.
_WIDE_ROWS = 1024
# Rows of a product that are added to an older sum at a time.
_SUMMED_ROWS = 16384
# Whether torch.mm and torch.addmm take out_dtype: from torch 2.8 on.
_MIXED_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")
# Whether torch.addmm then adds to a tensor of out_dtype; torch 2.8 to 2.10 take only one of the
# operands' dtype.
_MIXED_SUMS = TorchVersion(torch.__version__) >= "2.11"
# With AMX oneDNN multiplies bfloat16 in groups of so many columns of the first operand. It reads
# the last one whole, times zero (torch 2.13): NaN or infinity behind a row, which is in the next
# row or in a gap between rows, would make this row NaN.
_AMX_COLUMNS = 32
# With AMX: bytes of a gradient of logits, or of the weight, that are transposed at a time; rows of
# the weight's gradient, of which fewer would slow its product down.
_TRANSPOSED_BYTES, _TRANSPOSED_ROWS = 4 * 2**20, 512
# With AMX and two threads oneDNN gives a product of so many rows (exclusive bounds) and fewer
# columns than these to one thread alone (torch 2.13; with three threads or more it does not).
# GFLOP/s of [n, 8192] @ [8192, width], by a product and by products of 256 rows: 576 wide, n = 1024
# 1138 and 1724; 768 wide 1155 and 1877; from n = 1408, or 1024 wide, above 2100 in one.
_SERIAL_ROWS, _SERIAL_COLUMNS, _PARALLEL_ROWS = (256, 1408), 960, 256
# Scaled gradients are kept below 2 to this power: fp16 ends at 2^16.
_FP16_EXPONENT = 15

# fp32 products that oneDNN does faster than torch.mm, by vendor and family of CPUs with AVX-512.
# torch.mm calls MKL, which uses AVX-512 on CPUs of its own vendor only. GFLOP/s of two threads,
# torch.mm / oneDNN:
#
#   CPU                  tokens  vocab x hidden    logits           hidden           weight
#   AMD 25 (Zen 4)          672   49152 x 576     154 / 182        187 / 188        144 / 112
#                           208  151936 x 1024    130 / 171        156 / 170        155 / 102
#                            16   49152 x 576      47 / 90          60 / 107
#   AMD 26 (Zen 5)      three shapes           153-210 / 307-401     / 200-266        / 208-267
#
# The gradient of the weight stays with torch.mm: on Zen 4 it is faster at it.
_FASTER_BY_ONEDNN: dict[tuple[str, int], frozenset[Operation]] = {
    ("AuthenticAMD", 25): frozenset(("logits", "hidden")),
    ("AuthenticAMD", 26): frozenset(("logits", "hidden")),
}
# oneDNN's results are copied to where they belong: so many bytes at a time, which a cache holds.
_COPIED_BYTES = 8 * 2**20
# Fewer rows or columns at a time would slow the product down.
_COPIED_ROWS, _COPIED_COLUMNS = 256, 1024


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [n, columns] = hidden [n, H] @ weight [columns, H].T."""
    if widens(weight):
        wide = hidden.float()
        for rows in blocks(weight.shape[0], _WIDE_ROWS):
            logits_into(out[:, rows], wide, weight[rows].float())
    elif _by_onednn("logits", out, hidden, weight):
        most = max(_COPIED_BYTES // (out.shape[0] * out.itemsize), _COPIED_COLUMNS)
        for rows in blocks(weight.shape[0], most):
            out[:, rows] = _linear(hidden, weight[rows])
    else:
        matmul_into(out, hidden, weight.T)


def hidden_into(
    out: Tensor, g: Tensor, weight: Tensor, add: bool = False, *, exact: bool = False
) -> None:
    """out [n, H] = g [n, columns] @ weight [columns, H], or out += that.

    exact: one product of n rows: those of another number might have other bits.
    """
    if widens(weight):
        if weight.shape[0] == 0 and not add:  # a shard without columns
            out.zero_()
        for rows in blocks(weight.shape[0], _WIDE_ROWS):
            hidden_into(out, g[:, rows], weight[rows].float(), add or rows.start > 0)
    elif _by_onednn("hidden", out, g, weight):
        most = max(_COPIED_BYTES // (out.shape[1] * out.itemsize), _COPIED_ROWS)
        for rows in blocks(out.shape[0], most):
            product = _linear(g[rows], weight.T)
            out[rows].add_(product) if add else out[rows].copy_(product)
    else:
        most = max(out.shape[0], 1) if exact or not _is_serial(out) else _PARALLEL_ROWS
        for rows in blocks(out.shape[0], most):
            matmul_into(out[rows], g[rows], weight, add)


def _is_serial(out: Tensor) -> bool:
    """Whether oneDNN would compute a product [n, columns] in one of two threads."""
    few, many = _SERIAL_ROWS
    return (
        out.dtype == torch.bfloat16
        and few < out.shape[0] < many
        and out.shape[1] < _SERIAL_COLUMNS
        and devices.is_cpu(out.device)
        and _has_amx()
        and torch.get_num_threads() == 2
    )


def weight_into(out: Tensor, g: Tensor, hidden: Tensor, memory: Memory, add: bool = False) -> None:
    """out [columns, H] = g [n, columns].T @ hidden [n, H], or out += that; of one 16-bit dtype.

    The matrix units of a CPU with AMX take twice the time for a transposed operand (two threads,
    n = 1024, H = 1024: 98 ms of 52). So it is transposed beforehand, or the product afterwards,
    whatever has fewer elements.
    """
    n, width = hidden.shape
    if not (g.dtype == torch.bfloat16 and devices.is_cpu(g.device) and _has_amx() and n > 0):
        matmul_into(out, g.T, hidden, add)
        return
    turned = None if n <= width else _transposed(hidden, memory)
    most = max(_TRANSPOSED_BYTES // (min(n, width) * g.itemsize), _TRANSPOSED_ROWS)
    for rows in blocks(out.shape[0], most):
        own, part = out[rows], g[:, rows]
        if turned is None:
            a = _transposed(part, memory)
            torch.addmm(own, a, hidden, out=own) if add else torch.mm(a, hidden, out=own)
            continue
        product = torch.mm(turned, part)
        if add:
            own += _transposed(product, memory)
        else:
            memory.transpose_into(own, product)


def _transposed(x: Tensor, memory: Memory) -> Tensor:
    """x.T in memory of its own, with zeros behind its rows as far as a product reads."""
    rows, columns = x.shape
    behind = -rows % _AMX_COLUMNS
    out = x.new_empty((columns, rows + behind))
    if behind:
        out[:, rows:] = 0
    memory.transpose_into(out[:, :rows], x if _has_plain_rows(x) else x.contiguous())
    return out[:, :rows]


@functools.cache
def _onednn_operations() -> frozenset[Operation]:
    """The products that oneDNN computes on this machine."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.M)
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.M)
    if not (vendor and family and re.search(r"^flags\s*:.*\bavx512f\b", text, re.M)):
        return frozenset()
    return _FASTER_BY_ONEDNN.get((vendor[1], int(family[1])), frozenset())


def _by_onednn(operation: Operation, out: Tensor, a: Tensor, weight: Tensor) -> bool:
    return (
        operation in _onednn_operations()
        and out.dtype == a.dtype == weight.dtype == torch.float32
        and devices.is_cpu(out.device)
        and min(out.numel(), a.numel()) > 0
        and _has_plain_rows(weight)
        and bool(torch.backends.mkldnn.enabled)
    )


def _has_plain_rows(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(0) >= t.shape[1]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN."""
    x = x if _has_plain_rows(x) else x.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in fp32 sums; also into fp32 from 16-bit operands, on a GPU.

    Before torch 2.8 such a product needs operands in fp32: those of b are made in blocks.
    """
    if out.dtype == a.dtype:
        reads_on = _reads_on(a)
        # The smaller of both is looked through, or copied.
        if reads_on and (add or a.numel() <= out.numel()):
            a, reads_on = _with_zeros_behind(a), False
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        if reads_on and bool(out.isnan().any()):
            torch.mm(_with_zeros_behind(a), b, out=out)
    elif not _MIXED_PRODUCTS:
        wide = a.float()
        for columns in blocks(b.shape[1], _WIDE_ROWS):
            part = out[:, columns]
            torch.addmm(part, wide, b[:, columns].float(), beta=float(add), out=part)
    elif add and _MIXED_SUMS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif add:
        for rows in blocks(a.shape[0], _SUMMED_ROWS):
            out[rows] += torch.mm(a[rows], b, out_dtype=out.dtype)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.cache
def _has_amx() -> bool:
    # Older versions of torch cannot be asked.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)())


def _reads_on(a: Tensor) -> bool:
    """Whether a product with `a` reads what lies behind its rows."""
    return (
        a.dtype == torch.bfloat16
        and a.shape[1] % _AMX_COLUMNS != 0
        and a.stride(1) == 1
        and devices.is_cpu(a.device)
        and _has_amx()
    )


def _with_zeros_behind(a: Tensor) -> Tensor:
    """A copy whose rows have zeros behind them, as far as a product reads."""
    columns = a.shape[1]
    copy = a.new_zeros((a.shape[0], columns + -columns % _AMX_COLUMNS))[:, :columns]
    return copy.copy_(a)


def widens(t: Tensor) -> bool:
    """Whether products take this operand in fp32."""
    return t.dtype == torch.float16 and not devices.mixes(t.device)


def blocks(size: int, most: int) -> Iterator[slice]:
    for start in range(0, size, most):
        yield slice(start, min(start + most, size))


def in_fp16(g: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(fp16, unit) with g [n, columns] = fp16 * unit: powers of two that use fp16's range.

    A loss is scaled so that gradients stay in that range; they are taken before this scale is
    known. One unit for all, dims (0, 1), or one per token, dims (1,), whose bits then depend on no
    other token.
    """
    if g.numel() == 0:
        return g.half(), g.new_ones((1, 1))
    top = torch.maximum(g.amax(dims, keepdim=True), -g.amin(dims, keepdim=True))
    exponent = (_FP16_EXPONENT - torch.frexp(top).exponent).clamp(-100, 100)
    one = torch.ones_like(top)
    scaled = torch.empty_like(g, dtype=torch.float16)
    torch.mul(g, torch.ldexp(one, exponent), out=scaled)
    return scaled, torch.ldexp(one, -exponent)
