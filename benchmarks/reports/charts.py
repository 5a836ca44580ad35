"""SVG charts of the reports: bars of providers relative to the limit, and growth curves."""

from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {
    "ours": "#d1495b",
    "eager": "#9aa5b1",
    "compile": "#2f6db5",
    "vectorized": "#7fb2e5",
    "TRL": "#e0a030",
    "verl": "#3a9d6e",
    "Liger": "#8659b5",
    "torch fused": "#56606b",
}


class Bar(NamedTuple):
    """The share of the limit that a provider reaches."""

    provider: str
    share: float
    text: str


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # Reproducible bytes from the same figures, and text as text instead of outlines.
    matplotlib.rcParams.update({"svg.hashsalt": "rlhf_kernels", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """Writes the SVG without its date."""
    figure.savefig(file, metadata={"Date": None})
    _pyplot().close(figure)


def bars(groups: list[tuple[str, list[Bar]]], file: Path, note: str) -> None:
    """Draws groups of bars, one below the other, on a log scale with a line at the limit."""
    plt = _pyplot()
    count = sum(len(found) + 1.6 for _, found in groups)
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.19 * count), layout="constrained")
    y, ticks, names = 0.0, [], []
    for title, found in groups:
        axes.text(0, y, title, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold")
        for bar in found:
            y += 1
            colour = COLOURS.get(bar.provider, "#56606b")
            drawn = axes.barh(y, bar.share * 100, 0.8, color=colour)
            axes.bar_label(drawn, [bar.text], padding=3, fontsize=7)
            ticks.append(y)
            names.append(bar.provider)
        y += 1.6
    axes.set_yticks(ticks, names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.6, -1)
    axes.set_xscale("log")
    least = min((b.share for _, found in groups for b in found), default=1.0)
    axes.set_xlim(min(1.0, least * 50), 1000)
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.axvline(100, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel(f"share of the limit: longer is faster\n{note}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


class Plot(NamedTuple):
    """Lines over x; `lines` is empty if there is nothing to plot."""

    x_label: str
    y_label: str
    xs: list[int]
    lines: dict[str, list[float]]
    names: dict[str, str]
    expected: float | None


def curves(plots: list[list[Plot]], file: Path, note: str) -> None:
    """Draws a column of log-log plots for each list; a dashed line has the expected slope."""
    plt = _pyplot()
    columns, height = len(plots), len(plots[0])
    size = (4.4 * columns, 3.3 * height + 0.3)
    figure, axes = plt.subplots(height, columns, figsize=size, layout="constrained", squeeze=False)
    for column, several in enumerate(plots):
        for row, plot in enumerate(several):
            at = axes[row, column]
            if not plot.lines:
                at.axis("off")
                continue
            for name, ys in plot.lines.items():
                colour = COLOURS.get(name, "#56606b")
                at.loglog(plot.xs, ys, marker="o", color=colour, label=plot.names[name])
            start = plot.lines["ours"][0]
            ideal = [start * (x / plot.xs[0]) ** plot.expected for x in plot.xs]
            label = f"expected of ours: slope {plot.expected:.0f}"
            at.loglog(plot.xs, ideal, "--", color="black", linewidth=0.8, label=label)
            at.set(xlabel=plot.x_label, ylabel=plot.y_label)
            at.set_xticks(plot.xs, [str(x) for x in plot.xs], rotation=30)
            at.minorticks_off()
            at.grid(alpha=0.3)
            at.legend(fontsize=7)
    figure.suptitle(note, fontsize=9)
    save(figure, file)
