"""Turns a benchmark JSON into the README's table (Markdown) and picture (PNG).

    python benchmarks/report.py benchmarks/results/<name>.json

Writes <name>.md and <name>.png beside the JSON and prints the Markdown.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

PEERS = {"trl": "TRL", "verl": "verl", "liger": "Liger", "torch fused": "torch fused"}
#: What bounds an operation: a share of it is reached.
LIMITS = ("copy", "read", "GEMMs")
# Rows in the order of a training step; operations not listed come last.
ORDER = ("token_logprobs", "linear_", "kl_", "gae", "ppo_", "group_", "policy_", "value_")
Entry = dict[str, Any]


def ratio(entry: Entry, *names: str) -> float | None:
    """Time of the fastest of `names` over ours, or None if none of them has a time."""
    providers = entry["providers"]
    times = [providers[n]["median"] for n in names if "median" in providers.get(n, {})]
    if not times or "median" not in providers["ours"]:
        return None
    return min(times) / providers["ours"]["median"]


def of_limit(entry: Entry) -> float | None:
    """Fraction of the machine's copy or read rate."""
    return ratio(entry, entry["limit"])


def judged(entry: Entry) -> list[tuple[str, float, float]]:
    """(provider, least ratio wanted, ratio measured) of each target that could be measured."""
    found = ((n, least, ratio(entry, n)) for n, least in entry["targets"].items())
    return [(n, least, r) for n, least, r in found if r is not None]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def multiple(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}×" if value >= 99.5 else f"{value:.2g}×"


def position(entry: Entry) -> int:
    """Where the operation stands in ORDER."""
    return next((i for i, o in enumerate(ORDER) if entry["op"].startswith(o)), len(ORDER))


def target_text(entry: Entry, quick: bool) -> str:
    """Whether the targets are met, and else which of them is not; they are about real shapes."""
    if quick or not entry["targets"]:
        return ""
    results = judged(entry)
    missed = [
        f"{name} {least:.0%}" if name in LIMITS else f"{name} {least:.3g}×"
        for name, least, r in results
        if r < least
    ]
    if missed:
        return "missed: " + ", ".join(missed)
    unknown = ", ".join(n for n in entry["targets"] if ratio(entry, n) is None)
    return "met" + (f"; not measured: {unknown}" if unknown else "")


def environment(data: Entry) -> str:
    m, commit = data["machine_info"], data["commit_info"]
    peers = ", ".join(f"{k} {v}" for k, v in m["peers"].items()) or "none installed"
    dirty = " (with local changes)" if commit.get("dirty") else ""
    return (
        f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['cpu_capability']}; device "
        f"{m['device']}, backend {m['backend']}; torch {m['torch']}, Python {m['python']}; peers: "
        f"{peers}; {data['datetime'][:10]}, commit {str(commit.get('id'))[:12]}{dirty}"
        + ("; QUICK shapes: not a measurement" if m["quick"] else "")
    )


def table(entries: list[Entry], quick: bool) -> list[str]:
    peers = [p for p in PEERS if any(ratio(e, p) is not None for e in entries)]
    head = ["operation", "shape", "ours, ms", "÷ eager", "÷ compile"]
    head += [*(f"÷ {PEERS[p]}" for p in peers), "of the limit", "target"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    for e in entries:
        limit = of_limit(e)
        ours = milliseconds(e["providers"]["ours"]["median"])
        cells = [f"{e['op']}, {e['mode']}", e["label"], ours]
        cells += [multiple(ratio(e, "eager")), multiple(ratio(e, "compile", "vectorized"))]
        cells += [multiple(ratio(e, p)) for p in peers]
        cells += ["–" if limit is None else f"{limit:.0%} {e['limit']}", target_text(e, quick)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def memory_lines(entries: list[Entry]) -> list[str]:
    """Peak memory beyond the inputs, forward + backward, where logits are; result included."""
    lines = []
    for e in entries:
        if e["mode"] != "forward+backward" or not e["op"].startswith(("token_logprobs", "linear_")):
            continue
        peaks = {n: p["peak_bytes"] for n, p in e["providers"].items() if p.get("peak_bytes")}
        if "ours" in peaks:
            row = ", ".join(f"{n} {peaks[n] / 2**20:.0f}" for n in peaks)
            lines.append(f"- {e['op']}, {e['label']}: {row}")
    heading = "Peak memory beyond the inputs, forward+backward, results included, MiB:"
    return ["", heading, "", *lines] if lines else []


def problem_lines(data: Entry, entries: list[Entry]) -> list[str]:
    """Points without a time, and why; each reason once."""
    found: dict[str, list[str]] = {}
    for e in [*entries, *data["failures"]]:
        for name, p in e["providers"].items():
            reason = p.get("error") or p.get("skipped")
            if reason:
                kind = "failed" if "error" in p else "skipped"
                point = f"{e['op']} {e['label']} {e['mode']}"
                found.setdefault(f"{name} {kind}: {reason}", []).append(point)
    lines = []
    for reason, points in found.items():
        where = points[0] if len(points) == 1 else f"{len(points)} points"
        lines.append(f"- {reason} ({where})")
    return ["", "Without a time:", "", *lines] if lines else []


def rates_line(entries: list[Entry]) -> str:
    """Median machine rates over the points that are too large for a core's own cache."""
    words = []
    for name in ("copy", "read"):
        large = (e for e in entries if e["moved"] >= 1 << 26 and "median" in e["providers"][name])
        rates = [e["moved"] / e["providers"][name]["median"] / 1e9 for e in large]
        words += [f"{name} {statistics.median(rates):.1f} GB/s"] if rates else []
    return f"Machine, same run: {', '.join(words)}." if words else ""


def markdown(data: Entry, entries: list[Entry]) -> str:
    lines = [
        environment(data) + ".",
        rates_line(entries),
        "",
        *table(entries, data["machine_info"]["quick"]),
        "",
    ]
    lines += [
        "Medians. ÷ x: time of x over ours. ÷ compile: `torch.compile` of eager; for the "
        "advantages, the faster of a vectorised torch form and its compilation. Of the limit: time "
        "in which the machine copies (`tensor.clone()`, bytes read + written) or reads "
        "(`tensor.sum()` of fp32) as many bytes as the operation must move, over ours; for the "
        "fused head, time of its bare products (three or four `torch.mm(out=)` over all tokens)."
    ]
    return "\n".join([*lines, *memory_lines(entries), *problem_lines(data, entries)]) + "\n"


def picture(entries: list[Entry], file: Path, note: str) -> None:
    """Horizontal bars, logarithmic: how many times faster than eager and than torch.compile.

    Of the points that have targets; the table has all. Backward alone is left to the table too.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [e for e in entries if e["targets"] and e["mode"] != "backward"][::-1]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.42 * len(shown)), layout="constrained")
    eager = ("eager", ("eager",), "#9aa5b1", 0.2)
    compiled = ("torch.compile", ("compile", "vectorized"), "#2f6db5", -0.2)
    for label, names, colour, offset in (eager, compiled):
        bars = [(y + offset, r) for y, e in enumerate(shown) if (r := ratio(e, *names)) is not None]
        ys, ratios = [y for y, _ in bars], [r for _, r in bars]
        # From 1, so that what is slower points the other way.
        widths = [r - 1 for r in ratios]
        drawn = axes.barh(ys, widths, 0.38, left=1, color=colour, label=f"over {label}")
        axes.bar_label(drawn, [multiple(r) for r in ratios], padding=3, fontsize=8)
    names = [f"{e['op']}, {e['mode']}\n{e['label']}" for e in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times faster (median, same run)\n{note}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(json_file: Path) -> None:
    data = json.loads(json_file.read_text())
    entries = sorted((b["extra_info"] for b in data["benchmarks"]), key=position)
    text = markdown(data, entries)
    json_file.with_suffix(".md").write_text(text)
    m = data["machine_info"]
    note = f"{m['cpu']}, {m['threads']} cores, torch {m['torch']}, {data['datetime'][:10]}"
    if entries:
        picture(entries, json_file.with_suffix(".png"), note)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
