"""Markdown tables and the numbers in them."""

from collections.abc import Iterable, Sequence

#: Columns of a table: words, and after them figures, which stand on the right.
WORDS, FIGURE = "---|", "---:|"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, right: int = 0
) -> list[str]:
    """Lines of a table whose first `left` and last `right` columns hold words, the rest figures.

    Raises:
        ValueError: a row has not as many cells as the head.
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
    """`text`, bold where `wanted`."""
    return f"**{text}**" if wanted else text


def multiple(value: float | None) -> str:
    """A ratio in two digits; – without one."""
    return "–" if value is None else f"{value:.0f}×" if value >= 99.5 else f"{value:.2g}×"


def scaled(seconds: float, unit: float) -> str:
    """Seconds in units of `unit`, in three digits, but in whole units from 1000 of them on."""
    return f"{seconds / unit:.3g}" if seconds < 999.5 * unit else f"{seconds / unit:.0f}"


def milliseconds(seconds: float) -> str:
    return scaled(seconds, 1e-3)


def microseconds(seconds: float) -> str:
    return scaled(seconds, 1e-6)


def mebibytes(size: float | None) -> str:
    """Bytes in whole MiB; – without a number."""
    return "–" if size is None else f"{size / 2**20:.0f}"
