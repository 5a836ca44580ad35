"""What a run leaves behind and tells: metrics log, curves, tables, time of our kernels."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt


class Stopwatch:
    """Calls kernels and adds up their time; a GPU's by events, so that nothing waits for it."""

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = self._now()
        result = function(*args, **kwargs)
        self.spans.append((start, self._now()))
        return result

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_initialized():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Time of the calls since it was asked last."""
        spans, self.spans = self.spans, []
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in spans) / 1e3
        return sum(end - start for start, end in spans)


#: Every call of a kernel in the online step goes through it.
kernel = Stopwatch()


def peak_memory_gib() -> float:
    """Most memory held so far: the GPU's tensors, without one the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class MetricsLog:
    """One JSON object per line, flushed at each step so that a killed run keeps its log.

    A run that continues from `steps_done` keeps the rows before and drops what came later.
    """

    def __init__(self, path: Path, *, steps_done: int = 0) -> None:
        self.rows: list[dict[str, float]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.file = path.open("w", encoding="utf-8")
        # A kill may have cut off the line after those.
        for line in lines[:steps_done]:
            self.write(json.loads(line))

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


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
    """What the run logged of reward, KL, entropy, length, loss, accuracy and margin, as a PNG."""
    shown = {key: title for key, title in _CURVES.items() if rows and key in rows[0]}
    size = (4 * len(shown), 3.4)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for axis, (key, title) in zip(axes[0], shown.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned for a terminal; line breaks are shown, long cells are cut."""
    cells = [[str(value).replace("\n", "\\n") for value in row] for row in (header, *rows)]
    cells = [[c if len(c) <= 48 else c[:47] + "…" for c in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
