"""Measures the peak memory of the points of docs/benchmarks.md, each provider in a fresh process.

    python -m benchmarks.studies.memory benchmarks/results/<name>.json

replaces the peaks in the JSON, which a process measured that had run other providers before.
`run.py --full` includes it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from .. import make_parser
from ..harness.memory import elsewhere
from ..reports.suite import README, README_HEAD, holds_logits

PROVIDERS = ("ours", "eager", "compile", "trl")


def fresh(point: str, provider: str, machine: dict[str, Any]) -> dict[str, int | None]:
    """`measured` of one provider at a point of the suite (its node id), in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak.json"
        words = ["pytest", point, "--full", "--peak", provider, str(file), "-p", "no:cacheprovider"]
        words += ["--backend", machine["backend"], *(["--quick"] if machine["quick"] else [])]
        elsewhere(*words)
        return json.loads(file.read_text())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("json", type=Path, help="results of a run on a CPU")
    file = parser.parse_args().json
    data = json.loads(file.read_text())
    for point in data["benchmarks"]:
        if point["name"] not in (*README, *README_HEAD) or not holds_logits(point["extra_info"]):
            continue
        for name, figures in point["extra_info"]["providers"].items():
            if name in PROVIDERS and "median" in figures and not figures.get("fresh"):
                found = fresh(point["fullname"], name, data["machine_info"])
                figures |= {**found, "fresh": True}
                print(point["name"], name, found, flush=True)
        # Write after every point, because the run may be interrupted.
        file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
