"""Measures growth of time and memory with tokens, vocabulary, sequence length and threads.

    python -m benchmarks.studies.growth [name] [--only gae ...] [--quick]

Writes results/<name>-growth.json and a chart of each operation; the report of that name includes
them. Every result is compared with eager, and providers take turns. Memory is the peak of a call
beyond inputs and results, measured in a separate process that returns freed memory immediately, so
that small allocations are visible. --only keeps the other curves of the file.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import clocks, measure, memory
from ..points import advantages, kl
from ..points import head as head_points
from ..points import logprobs as logprobs_points
from ..points import policy as policy_points
from ..reports import growth as report
from . import kept

CPU = torch.device("cpu")
# Rounds that fit into SECONDS for the slowest provider, within these limits.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 4.0, 3, 21
WIDTH, VOCAB = 1024, 32768

Call = Callable[[], tuple[Tensor, ...]]
Calls = dict[str, Call]


class Curve(NamedTuple):
    """One operation along one axis.

    Attributes:
        axis: what grows; "threads" sets torch's number of threads.
        xs: the values on the axis.
        fixed: the rest of the shape, for readers.
        calls: maps x to providers as functions without arguments; all return the same results,
            and "eager" is the one that others are compared with.
        time: expected slope of ours, log time over log x.
        memory: the same of its memory beyond inputs and results; None if not measured.
    """

    axis: str
    xs: tuple[int, ...]
    fixed: str
    calls: Callable[[int], Calls]
    time: float
    memory: float | None


def differentiated(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Call:
    """A call that returns `function(*leaves)` and the gradients of the sum of its outputs."""

    def call() -> tuple[Tensor, ...]:
        found = function(*leaves)
        outputs = (found,) if isinstance(found, Tensor) else [o for o in found if o is not None]
        return *outputs, *torch.autograd.grad([o.sum() for o in outputs], leaves)

    return call


def logprobs(tokens: int, vocab: int = VOCAB) -> Calls:
    logits = (torch.randn(tokens, vocab) * 2).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    ours = partial(rk.token_logprobs, labels=labels, entropy=True)
    eager = partial(logprobs_points.eager_entropy, labels=labels)
    return {n: differentiated(f, [logits]) for n, f in (("ours", ours), ("eager", eager))}


def divergence(tokens: int, vocab: int = VOCAB) -> Calls:
    ref = torch.randn(tokens, vocab) * 2
    logits = ref + 0.3 * torch.randn_like(ref)
    functions = {"ours": rk.kl_divergence, "eager": kl.eager_divergence}
    return {n: lambda f=f: (f(logits, ref),) for n, f in functions.items()}


def gae(length: int, sequences: int = 64) -> Calls:
    rewards, values = torch.randn(sequences, length), torch.randn(sequences, length)
    weights = torch.ones_like(values)
    options = {"gamma": advantages.GAMMA, "lam": advantages.LAM}
    return {
        "ours": lambda: tuple(rk.gae(rewards, values, **options)),
        "eager": lambda: advantages.loop(rewards, values, weights),
        "vectorized": lambda: advantages.vectorized(rewards, values, weights),
    }


def policy(tokens: int, length: int = 2048) -> Calls:
    shape = (max(1, tokens // length), min(tokens, length))
    old = -torch.rand(shape) * 5
    # Ratios far from the clip bounds, so that rounding cannot move a token across a bound.
    steps = torch.tensor([-0.4, -0.1, 0.05, 0.1, 0.4])
    new = (old + steps[torch.randint(0, 5, shape)]).requires_grad_()
    mask = torch.ones(shape, dtype=torch.bool)
    rest = (old, torch.randn(shape), mask, mask.float())
    functions = {"ours": policy_points.ours, "eager": policy_points.eager}
    return {n: differentiated(lambda x, f=f: f(x, *rest)[0], [new]) for n, f in functions.items()}


def head(tokens: int, vocab: int = VOCAB) -> Calls:
    hidden = torch.randn(1, tokens, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, WIDTH) * 2 / WIDTH**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens))
    old, advantages = torch.full((1, tokens), -math.log(vocab)), torch.randn(1, tokens)
    rest = {"mask": torch.ones(1, tokens, dtype=torch.bool)}
    rest["config"] = rk.PolicyLossConfig.reinforce()

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return rk.linear_policy_loss(hidden, weight, labels, old, advantages, **rest).loss

    def after(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda h, w: rk.policy_loss(function(h, w, labels), old, advantages, **rest).loss

    functions = {"ours": ours, "eager": after(head_points.eager_logprobs)}
    if trl := head_points.trl_head():
        functions["TRL"] = after(lambda h, w, labels: trl(h[0], w, labels[0], ())[0][None])
    return {n: differentiated(f, [hidden, weight]) for n, f in functions.items()}


def _powers(first: int, last: int) -> tuple[int, ...]:
    """The powers of two from 2**first to 2**last."""
    return tuple(2**i for i in range(first, last + 1))


def curves(quick: bool) -> dict[str, list[Curve]]:
    """The curves of each operation. Time is linear in size; memory of ours is zero or constant."""
    small = 64 if quick else 1
    # From 1 to torch's number of threads on this machine.
    most = torch.get_num_threads()
    counts = tuple(sorted({*_powers(0, most.bit_length() - 1), most}))

    def sized(axis: str, xs: tuple[int, ...], fixed: str, calls: Callable[[int], Calls]) -> Curve:
        return Curve(axis, tuple(max(2, x // small) for x in xs), fixed, calls, 1.0, 0.0)

    def threads(fixed: str, calls: Callable[..., Calls], *shape: int) -> Curve:
        return Curve("threads", counts, fixed, lambda _: calls(*shape), -1.0, None)

    def of_vocabulary(calls: Callable[..., Calls], n: int, tokens: tuple[int, ...]) -> list[Curve]:
        """Curves of `calls(tokens, vocabulary)` along both axes, and along threads."""
        return [
            sized("tokens", tokens, f"vocabulary {v}", lambda x: calls(x, v)),
            sized("vocabulary", _powers(13, 17), f"{n} tokens", lambda x: calls(n, x)),
            threads(f"{n}×{v}", calls, n, v),
        ]

    n, v = 512 // small, VOCAB // small
    lengths, many = _powers(11, 15), _powers(8, 12)
    return {
        "token_logprobs + entropy, forward+backward, fp32": of_vocabulary(
            logprobs, n, _powers(7, 11)
        ),
        "kl_divergence, forward, fp32": of_vocabulary(divergence, n, _powers(7, 11)),
        "gae, forward, fp32": [
            sized("sequence length", lengths, "64 sequences", gae),
            sized("sequences", many, "length 1024", lambda x: gae(1024 // small, x)),
            threads(f"512×{4096 // small}", gae, 4096 // small, 512),
        ],
        "policy_loss, forward+backward, fp32": [
            sized("tokens", _powers(18, 22), "in sequences of 2048", policy),
            threads(f"{2**22 // small} tokens", policy, 2**22 // small),
        ],
        f"linear_policy_loss, forward+backward, bf16, width {WIDTH}": [
            sized("tokens", _powers(10, 13), f"vocabulary {v}", lambda x: head(x, v)),
            sized("vocabulary", _powers(14, 17), "2048 tokens", lambda x: head(2048 // small, x)),
            threads(f"2048 tokens, vocabulary {v}", head, 2048 // small, v),
        ],
    }


def gate(calls: Calls, where: str) -> None:
    """Raises GateError if a provider's results differ from eager's."""
    expected = calls["eager"]()
    # Intermediate results may be rounded to the coarsest dtype of the results.
    gap = max(measure.GATE[e.dtype] for e in expected)
    for name, call in calls.items():
        for a, e in zip(call(), expected, strict=True):
            allowed = gap * float(e.abs().max())
            if not float((a.float() - e.float()).abs().max()) <= allowed:
                raise measure.GateError(f"{name}: {where}")


def seconds(calls: Calls, budget: float) -> dict[str, float]:
    """Medians over common rounds, in which the providers take turns."""
    clock = clocks.timer(CPU)
    times: dict[str, list[float]] = {n: [] for n in calls}
    for turn in range(1, MOST_ROUNDS + 1):
        for name, call in calls.items():
            times[name].append(clocks.once(tuple, call, clock))
        medians = {n: statistics.median(t) for n, t in times.items()}
        if turn >= max(LEAST_ROUNDS, int(budget / max(medians.values()))):
            break
    return medians


def peaks(calls: Calls) -> dict[str, int | None]:
    """The peak bytes of each provider beyond inputs and results."""
    found = {}
    for name, call in calls.items():
        # The first call includes one-time setup.
        call()
        found[name] = memory.measured(call, CPU).get("extra_bytes")
    return found


def along(op: str, curve: Curve, measure: Callable[[Calls], Any]) -> list[Any]:
    """Applies `measure` to the providers at each x of a curve."""
    threads, found = torch.get_num_threads(), []
    for x in curve.xs:
        torch.manual_seed(0)
        torch.set_num_threads(x if curve.axis == "threads" else threads)
        found.append(measure(curve.calls(x)))
        print(op, curve.axis, x, json.dumps(found[-1]), file=sys.stderr, flush=True)
    torch.set_num_threads(threads)
    return found


def own_peaks(op: str, quick: bool) -> list[Any]:
    """The peaks along every curve of `op`; None for curves without memory."""
    return [None if c.memory is None else along(op, c, peaks) for c in curves(quick)[op]]


def grown(op: str, quick: bool) -> list[dict[str, Any]]:
    """The curves of an operation in the form of the JSON."""

    def timed(calls: Calls) -> dict[str, float]:
        gate(calls, op)
        return seconds(calls, 0.0 if quick else SECONDS)

    # Runs `own_peaks` in a process that returns freed memory immediately.
    words = ["benchmarks.studies.growth", "--peaks", "--only", op, *(["--quick"] if quick else [])]
    sizes = json.loads(memory.elsewhere(*words))
    found = []
    for curve, size in zip(curves(quick)[op], sizes, strict=True):
        shape = {"axis": curve.axis, "xs": curve.xs, "fixed": curve.fixed}
        expected = {"time": curve.time, "memory": curve.memory}
        times = along(op, curve, timed)
        found.append({**shape, "expected": expected, "seconds": times, "bytes": size})
    return found


def main() -> None:
    parser = kept.parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="operations that begin so")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rk.use_backend("cpu")
    ops = [op for op in curves(args.quick) if op.startswith(tuple(args.only))]
    if not ops:
        parser.error(f"--only: of {', '.join(curves(args.quick))}; found {' '.join(args.only)}")
    if args.peaks:
        print(json.dumps(own_peaks(ops[0], args.quick)))
        return
    file = kept.measured(args, "growth", "curves", ops, grown)
    print("\n".join(report.lines(file)))


if __name__ == "__main__":
    main()
