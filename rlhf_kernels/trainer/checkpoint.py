"""Checkpoints: safetensors and JSON with a manifest, written atomically."""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import UserError
from .folder import set_aside, writing
from .folder import sync as _sync
from .tree import flatten, generator_states, set_generator_states, unflatten

__all__ = ["CheckpointError", "generator_states", "set_generator_states"]

_FAMILY = "rlhf_kernels.trainer/"
_FORMAT = f"{_FAMILY}2"
_NAME = re.compile(r"checkpoint-([0-9]{8,})")
_DRAFT = re.compile(r"\.checkpoint-[0-9]{8,}")
# Plain names only: a path could lead out of the checkpoint.
_FILE = re.compile(r"state\.json|[A-Za-z0-9_]+\.safetensors")
_MANIFEST, _STATE = "manifest.json", "state.json"


class CheckpointError(UserError):
    """A checkpoint is incomplete, altered or of another run; the message names it."""


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- writing -----------------------------------------------------------------------------------


def save(folder: Path, step: int, stage: str, states: Mapping[str, Any], *, keep: int = 0) -> Path:
    """Writes `folder/checkpoint-<step>`.

    All files are written and synchronised to disk under another name, which is changed last. A
    kill at any moment keeps older checkpoints; the next save removes the unfinished folder.

    Args:
        folder: output folder of the run.
        step: finished steps; a valid checkpoint of the same step is kept as it is.
        stage: subcommand.
        states: nested states by name; the tensors of each have a file of their own.
        keep: how many of the newest checkpoints to keep, 0 for all.

    Raises:
        UserError: the disk is full or cannot be written; older checkpoints remain valid.
    """
    final = folder / f"checkpoint-{step:08d}"
    with writing(final):
        folder.mkdir(parents=True, exist_ok=True)
        if _saved(final, stage):
            return final
        for path in folder.iterdir():
            if _is_draft(path):
                shutil.rmtree(path)
        draft = _draft(final)
        draft.mkdir()
        try:
            _write(draft, step, stage, states)
            set_aside(final)
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _sync(folder)
        for old in checkpoints(folder)[:-keep] if keep else ():
            # A kill while files are deleted leaves a draft, not an incomplete checkpoint.
            shutil.rmtree(old.rename(_draft(old)))
    return final


def _saved(path: Path, stage: str) -> bool:
    try:
        return not path.is_symlink() and _verified(path)["stage"] == stage
    except CheckpointError:
        return False


def _draft(path: Path) -> Path:
    """A free name for a folder that is not yet, or no longer, a checkpoint."""
    draft = path.with_name(f".{path.name}")
    set_aside(draft)
    return draft


def _is_draft(path: Path) -> bool:
    """Whether a folder is the rest of a killed save: it has only files of a checkpoint."""
    if not _DRAFT.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(
        (_FILE.fullmatch(p.name) or p.name == _MANIFEST) and p.is_file() for p in path.iterdir()
    )


def _write(draft: Path, step: int, stage: str, states: Mapping[str, Any]) -> None:
    forms: dict[str, Any] = {}
    for name, state in states.items():
        tensors: dict[str, Tensor] = {}
        forms[name] = flatten(state, "", tensors)
        save_file(tensors, draft / f"{name}.safetensors")
    (draft / _STATE).write_text(json.dumps(forms), encoding="utf-8")
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in draft.iterdir()}
    manifest = {"format": _FORMAT, "stage": stage, "step": step, "files": files}
    text = json.dumps(manifest | {"seal": _seal(manifest)}, indent=1)
    (draft / _MANIFEST).write_text(text, encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        _sync(path)


# --- finding -----------------------------------------------------------------------------------


def _named(folder: Path) -> list[Path]:
    """Folders with names of checkpoints, in the order of their steps; links are left out."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in paths if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of finished steps in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints with a valid manifest, oldest first."""
    found = []
    for path in _named(folder):
        try:
            good = _manifest(path)["step"] == step_of(path)
        except CheckpointError:
            good = False
        found += [path] if good else []
    return found


def newest(folder: Path) -> Path | None:
    """The last checkpoint of the trainer, even if it is damaged; None if there is none."""
    return next((path for path in reversed(_named(folder)) if _claims(path)), None)


def _claims(path: Path) -> bool:
    """Whether a folder's manifest is the trainer's, or is too damaged to decide.

    Without a format in its manifest, or without a manifest, it is the trainer's if it has the state
    of a run: to pass over it would be to start again, or from an older one, without a word.
    """
    try:
        manifest = json.loads(_text(path / _MANIFEST))
    except FileNotFoundError:
        manifest = None
    except (OSError, ValueError, RecursionError):
        return True
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(kind, str):
        return kind.startswith(_FAMILY)
    return os.path.lexists(path / _STATE)


def whole(folder: Path, stage: str) -> list[Path]:
    """The valid checkpoints of a stage, newest first; reads all their files."""
    return [path for path in reversed(checkpoints(folder)) if _saved(path, stage)]


# --- reading -----------------------------------------------------------------------------------


def _text(file: Path) -> str:
    """The content of a regular file; a pipe would block, so anything else raises."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file.name} is not a file")
    return file.read_text(encoding="utf-8")


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with the type of every entry checked.

    Raises:
        CheckpointError: names what is missing, altered or of a wrong type.
    """
    file = path / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(_text(file))
        seal = manifest.pop("seal")
        form = manifest["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no manifest of a checkpoint ({error})") from error
    if form != _FORMAT or seal != _seal(manifest):
        raise CheckpointError(f"{file}: altered, or not of this version")
    for name, kind in (("stage", str), ("step", int), ("files", dict)):
        _expect(file, name, type(manifest.get(name)) is kind, kind.__name__, manifest.get(name))
    for name, entry in manifest["files"].items():
        plain = bool(_FILE.fullmatch(name))
        _expect(file, "files", plain, "names of files in this folder", name)
        good = isinstance(entry, dict) and type(entry.get("bytes")) is int
        good = good and isinstance(entry.get("sha256"), str)
        _expect(file, f"files.{name}", good, "bytes and sha256", entry)
    _expect(file, "files", _STATE in manifest["files"], _STATE, sorted(manifest["files"]))
    return manifest


def _expect(file: Path, name: str, ok: bool, expected: str, found: object) -> None:
    if not ok:
        raise CheckpointError(f"{file}: {name}: expected {expected}, found {repr(found)[:80]}")


def _verified(path: Path) -> dict[str, Any]:
    """The manifest, after a comparison of every file with it."""
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing, or not a file of its own")
        try:
            size, digest = file.stat().st_size, None
            digest = _digest(file) if size == entry["bytes"] else None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, found {size}")
        if digest != entry["sha256"]:
            raise CheckpointError(f"{file}: altered since it was written")
    return manifest


def load(path: Path, stage: str) -> dict[str, Any]:
    """Reads the states that `save` wrote.

    Raises:
        CheckpointError: names the file that is missing, truncated, altered or of another stage.
    """
    manifest = _verified(path)
    if manifest["stage"] != stage:
        raise CheckpointError(f"{path}: a checkpoint of {manifest['stage']!r}, not of {stage!r}")
    if _NAME.fullmatch(path.name):
        ok = manifest["step"] == step_of(path)
        _expect(path / _MANIFEST, "step", ok, str(step_of(path)), manifest["step"])
    try:
        forms = json.loads((path / _STATE).read_text(encoding="utf-8"))
        missing = {f"{name}.safetensors" for name in forms} - manifest["files"].keys()
        if missing or not isinstance(forms, dict):
            raise ValueError(f"no file for {sorted(missing)}")
        return {
            name: unflatten(form, load_file(path / f"{name}.safetensors"))
            for name, form in forms.items()
        }
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{path / _STATE}: no states of a checkpoint ({error})") from error
