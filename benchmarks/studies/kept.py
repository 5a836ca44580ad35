"""Results that are measured part by part beside a run's, as `growth` and `whole_step` are."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk

from .. import RESULTS, ROOT, make_parser
from ..run import default_name


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both have."""
    result = make_parser(description)
    result.add_argument("name", nargs="?", help="name of the results; default: the machine")
    result.add_argument("--quick", action="store_true", help="small shapes: not a measurement")
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return result


def measured(
    args: argparse.Namespace,
    ending: str,
    key: str,
    parts: Iterable[str],
    measure: Callable[[str, bool], Any],
) -> Path:
    """`measure(part, quick)` of each part, under `key` of <name>-<ending>.json; others stay there.

    A report of that name is written again.
    """
    name = args.name or default_name("cpu", args.quick)
    file = args.out / f"{name}-{ending}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    stamp = {
        "cpu": default_name("cpu", False),
        "rlhf_kernels": rk.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "quick": args.quick,
    }
    earlier = json.loads(file.read_text()) if file.exists() else {}
    # Figures of another machine or version must not stand beside these.
    kept = earlier[key] if all(earlier.get(k) == v for k, v in stamp.items()) else {}
    for part in parts:
        kept[part] = measure(part, args.quick)
        # At once: the run may be cut off.
        file.write_text(json.dumps({**stamp, key: kept}, indent=1) + "\n")
    if (run := args.out / f"{name}.json").exists():
        report = [sys.executable, "-m", "benchmarks.reports.suite", str(run.resolve())]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return file
