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

from .ppo import Recorder

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen before)


class MetricsLog:
    """One JSON object per line, flushed at each step so that a killed run keeps its log."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, float]] = []
        self.file = path.open("w", encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def plot_curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Reward, KL to the reference and entropy over the steps, as one PNG."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    titles = {"reward": "mean reward", "kl": "KL to reference, per completion", "entropy": "entropy per token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set(title=title, xlabel="PPO step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned for a terminal; line breaks are shown, long cells are cut."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _cell(value: Any, limit: int = 48) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _run(function: Any, args: Any, kwargs: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        result = function(*args, **kwargs)
        parts = (result.loss,) if hasattr(result, "loss") else tuple(result)
        loss = sum(p.sum() for p in parts if isinstance(p, torch.Tensor) and p.requires_grad)
    if isinstance(loss, torch.Tensor):
        leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.grad(loss, leaves)


def _seconds(call: Any, device: torch.device) -> float:
    start = time.perf_counter()
    _run(*call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_kernels(recorder: Recorder, *, steps: int, device: torch.device, repeats: int = 7) -> list[dict[str, Any]]:
    """Replay the recorded calls on the default backends and on `reference`.

    Forward, and backward where the run took one. The two alternate call by call, and each call counts by the median
    of its repeats, so that a drifting clock favours neither.

    Returns:
        One dict per function: calls and milliseconds per PPO step, and their ratio.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for call in recorder.calls:
        seconds: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1):
            ours = _seconds(call, device)
            with rk.use_backend("reference"):
                theirs = _seconds(call, device)
            if repeat:
                seconds[0].append(ours)
                seconds[1].append(theirs)
        total = sums[call[0].__name__]
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
