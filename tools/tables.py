"""Reports: Markdown tables, the format of numbers in them, and where they go."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

#: Alignment of columns: words on the left, figures on the right.
WORDS, FIGURE = "---|", "---:|"


def options_of_report(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line with two more options: --report and the --date that it needs."""
    parser.add_argument("--report", type=Path, help="where the Markdown table goes")
    parser.add_argument("--date", help="of the report")
    options = parser.parse_args()
    if options.report and not options.date:
        parser.error("--report needs --date")
    return options


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, right: int = 0
) -> list[str]:
    """Lines of a table; its first `left` and last `right` columns hold words, the others figures.

    Raises:
        ValueError: a row and the head differ in their number of cells.
    """
    figures = len(head) - left - right
    lines = [_line(head), "|" + WORDS * left + FIGURE * figures + WORDS * right]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells in a table of {len(head)} columns: {row}")
        lines.append(_line(row))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bold_if(wanted: bool, text: str) -> str:
    """`text`, in bold if `wanted`."""
    return f"**{text}**" if wanted else text


def multiple(value: float | None) -> str:
    """A ratio with two digits, or "–" for None."""
    return "–" if value is None else f"{value:.0f}×" if value >= 99.5 else f"{value:.2g}×"


def scaled(seconds: float, unit: float) -> str:
    """Seconds in the given unit with three digits; without decimals from 1000 units on."""
    return f"{seconds / unit:.3g}" if seconds < 999.5 * unit else f"{seconds / unit:.0f}"


def milliseconds(seconds: float) -> str:
    return scaled(seconds, 1e-3)


def microseconds(seconds: float) -> str:
    return scaled(seconds, 1e-6)


def mebibytes(size: float | None) -> str:
    """Bytes in whole MiB, or "–" for None."""
    return "–" if size is None else f"{size / 2**20:.0f}"
