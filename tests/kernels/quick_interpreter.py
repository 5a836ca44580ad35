"""Triton's interpreter without two things that most of its time goes into.

Every call of a device function patches triton.language anew, though that stays patched until the
kernel returns: here once for each module. Scans go element by element, in order: here by doubling
distances on whole blocks, which is also nearer to what compiled code does.
"""

from typing import Any

import numpy as np


def quicken() -> None:
    """Changes the interpreter of this process. Where its insides are others, it stays as it is."""
    from triton.runtime import interpreter

    scopes, scans = (getattr(interpreter, n, None) for n in ("_LangPatchScope", "ScanOps"))
    if hasattr(scopes, "restore") and hasattr(interpreter, "_patch_lang"):
        _patch_once(interpreter, scopes)
    if hasattr(scans, "generic_scan"):
        _scan_by_doubling(scans)


def _patch_once(interpreter: Any, scope_type: Any) -> None:
    patch = interpreter._patch_lang
    # Modules of the functions for which it is patched, since the kernel was launched.
    patched: set[int] = set()

    class Outermost(scope_type):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return scope_type()
        scope = patch(fn)
        if not patched:
            scope.__class__ = Outermost
        patched.add(module)
        return scope

    interpreter._patch_lang = patch_once


def _scan_by_doubling(scans: Any) -> None:
    one_by_one = scans.generic_scan

    def generic_scan(self: Any, inputs: Any) -> Any:
        blocks = [x.handle.data for x in inputs]
        if blocks[0].ndim != 1:
            return one_by_one(self, inputs)
        dtypes = [x.dtype for x in inputs]
        place, distance = np.arange(blocks[0].size), 1

        def tensors(arrays: Any) -> list[Any]:
            return [self.to_tensor(a, d) for a, d in zip(arrays, dtypes, strict=True)]

        while distance < place.size:
            # What moves in from beyond the start is dropped below.
            behind = tensors(np.roll(b, distance) for b in blocks)
            found = self.combine_fn.fn(*behind, *tensors(blocks))
            found = found if isinstance(found, tuple) else (found,)
            blocks = [
                np.where(place < distance, b, f.handle.data)
                for b, f in zip(blocks, found, strict=True)
            ]
            distance *= 2
        return tensors(blocks)

    scans.generic_scan = generic_scan
