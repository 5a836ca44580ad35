"""Counts what Triton kernels launch, read and write, by listening to Triton's interpreter."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter


class Traffic:
    """Within `with`: every launch, and every address that a kernel loads or stores.

    Lanes that a mask switches off do not count. An element that several programs read counts each
    time: caches are left out.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []
        # Memory freed in between would be given to another tensor, and its counts with it.
        self._alive: list[Any] = []

    def __enter__(self) -> "Traffic":
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._patched = [
            (builder, "create_masked_load", builder.create_masked_load),
            (builder, "create_masked_store", builder.create_masked_store),
            (executor, "__call__", executor.__call__),
        ]
        (*_, load), (*_, store), (*_, run) = self._patched

        def listening_load(this: Any, ptrs: Any, mask: Any, *args: Any, **options: Any) -> Any:
            self._note(self.loads, ptrs, mask)
            return load(this, ptrs, mask, *args, **options)

        def listening_store(this: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
            self._note(self.stores, ptrs, mask)
            return store(this, ptrs, value, mask, *args)

        def listening_run(this: Any, *args: Any, **options: Any) -> Any:
            self.kernels.append(this.fn.__name__)
            self._alive.append(args)
            return run(this, *args, **options)

        for (owner, name, _), new in zip(
            self._patched, (listening_load, listening_store, listening_run), strict=True
        ):
            setattr(owner, name, new)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, old in self._patched:
            setattr(owner, name, old)

    @staticmethod
    def _note(log: list[tuple[np.ndarray, int]], ptrs: Any, mask: Any) -> None:
        on = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
        log.append((ptrs.data[on].ravel(), ptrs.get_element_ty().primitive_bitwidth // 8))

    @property
    def bytes_read(self) -> int:
        return sum(a.size * itemsize for a, itemsize in self.loads)

    @property
    def bytes_written(self) -> int:
        return sum(a.size * itemsize for a, itemsize in self.stores)

    def reads(self, t: Tensor) -> Tensor:
        """How often each element of `t` was read."""
        return _counts(self.loads, t)

    def writes(self, t: Tensor) -> Tensor:
        """How often each element of `t` was written."""
        return _counts(self.stores, t)


def _counts(log: list[tuple[np.ndarray, int]], t: Tensor) -> Tensor:
    storage = t.untyped_storage()
    start, itemsize = storage.data_ptr(), t.element_size()
    counts = torch.zeros(storage.nbytes() // itemsize, dtype=torch.int64)
    for addresses, _ in log:
        inside = (addresses >= start) & (addresses < start + storage.nbytes())
        elements = (addresses[inside] - np.uint64(start)).astype(np.int64) // itemsize
        counts += torch.from_numpy(np.bincount(elements, minlength=counts.numel()))
    return counts.as_strided(t.shape, t.stride(), t.storage_offset())
