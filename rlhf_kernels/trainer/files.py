"""Numbered objects from files, folders, glob patterns and hub datasets."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .config import UserError
from .formats import (
    FORMATS,
    JSON_ENDINGS,
    SUPPORTED,
    Placed,
    file_objects,
    format_of,
    numbered,
    one_line,
    optional,
    stem_of,
)

# Split names as in "train-00000-of-00002.parquet", "test/part.jsonl", as `datasets` finds them.
_SPLIT = re.compile(
    r"(?<![a-z0-9])(train(?:ing|set)?|test(?:ing|set)?|valid(?:ation)?|val|dev|eval(?:uation)?)"
    r"(?![a-z])",
    re.IGNORECASE,
)

# Numbered shards as `datasets` writes them: "train-00000-of-00002".
_SHARD = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})")

# Files beside downloaded datasets: cards, indices, scripts. The ending "" is LICENSE's.
_INDICES = ("dataset_infos.json", "dataset_info.json")
_DOCUMENTS = (
    *("", ".md", ".rst", ".txt", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".log"),
    *(".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".bib", ".cff", ".sha256", ".md5"),
)


def read_objects(path: str) -> Iterator[Placed]:
    """The objects of a file, folder of shards, glob pattern, saved or hub dataset, in order.

    A path that exists is never looked up on the hub.

    Raises:
        UserError: names the file, the line or row and the reason.
    """
    try:
        found = Path(path).expanduser()
        if found.is_dir():
            return _folder(found)
        if found.exists():
            return file_objects(found)
    except (OSError, RuntimeError) as error:
        # The name is too long, the folder is not readable, or the home does not exist.
        raise UserError(f"{path[:200]}: cannot be read: {one_line(error)}") from error
    if glob.has_magic(path):
        matches = [Path(name) for name in sorted(glob.glob(str(found), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"{path}: no file matches this pattern")
        return _shards(path, files)
    if is_path(path):
        raise UserError(f"{path}: no such file or folder")
    return _hub(path)


def is_path(name: str) -> bool:
    """Whether a name that does not exist is a path; hub names have the form 'owner/name'."""
    spelled = Path(name).expanduser()
    ending = re.search(r"\.[a-z]\w{0,8}$", name, re.IGNORECASE)
    deep = spelled.is_absolute() or name.startswith((".", "~")) or "\\" in name
    parent = spelled.parent != Path(".") and spelled.parent.exists()
    return bool(ending or deep or parent or len(spelled.parts) > 2)


# --- folders and the hub ---------------------------------------------------------------------


def _folder(folder: Path) -> Iterator[Placed]:
    """Reads a folder from `save_to_disk`, or of shards; it skips documents and nothing else."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        datasets = optional("datasets", folder)
        return _dataset(str(folder), lambda: datasets.load_from_disk(str(folder)))
    listed = [name for name in _listed(folder) if name.name.lower() not in _INDICES]
    files = [name for name in listed if format_of(name) in FORMATS]
    if not files:
        raise UserError(f"{folder}: expected a folder that holds {SUPPORTED}, found none")
    unread = [str(n) for n in listed if n not in files and not _is_document(n)]
    if unread:
        raise UserError(
            f"{folder}: expected {SUPPORTED} beside {files[0]}, found {_some(unread)}; unpack, "
            "convert or move them, or name a file or a pattern"
        )
    splits = {name: _split(name) for name in files}
    if any(splits.values()):
        files = [name for name in files if splits[name] == "train"]
        if not files:
            found = ", ".join(sorted({s for s in splits.values() if s}))
            how = f"name one, as in '{folder}/*{found.split(', ')[0]}*'"
            raise UserError(f"{folder}: expected files of a split 'train', found {found}; {how}")
        unused = [str(name) for name, split in splits.items() if split is None]
        if unused:
            raise UserError(
                f"{folder}: expected every name to tell a split, as that of {files[0]} does, found "
                f"{_some(unused)}; rename or move them, or name a file or a pattern"
            )
    _check_shards(folder, files)
    return _shards(str(folder), [folder / name for name in files])


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Raises UserError if a file lies there twice, or a shard of a numbered series is missing."""
    seen: dict[Path, Path] = {}
    for name in files:
        first = seen.setdefault(stem_of(name), name)
        if first is not name:
            raise UserError(
                f"{folder}: expected every file once, found {first} and {name}; move one of them, "
                "or name a file or a pattern"
            )
    series: dict[tuple[str, str], set[int]] = {}
    for stem in seen:
        if number := _SHARD.fullmatch(str(stem)):
            series.setdefault((number[1], number[3]), set()).add(int(number[2]))
    for (start, count), numbers in series.items():
        lost = [i for i in range(int(count)) if i not in numbers][:1]
        if lost and len(numbers) < int(count):
            shard = f"{start}-{lost[0]:0{len(count)}d}-of-{count}"
            raise UserError(
                f"{folder}: expected {int(count)} files {start}-*-of-{count}, found {len(numbers)} "
                f"without {shard}; get it, or name a pattern"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _is_document(name: Path) -> bool:
    """Whether the name of a file says that it describes the data rather than holds it."""
    endings = [suffix.lower() for suffix in name.suffixes] or [""]
    # "train.txt" may hold rows, and "rows.jsonl.txt" does.
    rows = endings[-1] in ("", ".txt") and _SPLIT.search(name.name)
    return endings[-1] in _DOCUMENTS and not rows and not {e[1:] for e in endings} & {*FORMATS}


def _listed(folder: Path) -> list[Path]:
    """The sorted names of all files below a folder that are not hidden; links are followed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}: {error.filename}")

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back to one of its parents.
        here = os.path.realpath(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        paths = [Path(place, name) for name in names if not name.startswith((".", "_"))]
        # A broken link is kept, so that reading it raises. Pipes and devices are no data.
        found += [p.relative_to(folder) for p in paths if p.is_file() or not p.exists()]
    return sorted(found)


def _split(name: Path) -> str | None:
    """The split in a file's name, or else in the names of its folders; None if there is none."""
    for part in reversed(name.parts):
        found = _SPLIT.search(part)
        if found:
            spelled = found.group(1).lower()
            return "train" if spelled.startswith("train") else spelled
    return None


def _shards(path: str, files: list[Path]) -> Iterator[Placed]:
    formats = {"json" if (kind := format_of(file)) in JSON_ENDINGS else str(kind) for file in files}
    if len(formats) > 1:
        listed = ", ".join(sorted(formats))
        raise UserError(f"{path}: expected files of one format, found {listed}; name a pattern")
    return (placed for file in files for placed in file_objects(file))


def _hub(name: str) -> Iterator[Placed]:
    datasets = optional("datasets", f"{name}: no such file; a dataset of the hub")
    hub = optional("huggingface_hub", name)
    try:
        # Without network `datasets` would retry for half a minute before it raises.
        hub.HfApi().dataset_info(name, timeout=10)
    except (hub.errors.OfflineModeIsEnabled, hub.errors.GatedRepoError):
        # Only a copy downloaded before is available; `datasets` finds it without the network.
        pass
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError) as error:
        raise UserError(f"{name}: no such file, and no dataset of this name on the hub") from error
    except Exception as error:
        how = "give a file, or set HF_HUB_OFFLINE=1 to use a copy downloaded before"
        raise UserError(
            f"{name}: no such file, and the hub was not reached ({one_line(error)}); {how}"
        ) from error
    return _dataset(name, lambda: datasets.load_dataset(name, split="train"))


def _dataset(path: str, load: Callable[[], Any]) -> Iterator[Placed]:
    """The rows of a dataset; of several splits, those of 'train'."""
    try:
        found = load()
        if isinstance(found, dict):
            splits = list(found)
            if "train" not in splits and len(splits) > 1:
                raise UserError(f"{path}: expected a split 'train', found {', '.join(splits)}")
            found = found["train" if "train" in splits else splits[0]]
        rows = found.to_list()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be loaded: {one_line(error)}") from error
    return numbered(path, rows)
