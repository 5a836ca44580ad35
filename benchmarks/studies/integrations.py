"""Compares each trainer's own code with and without our patch.

    python -m benchmarks.studies.integrations [--only NAME ...] [--date 2026-01-31]

measures the rows whose name begins with a NAME, adds them to results/integrations.json, and writes
results/integrations.md from all rows. A row is measured in one process in which theirs and ours
take turns, so only its ratios are meaningful.
"""

import argparse
import contextlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch

from tools.tables import table

from .. import RESULTS
from ..harness.clocks import device_name
from ..run import cpu_model
from .integration_rows import DEVICE, Row, openrlhf_rows, trl_rows, verl_rows


def machine() -> str:
    on_cpu = f"{cpu_model()}, {torch.get_num_threads()} threads"
    return on_cpu if DEVICE.type == "cpu" else device_name(DEVICE)


def number(x: float | None, unit: str = "") -> str:
    if x is None:
        return "–"
    if x == 0:
        return "0"
    return f"{x:.1e}" if not unit else f"{x:.2g}{unit}" if x < 10 else f"{x:.0f}{unit}"


def render(store: dict[str, Any]) -> str:
    """The table of results/integrations.json."""
    lines = [
        "# Trainers with and without the patch",
        "",
        f"{store['machine']}; {store['date']}; {store['versions']}.",
        "Written by `python -m benchmarks.studies.integrations`.",
        "",
        "Differences are relative to the unpatched run: of the loss (at least to 1, or of the",
        "estimates, to their largest) and of the norm of its gradient; for TRL the largest over",
        "4 steps of training, whose rounding the optimizer carries on. Time and memory are theirs",
        "÷ ours, for loss and backward of TRL's trainers without generation, and for the whole",
        "call elsewhere; memory is the peak above the start, – where that is below 8 MiB.",
        "",
    ]
    rows = []
    for row in (Row(*r) for r in store["rows"].values()):
        cells = (number(row.values), number(row.gradients), number(row.time, "×"))
        rows.append([row.name, *cells, number(row.memory, "×")])
    head = ["trainer, loss or estimator", "loss", "gradient norm", "time", "memory"]
    return "\n".join([*lines, *table(head, rows), "", *store["notes"], ""])


NOTES = (
    "- In bfloat16 theirs rounds logits or log-probabilities to 8 bits; the differences are its.",
    "- Reward is a classifier without a head: nothing of it is replaced.",
    "- OpenRLHF's KL estimates are a pass or two; ours has its clamp as a pass of its own.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="how the rows' names begin")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--out", type=Path, default=RESULTS / "integrations.json")
    parser.add_argument("--render", action="store_true", help="write the table again, run nothing")
    options = parser.parse_args()
    store = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    store["notes"] = NOTES
    if not options.render:
        versions = []
        for name in ("torch", "transformers", "trl", "verl", "openrlhf"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{name} {importlib.metadata.version(name)}")
        store |= {"machine": machine(), "date": options.date, "versions": ", ".join(versions)}
        makers = {"TRL": trl_rows, "verl": verl_rows, "OpenRLHF": openrlhf_rows}
        for trainer, make in makers.items():
            # Do not import trainers that --only excludes.
            if not any(w.startswith(trainer) or trainer.startswith(w) for w in options.only):
                continue
            for name, measure in make():
                if name.startswith(tuple(options.only)):
                    store["rows"][name] = row = measure()
                    print(row, flush=True)
                    options.out.write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n")
    options.out.with_suffix(".md").write_text(render(json.loads(json.dumps(store))))


if __name__ == "__main__":
    main()
