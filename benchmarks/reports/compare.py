"""Checks whether ours became slower, by ratios of times that were measured within one run.

    python -m benchmarks.reports.compare BASE.json [--new NEW.json] [--tolerance 0.1]

Times of two machines or two days cannot be compared. Each run therefore contains the times of
plain torch (eager) and of the machine's own rate (the limit), measured in the same rounds as ours.
Without --new the suite runs now, with the settings of BASE. A ratio is worse if it rose by more
than the tolerance and the spread of both runs, which is half of p20 to p80 on a log scale. With
fewer than five rounds it is at most unsure.
Exit status: 0 nothing is worse; 1 something is worse, a point of ours fails, or the new run fails;
2 nothing can be compared.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.tables import table

from .. import ROOT, divided, make_parser

TOLERANCE = 0.10
# Fewer rounds do not show the spread; that of one round is 0.
LEAST_ROUNDS = 5
# Two runs must agree in SAME, or their ratios differ in meaning; REMARKED are only mentioned.
SAME, REMARKED = ("device", "backend", "quick"), ("cpu", "threads", "cpu_capability", "torch")
Entry = dict[str, Any]
Point = tuple[str, str]


class Change(NamedTuple):
    """Ours over `other` in both runs, the allowed factor, and the smaller number of rounds."""

    point: Point
    other: str
    base: float
    new: float
    allowed: float
    tolerance: float
    rounds: int

    @property
    def factor(self) -> float:
        return self.new / self.base

    @property
    def verdict(self) -> str:
        if self.factor > self.allowed and self.rounds >= LEAST_ROUNDS:
            return "WORSE"
        if self.factor < 1 / self.allowed:
            return "better"
        # The change is above the tolerance but within the spread, or the rounds are too few. It
        # has to be measured again.
        return "unsure" if self.factor > 1 + self.tolerance else "same"


def points(data: Entry) -> dict[Point, Entry]:
    """Points that have a time, by test and shape; a test with another shape is another point."""
    found = {(b["name"], b["extra_info"]["label"]): b["extra_info"] for b in data["benchmarks"]}
    return {p: e for p, e in found.items() if "median" in e["providers"]["ours"]}


def others(entry: Entry) -> dict[str, str]:
    """What ours is compared with: the name in both runs -> the name of the provider."""
    return {"eager": "eager", "limit": entry["limit"]}


def ratio(entry: Entry, name: str) -> tuple[float, float, int] | None:
    """Ours over `name`, half of p20 to p80 of its logarithm, and its rounds; None without a time.

    It uses the ratios of single rounds, so that effects on a whole round cancel.
    """
    ratios = entry["providers"].get(name, {}).get("ours_over")
    if ratios is None:
        return None
    return ratios["median"], math.log(ratios["p80"] / ratios["p20"]) / 2, ratios["rounds"]


def changes(base: Entry, new: Entry, tolerance: float) -> Iterator[Change | str]:
    """The changes of all points in both runs; a line of text for a ratio that only one run has."""
    old, now = points(base), points(new)
    for point in (p for p in old if p in now):
        for other, name in others(old[point]).items():
            pair = [ratio(run, name) for run in (old[point], now[point])]
            if None in pair:
                have = " and ".join(w for w, r in zip(("base", "new"), pair, strict=True) if r)
                if have:
                    yield f"{title(point)}: ÷ {other} only in {have}"
                continue
            (before, spread, rounds), (after, spread_now, rounds_now) = pair
            allowed = (1 + tolerance) * math.exp(math.hypot(spread, spread_now))
            fewer = min(rounds, rounds_now)
            yield Change(point, other, before, after, allowed, tolerance, fewer)


def title(point: Point) -> str:
    return f"{point[0].removeprefix('test_')}, {point[1]}"


def unlike(base: Entry, new: Entry, keys: tuple[str, ...]) -> list[str]:
    pairs = ((k, base["machine_info"].get(k), new["machine_info"].get(k)) for k in keys)
    return [f"{k}: base {b}, new {n}" for k, b, n in pairs if b != n]


def compare(base: Entry, new: Entry, tolerance: float, status: int = 0) -> int:
    """Prints the comparison; returns the exit status. `status` is that of the new run."""
    for line in unlike(base, new, REMARKED):
        print(f"Not the same {line}")
    found = list(changes(base, new, tolerance))
    rows = [c for c in found if isinstance(c, Change)]
    reasons = unlike(base, new, SAME) + ([] if rows else ["no point is in both runs"])
    for line in reasons:
        print(f"Cannot be compared: {line}", file=sys.stderr)
    if reasons:
        return 2
    cells = []
    for c in sorted(rows, key=lambda c: c.allowed / c.factor):
        figures = f"{c.base:.3g}", f"{c.new:.3g}", f"{c.factor - 1:+.0%}", f"{c.allowed - 1:+.0%}"
        cells.append([title(c.point), c.other, *figures, c.verdict])
    head = ["point", "ours over", "base", "new", "change", "allowed", ""]
    print("\n".join(["", *table(head, cells, left=2, right=1), ""]))
    failures = [f"{f['op']} {f['label']} {f['mode']}" for f in new["failures"]]
    if status and not failures:
        # A point that raised during setup or timing is missing in the JSON.
        failures = [f"the run, with exit status {status}; a point may be missing, see its output"]
    old, now = points(base), points(new)
    listed = {
        "Fails now": failures,
        "Only in base": [title(p) for p in old if p not in now],
        "Only in new": [title(p) for p in now if p not in old],
        "One ratio missing": [c for c in found if isinstance(c, str)],
    }
    for what, lines in listed.items():
        for line in lines:
            print(f"{what}: {line}")
    counts = {v: sum(c.verdict == v for c in rows) for v in ("WORSE", "unsure", "same", "better")}
    summary = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    print(f"{len(rows)} ratios of {len({c.point for c in rows})} points: {summary}.")
    return 1 if counts["WORSE"] or failures else 0


def measure(base: Entry, folder: Path, rest: list[str]) -> tuple[Entry, int]:
    """Runs the suite for a comparison; returns results and exit status, or exits without any."""
    machine = base["machine_info"]
    command = [sys.executable, "-m", "benchmarks.run", "new", "--out", str(folder)]
    command += ["--device", "cpu" if machine["device"] == "cpu" else "cuda"]
    command += ["--backend", machine["backend"], "--providers", "eager"]
    command += [f"--{option}" for option in ("quick", "full") if machine.get(option)]
    status = subprocess.run([*command, *(["--", *rest] if rest else [])], cwd=ROOT).returncode
    file = folder / "new.json"
    if not file.exists():
        print("Cannot be compared: the run wrote no results", file=sys.stderr)
        sys.exit(2)
    return json.loads(file.read_text()), status


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("base", type=Path, help="JSON of the earlier run")
    parser.add_argument("--new", type=Path, help="JSON of the later run; default: run it now")
    rise = "rise that is no matter; default 0.1"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=rise)
    own, rest = divided(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    base = json.loads(args.base.read_text())
    if args.new is not None:
        return compare(base, json.loads(args.new.read_text()), args.tolerance)
    with tempfile.TemporaryDirectory() as folder:
        new, status = measure(base, Path(folder), rest)
    return compare(base, new, args.tolerance, status)


if __name__ == "__main__":
    sys.exit(main())
