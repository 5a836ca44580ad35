"""Growth curves of results/<name>-growth.json as a table and as charts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tools.tables import mebibytes, milliseconds, table

from . import charts

#: Less memory counts as none, because the allocator and autograd need some themselves.
NO_BYTES = 1 << 20
#: The allowed distance of the fit from the expected slope: caches and overheads bend a line.
NEAR = 0.15
#: For each figure: its key in the JSON, the key of its expected slope, plot label and unit.
KINDS = (
    ("seconds", "time", "time, ms", 1e3),
    ("bytes", "memory", "memory beyond results, MiB", 1 / 2**20),
)
Curve = dict[str, Any]


def fit(xs: list[int], ys: list[float]) -> tuple[float, float]:
    """Slope of log y over log x, and its standard error; 1 is linear growth, 0 is none."""
    x, y = np.log(xs), np.log(ys)
    # A line through two points has no error.
    if len(xs) == 2:
        return float(np.polyfit(x, y, 1)[0]), 0.0
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    # Rounding turns a slope of -1e-17 into 0.
    return round(float(slope), 9) + 0.0, float(np.sqrt(max(covariance[0, 0], 0.0)))


def series(curve: Curve, what: str) -> dict[str, list[float]]:
    """The figures of each provider along the curve: "seconds", or "bytes" of at least NO_BYTES."""
    points = curve[what]
    if points is None or any(v is None for p in points for v in p.values()):
        return {}
    least = NO_BYTES if what == "bytes" else 0
    return {name: [max(least, p[name]) for p in points] for name in points[0]}


def slope_text(xs: list[int], ys: list[float]) -> str:
    slope, error = fit(xs, ys)
    return f"{slope:.2f} ± {error:.2f}" if len(xs) > 2 else f"{slope:.2f}"


def verdict(xs: list[int], ys: list[float], expected: float) -> str:
    slope, error = fit(xs, ys)
    off = abs(slope - expected)
    if off <= NEAR:
        return "as expected"
    # Less growth than expected has to be explained too.
    return "unsure" if off <= NEAR + 2 * error else "**not as expected**"


def _size(value: float, what: str) -> str:
    if what == "seconds":
        return f"{milliseconds(value)} ms" if value < 0.9995 else f"{value:.3g} s"
    return "none" if value <= NO_BYTES else f"{mebibytes(value)} MiB"


def rows(curves: dict[str, list[Curve]]) -> list[list[str]]:
    found = []
    for op, parts in curves.items():
        for curve in parts:
            xs = curve["xs"]
            for what, key, *_ in KINDS:
                ys = series(curve, what)
                if "ours" not in ys:
                    continue
                where = f"{curve['axis']} {xs[0]}–{xs[-1]}, {curve['fixed']}"
                expected = curve["expected"][key]
                others = [n for n in ys if n != "ours"]
                cells = [op, where, key, f"{expected:.0f}", slope_text(xs, ys["ours"])]
                cells.append(verdict(xs, ys["ours"], expected))
                cells.append("; ".join(f"{n} {slope_text(xs, ys[n])}" for n in others))
                cells.append(", ".join(f"{n} {_size(ys[n][-1], what)}" for n in ys))
                found.append(cells)
    return found


HEAD = ("operation", "along", "of", "expected slope", "ours", "", "others", "at the largest")


def _plot(curve: Curve, what: str, key: str, label: str, unit: float) -> charts.Plot:
    ys = {n: [y * unit for y in v] for n, v in series(curve, what).items()}
    names = {n: f"{n}: slope {slope_text(curve['xs'], v)}" for n, v in ys.items()}
    axis = f"{curve['axis']} ({curve['fixed']})"
    return charts.Plot(axis, label, curve["xs"], ys, names, curve["expected"][key])


def picture_file(file: Path, op: str) -> Path:
    name = re.split(r"[^a-z_]", op)[0].replace("_", "-")
    return file.with_name(f"{file.stem}-{name}.svg")


def lines(file: Path) -> list[str]:
    """The section of the report; writes a chart of each operation beside the JSON."""
    data = json.loads(file.read_text())
    # On one core there is no curve over threads.
    curves = {op: [c for c in p if len(c["xs"]) > 1] for op, p in data["curves"].items()}
    found = [
        f"{data['threads']} threads, torch {data['torch']}"
        + ("; QUICK shapes: not a measurement." if data["quick"] else "."),
        "Slopes of the logarithms, fitted to all points: 1 is linear, 0 constant, -1 halves with "
        "each doubling. Memory is beyond inputs and results.",
        "",
        *table(HEAD, rows(curves), left=3, right=3),
    ]
    for op, parts in curves.items():
        picture = picture_file(file, op)
        charts.curves([[_plot(c, *kind) for kind in KINDS] for c in parts], picture, op)
        found += ["", f"![{op}]({picture.name})"]
    return found
