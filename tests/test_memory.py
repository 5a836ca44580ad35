"""Huge pages for large results, and where they are not asked for."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import native
from rlhf_kernels.testing import assert_bitwise_equal

HUGE = 2**21
BALLOON, BLOCK, REPORTING = "0x0005", "0x0002", 5


def device(folder: Path, number: int, kind: str, *features: int) -> None:
    path = folder / f"virtio{number}"
    path.mkdir()
    (path / "device").write_text(kind + "\n")
    (path / "features").write_text("".join(str(int(b in features)) for b in range(64)) + "\n")


def test_a_balloon_that_reports_free_pages_is_recognised(tmp_path):
    def leave():
        return native.module("cpu").freed_pages_leave(str(tmp_path))

    assert not leave()
    device(tmp_path, 0, BLOCK, REPORTING)
    device(tmp_path, 1, BALLOON, *(b for b in range(64) if b != REPORTING))
    (tmp_path / "virtio2").mkdir()
    assert not leave()
    # Numbers may be missing where a device was unplugged.
    device(tmp_path, 7, BALLOON, REPORTING)
    assert leave()
    (tmp_path / "virtio7" / "device").write_text("")
    assert not leave()


def flags(address: int) -> list[str]:
    """What the kernel was told of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))


def test_huge_pages_are_asked_for_unless_freed_pages_leave():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has no transparent huge pages")
    kernels = native.module("cpu")
    memory = mmap.mmap(-1, 4 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    address = ctypes.addressof(view)
    kernels.advise_huge_pages(address + 1, 4 * HUGE - 2)
    inside = address // HUGE * HUGE + HUGE
    assert ("hg" in flags(inside)) == (not kernels.freed_pages_leave())
    # A page that is only partly inside is left alone.
    assert "hg" not in flags(address)
    del view
    memory.close()


@pytest.mark.parametrize("vocab", [511, 40_009, 2_000_003])
def test_large_results_have_the_bits_of_small_ones(vocab):
    # Rows that share a page with the next, that share a block with others, and of several blocks.
    rows = 5_000_000 // vocab + 1
    logits = torch.randn(rows, vocab, requires_grad=True)
    labels = torch.randint(vocab, (rows,))
    for _ in range(2):
        (grad,) = torch.autograd.grad(rk.token_logprobs(logits, labels).logprobs.sum(), logits)
        for i in (0, rows // 2, rows - 1):
            row = logits[i : i + 1, :]
            alone = rk.token_logprobs(row, labels[i : i + 1]).logprobs.sum()
            assert_bitwise_equal(grad[i], torch.autograd.grad(alone, row)[0][0])
        assert int(grad.ne(0).sum()) > 0.99 * grad.numel()
