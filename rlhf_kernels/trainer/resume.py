"""Resuming: finds the checkpoint and checks that settings and data are unchanged."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .checkpoint import CheckpointError
from .config import UserError, require
from .folder import set_aside
from .reward_functions import is_function, source_of
from .tree import check_like, generator_states

# Settings that do not affect training. The content of the data counts, not its path.
_FREE = {
    "output_dir", "save_model", "save_steps", "save_total_limit", "resume", "resume_from",
    "resume_changed", "dry_run", "report_to", "num_samples", "skip_nonfinite", "data", "eval_data",
    "ptx_data", "vllm_memory",
}  # fmt: skip
# Settings that only change rounding errors.
_ROUNDING = {
    "threads", "device", "processes", "micro_batch_size", "generation_batch_size",
    "gradient_checkpointing",
}  # fmt: skip
# Weights, settings and tokenizers of a model.
_MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
# Bytes of a sample of a large file, and the number of samples. Training changes nearly all weights,
# so samples show it.
_SAMPLE, _SAMPLES = 1 << 14, 1 << 12
# The setting that names the rows of each part of the data.
_DATA = {"train": "data", "held_out": "eval_data", "ptx": "ptx_data"}


def find(folder: Path, stage: str, wanted: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from and its states: the newest, or the `wanted` one.

    Raises:
        CheckpointError: it is damaged; the message names the valid ones.
    """
    path: Path | None
    if wanted is None:
        path = checkpoint.newest(folder)
        if path is None:
            return None
    else:
        path = folder / wanted if (folder / wanted).is_dir() else Path(wanted)
        require(path.is_dir(), "resume_from", f"a checkpoint in {folder}, or its path", wanted)
    try:
        return path, checkpoint.load(path, stage)
    except CheckpointError as error:
        whole = [p.name for p in checkpoint.whole(folder, stage) if p.name != path.name]
        advice = "no other checkpoint is whole"
        if whole:
            advice = f"whole: {', '.join(whole)}; --resume_from {whole[0]} continues from it"
        raise CheckpointError(f"{error}; {advice}") from error


def set_later_aside(folder: Path, path: Path, steps_done: int) -> None:
    """Renames the checkpoints after the step that the run continues from.

    They belong to an abandoned course of training, and `--resume` would continue from them. `path`
    may have any name: it may be a renamed copy or a link.
    """
    if path.parent.resolve() != folder.resolve():
        return
    while (last := checkpoint.newest(folder)) is not None:
        if checkpoint.step_of(last) <= steps_done:
            return
        set_aside(last)


def identity(rows: Sequence[Any]) -> str:
    """The SHA-256 hash of rows in their order."""
    found = hashlib.sha256()
    for row in rows:
        # The file and line of a row are not part of its identity.
        content = row[:5] if hasattr(row, "origin") else row
        if getattr(row, "apart", False):
            content = (*content, "apart")
        found.update(json.dumps(content, default=str).encode() + b"\n")
    return found.hexdigest()


def identities(task: Any, trainer: Any) -> dict[str, str]:
    """The hash of each part of a run's data."""
    found = {"train": identity(task.train), "held_out": identity(task.held_out)}
    ptx = getattr(trainer, "ptx", None)
    return found | ({"ptx": identity(ptx.train)} if ptx is not None else {})


def model_identities(settings: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each model that the settings name by a folder, by setting and path.

    A checkpoint has trained weights only; a reference, a base model and rewards come from these.
    """
    named = [settings.get(name) for name in ("model", "critic_model", "teacher_model")]
    named += [p for p in settings.get("reward_funcs", ()) if not is_function(p)]
    folders = dict.fromkeys(path for path in named if path is not None and Path(path).is_dir())
    return {path: _model_identity(Path(path)) for path in folders}


def code_identities(settings: Mapping[str, Any]) -> dict[str, str]:
    """The hash of the file that defines each reward function, by the function's path."""
    files = {p: source_of(p) for p in settings.get("reward_funcs", ()) if is_function(p)}
    return {
        path: hashlib.sha256(file.read_bytes()).hexdigest()
        for path, file in files.items()
        if file is not None and file.is_file()
    }


def _model_identity(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.is_file()):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _samples(file):
            found.update(block)
    settings = folder / "adapter_config.json"
    if settings.is_file():
        with contextlib.suppress(ValueError, TypeError):
            base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
            found.update(_model_identity(Path(base)).encode() if Path(base).is_dir() else b"")
    return found.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """The content of a file; samples all over a large one, which would take long to read."""
    size = file.stat().st_size
    step = max(_SAMPLE, size // _SAMPLES)
    with file.open("rb") as opened:
        for start in range(0, size, step):
            opened.seek(start)
            yield opened.read(_SAMPLE)


def check_same(
    path: Path,
    saved: Any,
    now: Mapping[str, Any],
    *,
    changed: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Compares settings and data of a checkpoint with this run's; returns parts that differ.

    Args:
        path: the checkpoint, for messages.
        saved: `settings`, `data`, `models` and `code` of the checkpoint.
        now: the same of this run.
        changed: whether they may differ.
        say: receives messages about allowed differences.

    Raises:
        UserError: names every setting that differs, with both values.
        CheckpointError: the checkpoint does not hold settings and data.
    """
    old, identity_of = _run_entries(path, saved, now)
    new = now["settings"]
    free = set(_FREE)
    if new["lr_schedule"] == "constant":
        free.add("total_steps")
    names = [n for n in new if n not in free and old[n] != _plain(new[n])]
    rounding = [n for n in names if n in _ROUNDING]
    differ = [f"{n} was {old[n]!r}, is {new[n]!r}" for n in names if n not in _ROUNDING]
    data = [k for k, v in now["data"].items() if identity_of.get(k) != v]
    differ += [f"{_DATA[k]} has other rows" for k in data]
    differ += [f"{path} has other weights or settings" for path in _others("models", saved, now)]
    if differ and not changed:
        raise UserError(
            f"{path}: {'; '.join(differ)}; --resume needs the settings and data of the checkpoint, "
            "--resume_changed goes on with the new ones"
        )
    if differ:
        say(f"continuing with other settings: {'; '.join(differ)}")
    for function in _others("code", saved, now):
        # No error: a function that raised may be mended by now.
        say(f"reward_funcs: the file of {function!r} has changed since {path}")
    if rounding:
        values = ", ".join(f"{n} {old[n]!r} -> {new[n]!r}" for n in rounding)
        say(f"not bitwise as if uninterrupted: {values}")
    return data


def _others(kind: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Paths under which the checkpoint has another hash of this kind than the run."""
    before = saved[kind] if isinstance(saved.get(kind), dict) else {}
    return [path for path, found in now[kind].items() if before.get(path, found) != found]


def _run_entries(
    path: Path, saved: Any, now: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the hashes of data in a checkpoint."""
    saved = saved if isinstance(saved, dict) else {}
    settings, data = saved.get("settings"), saved.get("data")
    if not (isinstance(settings, dict) and isinstance(data, dict)):
        raise CheckpointError(f"{path}: no settings and data of a run")
    missing = sorted(now["settings"].keys() - settings.keys())
    if missing:
        raise CheckpointError(f"{path}: no setting {missing[0]}: of another version, or damaged")
    return settings, data


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def put(path: Path, states: Mapping[str, Any], trainer: Any, *, new_data: Sequence[str]) -> None:
    """Restores a checkpoint's states, those of the random number generators last.

    Data that has changed starts in a new order.

    Raises:
        CheckpointError: an entry is missing or has another type than the trainer's own.
    """
    try:
        own = trainer.state_dict()
        state = dict(states["trainer"])
        if "train" in new_data:
            state["sampler"] = own["sampler"]
        if "ptx" in own and {"ptx", "train"} & set(new_data):
            state["ptx"] = state.get("ptx", own["ptx"]) | {"sampler": own["ptx"]["sampler"]}
        check_like(state, own, "trainer")
        check_like(states["generators"], generator_states(), "generators")
        _check_before(states["before"])
        trainer.learner.load_state_dict(states["learner"])
        trainer.load_state_dict(state)
        for one in (trainer, getattr(trainer, "ptx", None)):
            if one is not None:
                _check_order(one.sampler)
        if "reference" in states:
            trainer.reference.load_state_dict(states["reference"])
        checkpoint.set_generator_states(states["generators"])
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: not of this model and these settings: {told}") from error


def _check_before(before: Any) -> None:
    """Requires a result of `evaluate`, which ran before the first step."""
    scores, texts = before["scores"], before["texts"]
    numbers = isinstance(scores, dict) and all(type(v) in (int, float) for v in scores.values())
    require(numbers, "before.scores", "numbers by name", scores)
    good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    require(good, "before.texts", "a list of texts", texts)


def _check_order(sampler: Any) -> None:
    order = sampler.order.tolist()
    good = len(set(order)) == len(order) and all(0 <= i < sampler.count for i in order)
    require(good, "sampler.order", f"different rows of {sampler.count}", order[:8])
