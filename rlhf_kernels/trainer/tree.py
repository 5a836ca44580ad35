"""Converts nested states to JSON and tensors and back; random generators; type checks."""

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON form of nested dicts and lists; tensors go into `tensors` under their path."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        # JSON objects would turn integer keys (of an optimizer's parameters) into strings.
        names = [f"{path}.{k}" if path else str(k) for k in tree]
        forms = [flatten(v, n, tensors) for v, n in zip(tree.values(), names, strict=True)]
        return {"dict": list(zip(tree, forms, strict=True))}
    if isinstance(tree, list | tuple):
        items = [flatten(v, f"{path}.{i}", tensors) for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    return tree


def unflatten(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`.

    Raises:
        ValueError, TypeError, KeyError: `flatten` does not make this form.
    """
    if isinstance(form, list):
        return [unflatten(v, tensors) for v in form]
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind not in ("tuple", "dict") or not isinstance(content, list):
        raise ValueError(f"an entry of kind {kind!r}")
    if kind == "tuple":
        return tuple(unflatten(v, tensors) for v in content)
    return {k: unflatten(v, tensors) for k, v in content}


def generator_states() -> dict[str, Any]:
    """The states of all global generators; a stage keeps those of its own generators."""
    state: Any = numpy.random.get_state()
    kind, keys, *rest = state
    numbers = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numbers}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def check_like(found: Any, like: Any, where: str) -> None:
    """Requires a state with the structure of another: keys, types, dtypes, dimensions.

    Lengths of lists and sizes of tensors may differ.

    Raises:
        ValueError: names the entry, what was expected and what was found.
    """
    if isinstance(like, Tensor):
        kind = f"a tensor of {like.dtype} with {like.dim()} dimensions"
        good = isinstance(found, Tensor) and (found.dtype, found.dim()) == (like.dtype, like.dim())
    elif isinstance(like, Mapping):
        kind = f"the entries {sorted(map(str, like))}"
        good = isinstance(found, Mapping) and found.keys() == like.keys()
    elif isinstance(like, tuple):
        kind = f"{len(like)} values"
        good = isinstance(found, tuple) and len(found) == len(like)
    elif isinstance(like, list):
        kind, good = "a list", isinstance(found, list)
    elif isinstance(like, float) or like is None:
        number = isinstance(found, float)
        kind = "a finite number with a point"
        # Only Python's generator state may have None in place of a number.
        good = math.isfinite(found) if number else found is None and where.endswith("python.2")
        good = good or (like is None and found is None)
    else:
        kind, good = f"a value of type {type(like).__name__}", type(found) is type(like)
    if not good:
        shown = tuple(found.shape) if isinstance(found, Tensor) else repr(found)[:60]
        raise ValueError(f"{where}: expected {kind}, found {shown}")
    if isinstance(like, Mapping):
        for key, value in like.items():
            check_like(found[key], value, f"{where}.{key}")
    elif isinstance(like, tuple):
        for i, (a, b) in enumerate(zip(found, like, strict=True)):
            check_like(a, b, f"{where}.{i}")
