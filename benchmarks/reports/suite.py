"""Turns a benchmark JSON into a report: tables (Markdown) and a chart (SVG).

    python -m benchmarks.reports.suite benchmarks/results/<name>.json [--readme]

Writes <name>.md, <name>.svg and the README's picture <name>-short.svg beside the JSON and prints
the Markdown. Results of `growth` and `whole_step` under the same name become sections. With
--readme it only prints the tables of docs/benchmarks.md.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.tables import bold_if, mebibytes, milliseconds, multiple, table

from .. import make_parser
from ..harness.rounds import STEADY
from . import charts, growth, step

PEERS = {"trl": "TRL", "verl": "verl", "liger": "Liger", "torch fused": "torch fused"}
PEERS |= {"cce": "CCE", "quack": "QuACK", "flash-attn": "flash-attn", "trl kernel": "TRL kernel"}
#: Bounds of an operation; reports show which share of its bound it reaches.
LIMITS = ("copy", "read", "GEMMs")
# Rows follow the order of a training step; operations not listed come last.
ORDER = ("token_logprobs", "linear_", "kl_", "gae", "ppo_", "group_", "policy_", "value_")
Entry = dict[str, Any]


def _logprobs(shape: str) -> tuple[str, ...]:
    kinds = ("logprobs", "entropy")
    modes = ("forward", "backward", "forward+backward")
    return tuple(f"test_token_logprobs[{shape}-{k}-{m}]" for k in kinds for m in modes)


#: The points of the design's table of CPU targets, in its order.
TARGETED = (
    *(p for s in ("fp32", "bf16", "bf16-2048x32768", "fp32-256x151936") for p in _logprobs(s)),
    "test_kl_divergence[fp32-forward]",
    *("test_gae[512x4096]", "test_gae[16x131072]", "test_gae_packed[512]"),
    *("test_policy_loss[64x2048]", "test_policy_loss[2048x2048]"),
    *("test_linear_policy_loss[fp32]", "test_linear_policy_loss[bf16]"),
    *("test_linear_token_logprobs[fp32-logprobs]", "test_linear_token_logprobs[bf16-logprobs]"),
)
#: The rows of two tables of docs/benchmarks.md; the second is for the head, and shows memory.
README = (
    *(_logprobs(shape)[i] for shape, i in (("fp32", 2), ("fp32", 5), ("bf16", 5))),
    *("test_kl_divergence[fp32-forward]", "test_gae[16x131072]", "test_group_advantages"),
    *("test_policy_loss[64x2048]", "test_value_loss[2048x2048]"),
)
README_HEAD = tuple(
    f"test_linear_{op}"
    for dtype in ("bf16", "fp32")
    for op in (f"policy_loss[{dtype}]", f"token_logprobs[{dtype}-logprobs]")
)
#: The points of the README's picture.
SHORT = (
    *(_logprobs("bf16")[5], "test_kl_divergence[fp32-forward]", "test_gae[16x131072]"),
    *("test_policy_loss[64x2048]", *README_HEAD[:2]),
)


def ratio(entry: Entry, *names: str) -> float | None:
    """Time of the fastest of `names` over ours, or None if none of them has a time.

    This is the median over the rounds in which both ran. A slow provider runs only in some rounds,
    and slows ours in them by its effect on the caches.
    """
    rounds = [entry["providers"].get(n, {}).get("ours_over") for n in names]
    return min((1 / r["median"] for r in rounds if r), default=None)


def of_limit(entry: Entry) -> float | None:
    """The share of the machine's copy or read rate, or of the bare products, that ours reaches."""
    return ratio(entry, entry["limit"])


def rate(entry: Entry) -> str:
    """The rate of ours: of the products, compared with bare products, or else of bytes."""
    ours, limit = (entry["providers"][n]["median"] for n in ("ours", entry["limit"]))
    if entry.get("flops"):
        giga = entry["flops"] / 1e9
        return f"{giga / ours:.0f} of {giga / limit:.0f} GFLOP/s"
    return f"{entry['moved'] / ours / 1e9:.3g} GB/s"


def position(entry: Entry) -> int:
    """The position of the operation in ORDER."""
    return next((i for i, o in enumerate(ORDER) if entry["op"].startswith(o)), len(ORDER))


def excess(entry: Entry) -> tuple[float, float] | None:
    """Bytes of ours beyond inputs and results, and their limit; None if either is missing."""
    most = entry.get("at_most", {}).get("extra_bytes")
    found = entry["providers"]["ours"].get("extra_bytes")
    return None if most is None or found is None else (found, most)


def target_text(entry: Entry, quick: bool) -> str:
    """Whether the targets are met, or which are missed; empty for a quick run."""
    if quick or not entry["targets"]:
        return ""
    found = {name: ratio(entry, name) for name in entry["targets"]}
    missed = [
        f"{name} {least:.0%}" if name in LIMITS else f"{name} {least:.3g}×"
        for name, least in entry["targets"].items()
        if found[name] is not None and found[name] < least
    ]
    memory = excess(entry)
    if memory and memory[0] > memory[1]:
        missed.append(f"memory {memory[1] / 2**20:.0f} MiB")
    if missed:
        return "missed: " + ", ".join(missed)
    unknown = [name for name, measured in found.items() if measured is None]
    if "extra_bytes" in entry.get("at_most", {}) and not memory:
        unknown.append("memory")
    return "met" + (f"; not measured: {', '.join(unknown)}" if unknown else "")


def environment(data: Entry) -> str:
    m, commit = data["machine_info"], data["commit_info"]
    peers = ", ".join(f"{k} {v}" for k, v in m["peers"].items()) or "none installed"
    dirty = " (with local changes)" if commit.get("dirty") else ""
    # Points of an earlier run (`--add`) have their own commit.
    ids = {str(commit.get("id")), *(b.get("commit", "") for b in data["benchmarks"])} - {""}
    commits = ", ".join(sorted(i[:12] for i in ids))
    return (
        f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['cpu_capability']}; device "
        f"{m['device']}, backend {m['backend']}; torch {m['torch']}, Python {m['python']}; peers: "
        f"{peers}; {data['datetime'][:10]}, commit {commits}{dirty}"
        + ("; QUICK shapes: not a measurement" if m["quick"] else "")
    )


def points_table(
    entries: list[Entry], quick: bool, details: bool = True, memory: bool = False
) -> list[str]:
    """A row for every point; ratios of providers that are faster than ours are bold.

    details: adds spread, rates and targets; memory: adds peaks beyond the inputs.
    """
    peers = [p for p in PEERS if any(ratio(e, p) is not None for e in entries)]
    columns = [("eager",), ("compile", "vectorized"), *((p,) for p in peers)]
    head = ["operation", "shape", "ours, ms", *(["p20–p80"] if details else [])]
    head += ["÷ eager", "÷ compile", *(f"÷ {PEERS[p]}" for p in peers), "of the limit"]
    head += ["rate"] if details else []
    head += ["MiB: ours, eager, TRL"] if memory else []
    head += ["target"] if details else []
    rows = []
    for e in entries:
        limit, ours = of_limit(e), e["providers"]["ours"]
        cells = [f"{e['op']}, {e['mode']}", e["label"], milliseconds(ours["median"])]
        cells[1] += " ~" * unsteady(e)
        if details:
            cells.append(f"{milliseconds(ours['p20'])}–{milliseconds(ours['p80'])}")
        ratios = [ratio(e, *names) for names in columns]
        cells += [bold_if(r is not None and r < 1, multiple(r)) for r in ratios]
        cells.append("–" if limit is None else f"{limit:.0%} {e['limit']}")
        cells += [rate(e)] if details else []
        if memory:
            peaks = (e["providers"].get(n, {}).get("peak_bytes") for n in ("ours", "eager", "trl"))
            cells.append(", ".join(map(mebibytes, peaks)))
        rows.append([*cells, target_text(e, quick)] if details else cells)
    return table(head, rows, left=2, right=1 if details else 0)


def _against(name: str, wanted: float, found: float | None) -> str:
    """A measured figure beside its target; bold if the target is missed."""
    show = "{:.0%}".format if name in LIMITS else multiple
    if found is None:
        return f"not measured (≥ {show(wanted)})"
    missed = found < wanted
    if missed and show(found) == show(wanted):
        show = "{:.2%}".format if name in LIMITS else "{:.4g}×".format
    return bold_if(missed, f"{show(found)} {'<' if missed else '≥'} {show(wanted)}")


def targets_table(entries: list[Entry]) -> list[str]:
    """The design's table of targets with the measured figures."""
    by_name = {e["name"]: e for e in entries}
    rows = []
    for name in TARGETED:
        e = by_name.get(name)
        if e is None:
            # Only `make bench-full` measures it.
            continue
        wanted = dict(e["targets"])
        eager, compiled = wanted.pop("eager", None), wanted.pop("compile", None)
        # A target for vectorised code applies to the faster of its two forms.
        vectorized = wanted.pop("vectorized", None) is not None
        found = ratio(e, "compile", *(["vectorized"] if vectorized else []))
        cells = ["" if eager is None else _against("eager", eager, ratio(e, "eager"))]
        cells.append("" if compiled is None else _against("compile", compiled, found))
        limits = [n for n in wanted if n in LIMITS]
        cells.append(", ".join(f"{_against(n, wanted.pop(n), ratio(e, n))} {n}" for n in limits))
        words = {"no entropy": "time without the entropy ÷ ours", **PEERS}
        other = [f"{words.get(n, n)}: {_against(n, w, ratio(e, n))}" for n, w in wanted.items()]
        memory = excess(e)
        if memory:
            over, most = memory[0] > memory[1], memory[1] / 2**20
            sizes = f"{memory[0] / 2**20:.6g} {'>' if over else '≤'} {most:.0f} MiB"
            other.append(f"memory: {bold_if(over, sizes)}")
        verdict = target_text(e, False).partition(":")[0]
        rows.append([f"{e['op']}, {e['mode']}", e["label"], *cells, "; ".join(other), verdict])
    head = ["operation", "shape", "÷ eager", "÷ compile", "of the limit", "other", ""]
    return table(head, rows, left=2, right=2)


def lost(entries: list[Entry]) -> Iterator[str]:
    """The points at which another provider is faster."""
    for e in entries:
        found = {n: ratio(e, n) for n in ("eager", "compile", "vectorized", *PEERS)}
        faster = [f"{PEERS.get(n, n)} {multiple(r)}" for n, r in found.items() if r and r < 1]
        if faster:
            yield f"- {e['op']}, {e['mode']}, {e['label']}: {', '.join(faster)}"


def holds_logits(entry: Entry) -> bool:
    """Whether the operation may hold logits, so that its peak memory is listed."""
    return entry["mode"] == "forward+backward" and entry["op"].startswith(
        ("token_logprobs", "linear_")
    )


def memory_lines(entries: list[Entry]) -> list[str]:
    """Peak memory beyond the inputs, results included, of points that may hold logits."""
    lines = []
    for e in entries:
        if not holds_logits(e):
            continue
        peaks = {n: p for n, p in e["providers"].items() if p.get("peak_bytes")}
        cells = [
            f"{PEERS.get(n, n)} {mebibytes(p['peak_bytes'])}{'*' * bool(p.get('fresh'))}"
            for n, p in peaks.items()
        ]
        lines += [f"- {e['op']}, {e['label']}: {', '.join(cells)}"] if "ours" in peaks else []
    note = "Peak beyond the inputs, forward+backward, results included, MiB; *: in a fresh process."
    return ["", "## Memory", note, "", *lines] if lines else []


def problem_lines(entries: list[Entry]) -> list[str]:
    """Points without a time, with each reason listed once."""
    found: dict[str, list[str]] = {}
    for e in entries:
        for name, p in e["providers"].items():
            reason = p.get("error") or p.get("skipped")
            if reason:
                kind = "failed" if "error" in p else "skipped"
                point = f"{e['op']} {e['label']} {e['mode']}"
                found.setdefault(f"{name} {kind}: {reason}", []).append(point)
    where = {r: p[0] if len(p) == 1 else f"{len(p)} points" for r, p in found.items()}
    lines = [f"- {reason} ({points})" for reason, points in where.items()]
    return ["", "## Without a time", "", *lines] if lines else []


def rates_line(entries: list[Entry]) -> str:
    """The median rates of the machine over points that are larger than a core's cache."""
    words = []
    for name in ("copy", "read"):
        large = (e for e in entries if e["moved"] >= 1 << 26 and "median" in e["providers"][name])
        rates = [e["moved"] / e["providers"][name]["median"] / 1e9 for e in large]
        words += [f"{name} {statistics.median(rates):.1f} GB/s"] if rates else []
    return f"Machine, same run: {', '.join(words)}." if words else ""


def drift(entries: list[Entry]) -> float | None:
    """The largest median copy rate of a third of the run over the smallest; None if unknown.

    entries: in the order in which they were measured.
    """
    rates = [e["copy_rate"] for e in entries if "copy_rate" in e]
    size = len(rates) // 3
    if size < 3:
        return None
    parts = rates[:size], rates[size : 2 * size], rates[2 * size :]
    medians = [statistics.median(part) for part in parts]
    return max(medians) / min(medians)


def unsteady(entry: Entry) -> bool:
    """Whether the halves of the rounds differ, although the point was repeated."""
    return entry.get("disagreement", 1.0) > STEADY


def busy_lines(ordered: list[Entry]) -> list[str]:
    """What says that the machine was busy; `ordered` as for `drift`."""
    found, moved = [e for e in ordered if unsteady(e)], drift(ordered)
    lines = []
    if moved is not None and moved > STEADY:
        text = f"its copy rate differed by {moved - 1:.0%} between thirds of the run"
        lines += ["", f"**The machine was busy: {text}.** Do not compare these figures."]
    if found:
        text = f"differ by more than {STEADY - 1:.0%} between both halves of the rounds"
        lines += ["", f"{len(found)} of {len(ordered)} points, marked ~, {text}, though repeated."]
    return lines


LEGEND = (
    "Medians. ÷ x: time of x over ours, in the rounds that both ran in; below 1 (bold) x is "
    "faster. ÷ compile: `torch.compile` of eager; for the advantages, the faster of a vectorised "
    "torch form and its compilation. Of the limit: time in which the machine copies "
    "(`tensor.clone()`, bytes read + written) or reads (`tensor.sum()` of fp32) as many bytes as "
    "the operation must move, over ours; for the fused head, time of its bare products (three or "
    "four `torch.mm(out=)` over all tokens). Rate: those bytes over the time of ours; for the "
    "head, the operations of its products, by ours and bare."
)


def markdown(data: Entry, entries: list[Entry], pictures: list[str]) -> str:
    m = data["machine_info"]
    lines = [f"# Benchmarks: {m['cpu']}, {m['threads']} threads", "", environment(data) + "."]
    command = "make bench-full" if m.get("full") else "make bench"
    lines += [rates_line(entries), f"`{command}` measures a machine and writes this."]
    lines += [*busy_lines([b["extra_info"] for b in data["benchmarks"]]), "", LEGEND]
    if m["device"] == "cpu" and not m["quick"]:
        missing = sum(name not in {e["name"] for e in entries} for name in TARGETED)
        rest = f" `make bench-full` has {missing} more." if missing else ""
        lines += [
            "",
            "## Targets",
            f"What was wanted and what was measured; bold is missed.{rest}",
            "",
        ]
        lines += targets_table(entries)
    for picture in pictures:
        lines += ["", f"![Share of the limit by provider]({picture})"]
    lines += ["", "## Every point", *points_table(entries, m["quick"])]
    losses = list(lost(entries))
    if losses:
        lines += ["", "## Where something else is faster", "Its time over ours.", "", *losses]
    lines += memory_lines(entries) + problem_lines([*entries, *data["failures"]])
    return "\n".join(lines) + "\n"


def picture(entries: list[Entry], file: Path, note: str) -> None:
    """Draws each provider's share of the limit."""
    groups = []
    for e in entries:
        of_ours = of_limit(e)
        if of_ours is None:
            continue
        found = []
        for name, p in e["providers"].items():
            if "median" in p and name not in LIMITS and name != "no entropy":
                # The provider's share is that of ours divided by the provider's relative time.
                share = of_ours / (ratio(e, name) or 1.0)
                percent = f"{share:.0%}" if share >= 0.095 else f"{share:.2%}"
                text = f"{milliseconds(p['median'])} ms, {percent}"
                found.append(charts.Bar(PEERS.get(name, name), share, text))
        found.sort(key=lambda bar: -bar.share)
        groups.append((f"{e['op']}, {e['mode']}: {e['label']} (limit: {e['limit']})", found))
    charts.bars(groups, file, note)


def read(file: Path) -> tuple[Entry, list[Entry]]:
    """The JSON, and its points in the order of a report."""
    data = json.loads(file.read_text())
    entries = [{**b["extra_info"], "name": b["name"]} for b in data["benchmarks"]]
    return data, sorted(entries, key=position)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("json", type=Path, help="results of a run")
    parser.add_argument("--readme", action="store_true", help="print those tables alone")
    args = parser.parse_args(argv)
    data, entries = read(args.json)
    m = data["machine_info"]
    if args.readme:
        by_name = {e["name"]: e for e in entries}
        for names, memory in ((README, False), (README_HEAD, True)):
            rows = [by_name[name] for name in names if name in by_name]
            print("\n".join([*points_table(rows, m["quick"], details=False, memory=memory), ""]))
        return
    pictures = []
    if any(e["targets"] for e in entries):
        file = args.json.with_suffix(".svg")
        note = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {data['datetime'][:10]}"
        picture([e for e in entries if e["targets"] and e["mode"] != "backward"], file, note)
        short = [e for e in entries if e["name"] in SHORT]
        if short:
            picture(short, file.with_stem(f"{file.stem}-short"), note)
        pictures.append(file.name)
    text = markdown(data, entries, pictures)
    # Add sections for studies under the same name.
    sections = (("growth", "Growth", growth), ("step", "A whole step", step))
    for ending, title, module in sections:
        beside = args.json.with_name(f"{args.json.stem}-{ending}.json")
        if beside.exists():
            text += "\n".join(["", f"## {title}", *module.lines(beside), ""])
    args.json.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
