"""Results that a study measures part by part and keeps beside those of a run."""

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
    """A parser with the common options of these studies."""
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
    """Stores `measure(part, quick)` of each part under `key` of <name>-<ending>.json.

    Keeps the other parts in the file, and updates an existing report of that name.
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
    # Discard figures of another machine, version or setting.
    kept = earlier[key] if all(earlier.get(k) == v for k, v in stamp.items()) else {}
    for part in parts:
        kept[part] = measure(part, args.quick)
        # Write after every part, because the run may be interrupted.
        file.write_text(json.dumps({**stamp, key: kept}, indent=1) + "\n")
    if (run := args.out / f"{name}.json").exists():
        report = [sys.executable, "-m", "benchmarks.reports.suite", str(run.resolve())]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return file
