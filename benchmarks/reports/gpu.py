"""The report of `make gpu-check`: report.json and report.md from the results of its parts."""

import json
import re
from pathlib import Path
from typing import Any

from tools.tables import microseconds, multiple, table

from .. import ROOT
from ..gpu.keep import write_text
from ..gpu.ncu import short_name
from . import suite

PEERS = {"eager": "eager", "compile": "compile", **suite.PEERS}
Results = dict[str, dict[str, Any]]


def verdict(point: dict[str, Any], quick: bool) -> str:
    """Whether each target of a point is met; empty for a quick run, which has other shapes."""
    if quick or "median" not in point["providers"]["ours"]:
        return ""
    lines = [suite.target_text(point, quick)] if point["targets"] else []
    for key, most in point["at_most"].items():
        found = point["providers"]["ours"].get(key)
        if found is None:
            continue
        what = "host" if key == "host" else "time"
        verb = "missed" if found > most else "met"
        lines.append(f"{verb}: {what} ≤ {microseconds(most)} µs")
    return "; ".join(lines)


def wanted(point: dict[str, Any]) -> str:
    """The targets in words."""
    words = []
    for name, least in point["targets"].items():
        words.append(f"{least:.0%} of {name}" if name in suite.LIMITS else f"{least:g}× {name}")
    for key, most in point["at_most"].items():
        words.append(f"{'host ' if key == 'host' else ''}≤ {microseconds(most)} µs")
    return ", ".join(words)


def _cells(point: dict[str, Any], peers: list[str], several: bool, quick: bool) -> list[str]:
    ours = point["providers"]["ours"]
    name = f"{point['op']}, {point['mode']}" + (f", {point['backend']}" if several else "")
    if "median" not in ours:
        failed = f"failed: {ours.get('error', 'no time')}"
        return [name, point["label"], failed, *[""] * (len(peers) + 7)]
    spread = f"{microseconds(ours['p20'])}–{microseconds(ours['p80'])}"
    cells = [name, point["label"], microseconds(ours["median"]), spread]
    cells.append(microseconds(ours["host"]) if "host" in ours else "–")
    peak = ours.get("peak_bytes")
    cells.append("–" if peak is None else f"{peak / 2**20:.1f}")
    cells.append(f"{point['moved'] / ours['median'] / 1e9:.0f}")
    limit = suite.of_limit(point)
    cells.append("–" if limit is None else f"{limit:.0%} {point['limit']}")
    cells += [multiple(suite.ratio(point, p)) for p in peers]
    return [*cells, wanted(point), verdict(point, quick)]


def bench_lines(points: list[dict[str, Any]], quick: bool) -> list[str]:
    if not points:
        return []
    points = sorted(points, key=suite.position)
    peers = [p for p in PEERS if any(suite.ratio(x, p) is not None for x in points)]
    head = ["operation", "shape", "ours, µs", "p20–p80", "host, µs", "peak MiB", "GB/s"]
    head += ["of the limit", *(f"÷ {PEERS[p]}" for p in peers), "target", "verdict"]
    several = len({p.get("backend") for p in points}) > 1
    rows = [_cells(p, peers, several, quick) for p in points]
    lines = ["## Benchmarks", "", *table(head, rows, left=2, right=2)]
    lines += [
        "",
        "Medians of device time by events, cold cache; ÷ x: time of x over ours. Host: time until "
        "the call returns. GB/s: bytes that the operation must move at least, over its time. Of "
        "the limit: time of a copy of as many bytes in the same rounds, over ours.",
    ]
    lines += suite.problem_lines(points)
    lines += ["", "cut-cross-entropy has no operation on logits: it starts at the hidden states."]
    return lines


def points_of(results: Results) -> list[dict[str, Any]]:
    """The points of both benchmark parts; a point of both is taken from the part with peers."""
    found: dict[tuple, dict[str, Any]] = {}
    for part in ("ours", "peers"):
        for point in results.get(part, {}).get("points", []):
            key = tuple(point.get(k) for k in ("op", "label", "mode", "backend"))
            if part == "ours" or "median" in point["providers"]["ours"] or key not in found:
                found[key] = point
    return list(found.values())


def counter_lines(kernels: list[dict[str, Any]]) -> list[str]:
    """The hardware counters of each kernel."""
    if not kernels:
        return []
    names = [k for k in kernels[0] if k not in ("call", "backend", "kernel")]
    rows = []
    for found in kernels:
        cells = ["–" if found[n] is None else f"{found[n]:,.4g}" for n in names]
        rows.append([found["call"], found["backend"], short_name(found["kernel"]), *cells])
    head = ["call", "backend", "kernel", *names]
    lines = ["", "## Hardware counters", "", *table(head, rows, left=3)]
    return [
        *lines,
        "",
        "Of one launch each, with the clocks as they were. Sectors are of 32 bytes.",
    ]


def launch_lines(launches: dict[str, Any] | None) -> list[str]:
    if not launches:
        return []
    if launches.get("reason"):
        return ["", f"Launches were not counted: {launches['reason']}."]
    rows, size = launches["shape"]
    lines = ["", f"## Launches per call, every option on, {rows}×{size}", ""]
    counts = {
        name: [str(ways[w]["count"]) if w in ways else "–" for w in ("forward", "backward")]
        for name, ways in launches["operations"].items()
    }
    lines += table(["operation", "forward", "backward"], [[n, *c] for n, c in counts.items()])
    return lines


def _machine_lines(env: dict[str, Any], commits: set[str | None]) -> list[str]:
    commit = ", ".join(sorted((c or "unknown")[:12] for c in commits)) or "unknown"
    if "date" not in env:
        return [f"- commit {commit}; the machine is not known: the part `env` has no result"]
    device, doctor = env.get("device") or {}, env.get("doctor") or {}
    versions = ", ".join(f"{k} {v}" for k, v in doctor.get("versions", {}).items())
    memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
    lines = [f"- device: {device.get('name', 'unknown')}{memory}"]
    lines += [f"- driver: {env['driver']}"] if env.get("driver") else []
    lines.append(f"- versions: {versions}")
    dirty = " with local changes" if env.get("dirty") else ""
    lines.append(f"- {env['date']} UTC, commit {commit}{dirty}")
    if device:
        rates = device["bytes_per_second"]
        lines.append(
            f"- copy {rates['copy'] / 1e9:.0f} GB/s (read + written), read "
            f"{rates['read'] / 1e9:.0f} GB/s, on {device['rate_tensor_bytes'] / 2**30:.2g} GiB"
        )
    if env.get("missing"):
        lines.append(f"- not installed: {', '.join(env['missing'])}")
    return lines


def markdown(results: Results, quick: bool) -> str:
    lines = ["# GPU check" + (" (dry run: not a measurement)" if quick else ""), ""]
    lines += _machine_lines(results.get("env", {}), {r.get("commit") for r in results.values()})
    rows = []
    for name, r in results.items():
        counts = [str(r.get(k, "–")) for k in ("passed", "failed", "skipped")]
        reason = f": {r['reason']}" if "reason" in r else ""
        rows.append([name, r["status"] + reason, *counts, str(r["seconds"])])
    head = ["part", "outcome", "passed", "failed", "skipped", "s"]
    lines += ["", *table(head, rows, left=2)]
    tools = results.get("sanitizer", {}).get("tools")
    if tools:
        lines += ["", "compute-sanitizer: " + ", ".join(f"{k} {v}" for k, v in tools.items())]
    lines += ["", *bench_lines(points_of(results), quick)]
    lines += counter_lines(results.get("ncu", {}).get("kernels", []))
    lines += launch_lines(results.get("launches", {}).get("launches"))
    failures = [f"{name}: {f}" for name, r in results.items() for f in r.get("failures", [])]
    if failures:
        lines += ["", "## Failures", "", *("- " + f.replace("\n", " ⏎ ") for f in failures)]
    skips = {f"{n}: {s} ({c})" for n, r in results.items() for s, c in r.get("skips", {}).items()}
    if skips:
        lines += ["", "Skipped tests:", "", *(f"- {s}" for s in sorted(skips))]
    return "\n".join(lines) + "\n"


def without_machine(value: Any, folders: tuple[str, ...]) -> Any:
    """`value` without names of folders on this machine, because the report may be published."""
    if isinstance(value, dict):
        return {k: without_machine(v, folders) for k, v in value.items()}
    if isinstance(value, list):
        return [without_machine(v, folders) for v in value]
    if isinstance(value, str):
        for folder in folders:
            value = value.replace(folder, "…")
        # Also remove other paths, which may be in a home folder or an environment.
        value = re.sub(r"(/[\w.@+-]+){2,}/(?=[\w.@+-]+)", "…/", value)
    return value


def write(results: Results, out: Path, *, quick: bool) -> None:
    """Writes report.json and report.md to `out`."""
    cleaned = without_machine(results, (str(ROOT), str(out), str(Path.home()) + "/"))
    doctor = cleaned.get("env", {}).get("doctor")
    if doctor:
        # Environment variables of the shell may hold private data.
        doctor.pop("environment", None)
    write_text(out / "report.json", json.dumps({"quick": quick, **cleaned}, indent=1))
    write_text(out / "report.md", markdown(cleaned, quick))
