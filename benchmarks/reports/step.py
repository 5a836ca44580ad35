"""A whole training step from results/<name>-step.json: its parts, and the possible savings."""

import json
from pathlib import Path
from typing import Any

from tools.tables import mebibytes, table

#: Parts that belong to the model; none of our operations can change them.
OWN = ("layers", "optimizer")


def is_own(part: str) -> bool:
    return any(word in part for word in OWN)


def totals(seconds: dict[str, float]) -> tuple[float, float]:
    """The seconds of the whole step, and of the model's own parts."""
    return sum(seconds.values()), sum(t for p, t in seconds.items() if is_own(p))


def parts_table(step: dict[str, Any]) -> list[str]:
    """Each part of the step, the sums of both kinds of parts, and the whole."""
    seconds = step["seconds"]
    whole = totals(seconds["eager"])[0]
    others = [n for n in seconds if n != "ours"]
    head = [
        "part",
        *(f"{n}, ms" for n in (*others, "ours")),
        "share of eager's step",
        "saved of it",
    ]
    ends = {n: totals(s) for n, s in seconds.items()}
    rows = {part: {n: seconds[n][part] for n in seconds} for part in seconds["eager"]}
    rows |= {
        "**operations**": {n: w - o for n, (w, o) in ends.items()},
        "**model's own**": {n: o for n, (_, o) in ends.items()},
        "**step**": {n: w for n, (w, _) in ends.items()},
    }

    def cells(name: str, times: dict[str, float]) -> list[str]:
        # The model's own parts differ only by chance, so the step saves what the operations save.
        saving = rows["**operations**"] if name == "**step**" else times
        saved = f"{(saving['eager'] - saving['ours']) / whole:.1%}"
        if is_own(name):
            saved = "model's own"
        elif name == "**model's own**":
            saved = "nothing can be"
        figures = [f"{times[n] * 1e3:.4g}" for n in (*others, "ours")]
        return [name, *figures, f"{times['eager'] / whole:.1%}", saved]

    return table(head, [cells(name, times) for name, times in rows.items()])


def sentences(step: dict[str, Any]) -> list[str]:
    """A summary of the step in words."""
    seconds = step["seconds"]
    (whole, own), (ours, _) = totals(seconds["eager"]), totals(seconds["ours"])
    lines = [
        f"{own / whole:.0%} of eager's step is the model's own, so that an operation that took no "
        f"time would make it {whole / own:.2g}× as fast; ours makes it {whole / ours:.2g}×."
    ]
    peaks = {n: p for n, p in step["peak_bytes"].items() if p}
    if peaks:
        words = ", ".join(f"{n} {mebibytes(p)}" for n, p in peaks.items())
        lines.append(f"Memory of a step, gradients included, MiB: {words}.")
    lines += [f"{name} is absent: {reason}." for name, reason in step["absent"].items()]
    return lines


def lines(file: Path) -> list[str]:
    """The section of the report."""
    data = json.loads(file.read_text())
    found = [
        f"{data['threads']} threads, torch {data['torch']}, fp32"
        + ("; QUICK shapes: not a measurement." if data["quick"] else ".")
    ]
    for name, step in data["steps"].items():
        s = step["shape"]
        found += [
            "",
            f"### {name.upper()}",
            f"Llama of {s['parameters'] / 1e6:.0f}M parameters ({s['layers']} layers, width "
            f"{s['width']}, vocabulary {s['vocab']}); {s['rows']} prompts of {s['prompt']} "
            f"tokens, responses of up to {s['response']}; no sampling. TRL: its chunked head, the "
            "rest as eager.",
            "",
            *parts_table(step),
            "",
            *sentences(step),
        ]
    return found
