"""Checkpoints: safetensors and JSON under a manifest; whole or not there at all."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import UserError

_FORMAT = "rlhf_kernels.trainer/1"
_PREFIX = "checkpoint-"


class CheckpointError(UserError):
    """A checkpoint that is incomplete, altered or not of this run; the message names it."""


def flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON form of nested dicts and lists; tensors go into `tensors` under their path."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        # As pairs: integer keys (an optimizer's parameters) would come back as texts.
        names = [f"{path}.{k}" if path else str(k) for k in tree]
        forms = [flatten(v, n, tensors) for v, n in zip(tree.values(), names, strict=True)]
        return {"dict": list(zip(tree, forms, strict=True))}
    if isinstance(tree, list | tuple):
        items = [flatten(v, f"{path}.{i}", tensors) for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    return tree


def unflatten(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(form, list):
        return [unflatten(v, tensors) for v in form]
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unflatten(content, tensors))
    return {k: unflatten(v, tensors) for k, v in content}


def generator_states() -> dict[str, Any]:
    """Every global generator; a stage's own ones are part of its state."""
    kind, keys, *rest = numpy.random.get_state()
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save(folder: Path, step: int, stage: str, states: Mapping[str, Any], *, keep: int = 0) -> Path:
    """Writes `folder/checkpoint-<step>`.

    Everything is written and synchronised to disk under another name, and renamed last: a kill at
    any moment leaves the former checkpoints and perhaps a folder that is cleaned up next time.

    Args:
        folder: output folder of the run.
        step: finished steps; a checkpoint of them that is there already stays.
        stage: subcommand.
        states: name -> nested state; a file of tensors each.
        keep: newest checkpoints to keep, 0 for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:08d}"
    if final.exists():
        return final
    for stale in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(stale)
    draft = folder / f".{_PREFIX}{step:08d}"
    draft.mkdir()
    forms: dict[str, Any] = {}
    for name, state in states.items():
        tensors: dict[str, Tensor] = {}
        forms[name] = flatten(state, "", tensors)
        save_file(tensors, draft / f"{name}.safetensors")
    (draft / "state.json").write_text(json.dumps(forms), encoding="utf-8")
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in draft.iterdir()}
    manifest = {"format": _FORMAT, "stage": stage, "step": step, "files": files}
    text = json.dumps(manifest | {"seal": _seal(manifest)}, indent=1)
    (draft / "manifest.json").write_text(text, encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        _sync(path)
    draft.rename(final)
    _sync(folder)
    if keep:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def load(path: Path, stage: str) -> dict[str, Any]:
    """The states that `save` was given.

    Raises:
        CheckpointError: naming the file that is missing, truncated, altered or another stage's.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        seal = manifest.pop("seal")
        form = manifest["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: no manifest of a checkpoint ({error})") from error
    if form != _FORMAT or seal != _seal(manifest):
        raise CheckpointError(f"{path}/manifest.json: altered, or not of this version")
    if manifest["stage"] != stage:
        raise CheckpointError(f"{path}: a checkpoint of {manifest['stage']!r}, not of {stage!r}")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, found {size}")
        if _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: altered since it was written")
    forms = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {
        name: unflatten(form, load_file(path / f"{name}.safetensors"))
        for name, form in forms.items()
    }
