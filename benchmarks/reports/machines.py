"""The results of several machines side by side, as Markdown.

    python -m benchmarks.reports.machines RESULTS.json RESULTS.json ... [--out machines.md]

Times of two machines have nothing in common, so only ratios within each run are shown: eager's and
compile's time over ours, and the share of the limit. A point that a run lacks is a dash.
"""

from pathlib import Path

from tools.tables import bold_if, multiple, table

from .. import make_parser
from . import suite
from .suite import Entry


def name(data: Entry) -> str:
    m = data["machine_info"]
    return f"{m['cpu']}, {m['cpu_capability']}, {m['threads']} threads"


def cells(entry: Entry | None) -> list[str]:
    """Time of eager and of compile over ours, share of the limit; bold if ours is slower."""
    if entry is None:
        return ["–"] * 3
    ratios = suite.ratio(entry, "eager"), suite.ratio(entry, "compile", "vectorized")
    limit = suite.of_limit(entry)
    mark = " ~" * suite.unsteady(entry)
    shown = [bold_if(r is not None and r < 1, multiple(r)) for r in ratios]
    return [*shown, "–" if limit is None else f"{limit:.0%} {entry['limit']}{mark}"]


def markdown(runs: list[tuple[Entry, list[Entry]]]) -> str:
    """The page of the runs, each as `suite.read` gives it."""
    lines = ["# Machines side by side", ""]
    for letter, (data, _) in zip("ABCDEFGH", runs, strict=False):
        day, commit = data["datetime"][:10], str(data["commit_info"].get("id"))[:12]
        lines.append(
            f"- {letter}: {name(data)}; torch {data['machine_info']['torch']}, {day}, {commit}"
        )
        ordered = [b["extra_info"] for b in data["benchmarks"]]
        lines += [f"  {text}" for text in suite.busy_lines(ordered) if text]
    lines += [
        "",
        "Time of eager and of compile over ours, and the share of the limit, within each run.",
        "Bold: ours is slower. ~: the halves of the rounds differ.",
        "",
    ]
    points: dict[str, list[Entry | None]] = {}
    for i, (_, entries) in enumerate(runs):
        for entry in entries:
            points.setdefault(entry["name"], [None] * len(runs))[i] = entry
    head = ["operation", "shape"]
    head += [f"{x}: {what}" for x in "ABCDEFGH"[: len(runs)]
             for what in ("÷ eager", "÷ compile", "of the limit")]  # fmt: skip
    rows = []
    for found in points.values():
        first = next(e for e in found if e is not None)
        row = [f"{first['op']}, {first['mode']}", first["label"]]
        rows.append([*row, *(cell for entry in found for cell in cells(entry))])
    return "\n".join([*lines, *table(head, rows, left=2)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="results of runs, at most eight")
    parser.add_argument("--out", type=Path, help="where the page goes; default: printed")
    args = parser.parse_args(argv)
    text = markdown([suite.read(file) for file in args.json])
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
