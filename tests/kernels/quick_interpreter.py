"""Triton's interpreter without what most of its time goes into. Results stay bit for bit the same,
but for scans.

- Every call of a device function patches triton.language anew, though that stays patched until the
  kernel returns: here once for each module.
- Scans go element by element, in order: here by doubling distances on whole blocks, which is also
  nearer to what compiled code does.
- Types of blocks, and what a tensor takes from its type, are made anew for every operation: here
  once for each type. Blocks of one shape are not broadcast.
- Sums and products of integers are repeated in 64 bits for an assertion that only a debug build
  looks at: here only there.
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
    if _has(interpreter, "tl", "_get_np_dtype", "interpreter_builder", "interpreter_semantic"):
        if _has(interpreter.tl.block_type, "with_element_ty", "is_block"):
            _reuse_types(interpreter)
        _skip_what_is_not_used(interpreter.interpreter_semantic)


def _has(thing: Any, *names: str) -> bool:
    return all(hasattr(thing, name) for name in names)


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


def _reuse_types(interpreter: Any) -> None:
    language, builder = interpreter.tl, interpreter.interpreter_builder
    with_element, make_tensor = language.block_type.with_element_ty, language.tensor.__init__
    numpy_dtype, block = interpreter._get_np_dtype, getattr(builder, "get_block_ty", None)

    # What is made of a type is kept in the type, so that it lives as long. By identity, because
    # types are slow to compare; beside each lies what its identity is of, which lives as long too.
    def with_element_ty(self: Any, scalar: Any) -> Any:
        made = vars(self).setdefault("_with_element", {})
        if id(scalar) not in made:
            made[id(scalar)] = scalar, with_element(self, scalar)
        return made[id(scalar)][1]

    def get_block_ty(dtype: Any, shape: Any) -> Any:
        # Numbers' types are few; pointers' are made for every tensor.
        if type(dtype) is not language.dtype or not isinstance(shape, language.tuple):
            return block(dtype, shape)
        made = vars(shape).setdefault("_blocks", {})
        if id(dtype) not in made:
            made[id(dtype)] = dtype, block(dtype, shape)
        return made[id(dtype)][1]

    def init(self: Any, handle: Any, type: Any) -> None:
        made = vars(type).get("_tensor")
        if made is None:
            make_tensor(self, handle, type)
            type._tensor = {k: v for k, v in vars(self).items() if k != "handle"}
        else:
            vars(self).update(made, handle=handle)

    def get_np_dtype(dtype: Any) -> Any:
        made = vars(dtype).get("_numpy")
        if made is None:
            made = dtype._numpy = numpy_dtype(dtype)
        return made

    language.block_type.with_element_ty = with_element_ty
    language.tensor.__init__ = init
    interpreter._get_np_dtype = get_np_dtype
    if block is not None:
        builder.get_block_ty = get_block_ty


def _skip_what_is_not_used(semantic: Any) -> None:
    broadcast = getattr(semantic, "broadcast_impl_value", None)
    sanitize = getattr(semantic, "binary_op_sanitize_overflow_impl", None)

    def broadcast_impl_value(lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a is b or (a.is_block() and b.is_block() and list(a.shape) == list(b.shape)):
            return lhs, rhs
        return broadcast(lhs, rhs)

    def sanitize_overflow(*operands: Any) -> None:
        if semantic.builder.options.debug:
            sanitize(*operands)

    if broadcast is not None:
        semantic.broadcast_impl_value = broadcast_impl_value
    if sanitize is not None:
        semantic.binary_op_sanitize_overflow_impl = sanitize_overflow
