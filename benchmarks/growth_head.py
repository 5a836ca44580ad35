"""How time and memory of linear_policy_loss grow with the tokens and with the vocabulary.

    python benchmarks/growth_head.py [name] [--quick]

Writes results/<name>-head-growth.json and .svg: forward + backward, bf16, against autograd through
the logits and TRL's chunked head, every point behind the gate of test_bench_head.py's case.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import harness, test_bench_head
from .run import default_name

HERE = Path(__file__).resolve().parent
WIDTH, ROUNDS = 1024, 5
TOKENS, VOCABS = (512, 1024, 2048, 4096, 8192), (8192, 16384, 32768, 65536, 131072)
AT_TOKENS, AT_VOCAB = 2048, 32768
NAMES = {"ours": "linear_policy_loss", "eager": "through the logits", "trl": "TRL, chunked"}
Point = dict[str, Any]


def cases(quick: bool) -> Iterator[tuple[str, int, int]]:
    """(axis, tokens, vocabulary)."""
    scale = 64 if quick else 1
    for n in TOKENS:
        yield "tokens", n // scale, AT_VOCAB // scale
    for v in VOCABS:
        yield "vocabulary", AT_TOKENS // scale, v // scale


def providers(tokens: int, vocab: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """What to time, each a step forward and backward; and the bytes that gradients take."""
    hidden = torch.randn(1, tokens, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, WIDTH) * 2 / WIDTH**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens))
    old, advantages = torch.full((1, tokens), -math.log(vocab)), torch.randn(1, tokens)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    config = rk.PolicyLossConfig.reinforce()

    def step(loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (hidden, weight))

    def ours() -> Any:
        return step(
            rk.linear_policy_loss(hidden, weight, labels, old, advantages, mask, config=config).loss
        )

    def eager() -> Any:
        logprobs = test_bench_head.eager_logprobs(hidden, weight, labels)
        return step(rk.policy_loss(logprobs, old, advantages, mask, config=config).loss)

    found: dict[str, Callable[[], Any]] = {"ours": ours, "eager": eager}
    trl_head = test_bench_head.trl_head()
    if trl_head:

        def trl() -> Any:
            logprobs = trl_head(hidden[0], weight, labels[0], ())[0]
            return step(rk.policy_loss(logprobs[None], old, advantages, mask, config=config).loss)

        found["trl"] = trl
    return found, hidden.nbytes + weight.nbytes


def measure(tokens: int, vocab: int) -> Point:
    """Medians in seconds and peaks in bytes of each provider, beside each other in every round."""
    torch.manual_seed(0)
    steps, gradients = providers(tokens, vocab)
    expected = steps["eager"]()
    for name, call in steps.items():
        for a, e in zip(call(), expected, strict=True):
            allowed = harness.GATE[torch.bfloat16] * float(e.abs().max())
            if not float((a.float() - e.float()).abs().max()) <= allowed:
                raise harness.GateError(f"{name} at {tokens}×{vocab}")
    del expected, a, e
    cpu = torch.device("cpu")
    peaks = {n: harness.peak_extra_bytes(c, cpu) for n, c in steps.items()}
    clock = harness.timer(cpu)
    times: dict[str, list[float]] = {n: [] for n in steps}
    for _ in range(ROUNDS):
        for name, call in steps.items():
            clock.start(0.0)
            call()
            times[name].append(clock.stop())
    return {
        "tokens": tokens,
        "vocab": vocab,
        "gradient_bytes": gradients,
        "seconds": {n: statistics.median(t) for n, t in times.items()},
        "peak_bytes": peaks,
    }


def slope(xs: list[int], ys: list[float]) -> float:
    """Of log y over log x: 1 is linear growth, 0 none."""
    x, y = torch.tensor(xs).double().log(), torch.tensor(ys).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def picture(points: dict[str, list[Point]], file: Path, note: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for column, (axis, key) in enumerate((("tokens", "tokens"), ("vocabulary", "vocab"))):
        xs = [p[key] for p in points[axis]]
        for name in points[axis][0]["seconds"]:
            times = [p["seconds"][name] * 1e3 for p in points[axis]]
            # The gradients are what is asked for; this is what it takes to get them.
            extra = [(p["peak_bytes"][name] - p["gradient_bytes"]) / 2**20 for p in points[axis]]
            for row, ys in enumerate((times, [max(x, 1.0) for x in extra])):
                label = f"{NAMES[name]} (slope {slope(xs, ys):.2f})"
                axes[row, column].loglog(xs, ys, marker="o", label=label)
        fixed = (
            f"vocabulary {points[axis][0]['vocab']}"
            if column == 0
            else (f"{points[axis][0]['tokens']} tokens")
        )
        for row, what in enumerate(("time, ms", "memory beyond the gradients, MiB")):
            plot = axes[row, column]
            plot.set(xlabel=f"{axis} ({fixed})", ylabel=what)
            plot.set_xticks(xs, [str(x) for x in xs], rotation=30)
            plot.minorticks_off()
            plot.grid(alpha=0.3)
            plot.legend(fontsize=8)
    figure.suptitle(note, fontsize=9)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="name of the results; default: date and machine")
    parser.add_argument("--quick", action="store_true", help="small shapes: not a measurement")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    args = parser.parse_args()
    rk.use_backend("cpu")
    points: dict[str, list[Point]] = {}
    for axis, tokens, vocab in cases(args.quick):
        points.setdefault(axis, []).append(measure(tokens, vocab))
        print(axis, json.dumps(points[axis][-1]), flush=True)
    file = args.out / f"{args.name or default_name('cpu', args.quick)}-head-growth.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"torch": torch.__version__, "threads": torch.get_num_threads(), "width": WIDTH}
    file.write_text(json.dumps({**stamp, "quick": args.quick, "points": points}, indent=1) + "\n")
    note = f"Policy loss from hidden states, forward + backward, bf16, width {WIDTH}; medians of "
    picture(points, file.with_suffix(".svg"), note + f"{ROUNDS}. Time: slope 1 expected.")


if __name__ == "__main__":
    main()
