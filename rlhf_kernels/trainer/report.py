"""What a run leaves behind: metrics log, curves, sample table and kernel timing."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

import rlhf_kernels as rk

from .recorder import Call

matplotlib.use("Agg")

import matplotlib.pyplot as plt


class MetricsLog:
    """One JSON object per line, flushed at each step so that a killed run keeps its log.

    A run that continues from `steps_done` keeps the rows before and drops what came later.
    """

    def __init__(self, path: Path, *, steps_done: int = 0) -> None:
        self.rows: list[dict[str, float]] = []
        kept = []
        if steps_done and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in map(_parsed, lines) if row and row["step"] < steps_done]
        self.file = path.open("w", encoding="utf-8")
        for row in kept:
            self.write(row)

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _parsed(line: str) -> dict[str, float] | None:
    """A row of the log; None where a kill cut it off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


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
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)


def _cell(value: Any, limit: int = 48) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _seconds(call: Call, device: torch.device) -> float:
    """Wall time of a recorded call, backward included where its inputs took gradients."""
    start = time.perf_counter()
    with torch.set_grad_enabled(call.grad):
        result = call.function(*call.args, **call.kwargs)
    outputs = [t for t in result if isinstance(t, torch.Tensor) and t.requires_grad]
    if outputs:
        inputs = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor)]
        leaves = [t for t in inputs if t.requires_grad]
        # An entropy without a bonus is measured, not differentiated.
        ones = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_kernels(
    calls: Sequence[Call], *, steps: int, device: torch.device, repeats: int = 7
) -> list[dict[str, Any]]:
    """Replay the recorded calls on the default backend and on `reference`.

    Forward, and backward where the run took one. The two alternate, and each call counts by the
    median of its repeats after one warm-up, so that a drifting clock favours neither.

    Returns:
        One dict per function: calls and milliseconds per step, and their ratio.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for call in calls:
        seconds: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1):
            ours = _seconds(call, device)
            with rk.use_backend("reference"):
                theirs = _seconds(call, device)
            if repeat:
                seconds[0].append(ours)
                seconds[1].append(theirs)
        total = sums[call.function.__name__]
        total[0] += 1
        total[1] += statistics.median(seconds[0])
        total[2] += statistics.median(seconds[1])
    return [
        {
            "function": name,
            "calls_per_step": calls / steps,
            "ms_per_step": 1e3 * ours / steps,
            "reference_ms_per_step": 1e3 * theirs / steps,
            "ratio": theirs / ours,
        }
        for name, (calls, ours, theirs) in sums.items()
    ]


def timing_table(timing: Sequence[dict[str, Any]], step_ms: float) -> str:
    """The result of `time_kernels` for a terminal, with its share of a whole step."""
    rows = [
        (
            t["function"],
            f"{t['calls_per_step']:g}",
            f"{t['ms_per_step']:.2f}",
            f"{t['reference_ms_per_step']:.2f}",
            f"{t['ratio']:.2f}x",
        )
        for t in timing
    ]
    ours = sum(t["ms_per_step"] for t in timing)
    theirs = sum(t["reference_ms_per_step"] for t in timing)
    rows.append(("all", "", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x"))
    header = ("kernel time per step", "calls", "ours ms", "reference ms", "ratio")
    share = f"A whole step took {step_ms:.0f} ms: {ours / step_ms:.1%} of it in these calls."
    return table(header, rows) + "\n" + share
