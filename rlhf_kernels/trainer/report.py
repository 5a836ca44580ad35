"""The report of a run: metrics log, curves, tables, peak memory."""

import io
import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .folder import write_whole, writing

# The import looks for the backend that a notebook names to its commands; a picture needs none.
_named = os.environ.pop("MPLBACKEND", None)
from matplotlib.figure import Figure  # noqa: E402

if _named is not None:
    os.environ["MPLBACKEND"] = _named


def peak_memory_gib() -> float:
    """The peak memory: of tensors on the GPU, or of the process if there is no GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class MetricsLog:
    """A file with one JSON object per line, written at each step so that a kill loses no rows.

    A run that continues from `steps_done` keeps the rows of earlier steps, and drops later rows
    and incomplete lines. The new file replaces the old one atomically.
    """

    def __init__(self, path: Path, *, steps_done: int = 0) -> None:
        self.path, self.rows = path, _kept(path, steps_done)
        with writing(path):
            write_whole(path, "".join(map(_line, self.rows)).encode())
            # Unbuffered, so that closing the file does not repeat a failed write.
            self.file = path.open("ab", buffering=0)

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        left = _line(row).encode()
        with writing(self.path):
            while left:
                left = left[self.file.write(left) :]

    def sync(self) -> None:
        """Waits until the rows are on the disk."""
        with writing(self.path):
            os.fsync(self.file.fileno())


def _line(row: dict[str, float]) -> str:
    """A row as JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept(path: Path, steps_done: int) -> list[dict[str, float]]:
    """The rows of the steps before `steps_done`; invalid lines are dropped."""
    found = []
    with writing(path):
        content = path.read_bytes() if steps_done and path.is_file() else b""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            continue
        if row["step"] < steps_done:
            numbers = {k: math.nan if v is None else v for k, v in row.items()}
            # Other programs may have written other values into the log.
            found.append({k: v for k, v in numbers.items() if _is_metric(v)})
    return found


def _is_metric(value: Any) -> bool:
    """Whether a value in the log is a number that fits in a float."""
    try:
        return isinstance(value, int | float) and not math.isinf(value)
    except OverflowError:
        return False


_CURVES = {
    "reward": "reward",
    "kl": "KL to reference, per completion",
    "entropy": "entropy",
    "length": "tokens per completion",
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
}


def plot_curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Plots reward, KL, entropy, length, loss, accuracy and margin over the steps, as a PNG."""
    shown = {key: title for key, title in _CURVES.items() if any(key in row for row in rows)}
    if not shown:
        # A finished run that is resumed after its log was deleted has no rows.
        return
    size = (4 * len(shown), 3.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, (key, title) in zip(axes[0], shown.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row.get(key, math.nan) for row in rows])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())


def in_short(text: str) -> str:
    """The text without its middle if a cell of `table` does not hold it."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= 48 else f"{text[:23]}…{text[-24:]}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table with aligned columns; line breaks are escaped and long cells are cut."""
    cells = [[str(value).replace("\n", "\\n") for value in row] for row in (header, *rows)]
    cells = [[c if len(c) <= 48 else c[:47] + "…" for c in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
