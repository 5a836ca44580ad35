"""Huge pages for large results, and where they are not asked for."""

import ctypes
import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.kernels import native
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


def mapping(address: int) -> dict[str, list[str]]:
    """What the kernel says of the mapping that holds the address."""
    inside, found = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside:
            name, *values = line.split()
            found[name.rstrip(":")] = values
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux is asked for")
def test_pages_of_large_buffers_are_huge_or_there_before_they_are_written():
    kernels = native.module("cpu")
    # Shared memory: its mapping never grows into another.
    memory = mmap.mmap(-1, 8 * HUGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    address = ctypes.addressof(view)
    kernels.prepare_pages(address, 1000, 1)
    assert mapping(address)["Rss"] == ["0", "kB"]
    kernels.prepare_pages(address + 1, len(memory) - 2, 2)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    off = not setting.exists() or "[never]" in setting.read_text()
    huge = mapping(address // HUGE * HUGE + HUGE)
    if off or kernels.freed_pages_leave():
        assert "hg" not in huge["VmFlags"]
        if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14):
            pytest.skip("a kernel that does not make pages when asked")
        # All but the pages that are only partly inside.
        assert 1024 * int(huge["Rss"][0]) == len(memory) - 2 * mmap.PAGESIZE
    else:
        assert "hg" in huge["VmFlags"]
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
