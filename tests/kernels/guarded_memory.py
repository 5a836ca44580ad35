"""Tensors that end, or start, where memory may not be touched: one element beyond them is a crash.

A kernel that reads out of range usually returns the right result, because what it read is masked
later. Triton's interpreter reads and writes through real addresses, so with every tensor against a
protected page such an access ends the process.
"""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PAGE = mmap.PAGESIZE
# Protected on both sides: a whole tile beyond the end is still inside.
GUARD = 4 << 20
CANARY = 0xA5
SIDES = ("start", "end")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_aten = torch.ops.aten
_UNWRITTEN = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided)


def _region(size: int) -> int:
    """Address of `size` bytes, a multiple of PAGE, between two guards."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, size + 2 * GUARD, 0, flags, -1, 0)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if address in (None, ctypes.c_void_p(-1).value) or _libc.mprotect(
        address + GUARD, size, access
    ):
        raise MemoryError(f"no guarded memory: errno {ctypes.get_errno()}")
    return address + GUARD


class GuardedMemory(TorchDispatchMode):
    """While active, every new tensor lies against a guard; new memory holds NaN, not zeros.

    Args:
        side: "end" puts the last byte of each tensor before a guard, "start" the first behind one.
    """

    def __init__(self, side: str) -> None:
        super().__init__()
        self._side = side
        self._storages: set[int] = set()
        # (address, size) of what lies between a tensor and its far guard.
        self._slack: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is not _aten.lift_fresh:
            tree_map_only(Tensor, self._require_guarded, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        unwritten = func.overloadpacket in _UNWRITTEN
        return tree_map_only(Tensor, lambda t: self._guarded(t, unwritten), result)

    def _require_guarded(self, t: Tensor) -> None:
        if t.numel() and t.untyped_storage().data_ptr() not in self._storages:
            raise AssertionError(f"a tensor {tuple(t.shape)} was made outside guarded memory")

    def _guarded(self, t: Tensor, unwritten: bool) -> Tensor:
        # Views of guarded memory stay what they are.
        if t.numel() == 0 or t.untyped_storage().data_ptr() in self._storages:
            return t
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        size = extent * t.element_size()
        room = -(-size // PAGE) * PAGE
        start = _region(room)
        ctypes.memset(start, CANARY, room)
        address = start + room - size if self._side == "end" else start
        self._slack.append((start if self._side == "end" else start + size, room - size))
        memory = (ctypes.c_char * size).from_address(address)
        moved = torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, t.stride())
        if unwritten:
            ctypes.memset(address, 0xFF, size)
        else:
            moved.copy_(t)
        self._storages.add(address)
        return moved

    def check(self) -> None:
        """Raises AssertionError if anything was written between a tensor and its far guard."""
        for address, size in self._slack:
            if ctypes.string_at(address, size) != bytes([CANARY]) * size:
                raise AssertionError("a kernel wrote outside its tensors")
