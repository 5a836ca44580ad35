"""How time and memory grow: with tokens, vocabulary, sequence length, threads.

    python -m benchmarks.studies.growth [name] [--only gae ...] [--quick]

Writes results/<name>-growth.json and a picture of each operation; `report.py` puts them in the
report of that name. Every point is gated against eager; providers take turns. Memory is what a call
holds at its highest beyond inputs and results, in a process of its own that gives freed memory back
at once, so that small allocations show too. With --only the other curves of the file stay.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
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
# As many rounds as fit into so many seconds of the slowest provider, but at least so many.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 4.0, 3, 21
WIDTH, VOCAB = 1024, 32768

Call = Callable[[], tuple[Tensor, ...]]
Calls = dict[str, Call]


class Curve(NamedTuple):
    """One operation along one axis.

    Attributes:
        axis: what grows; "threads" sets torch's.
        xs: its values.
        fixed: the rest of the shape, for people.
        calls: x -> providers as functions of nothing, "eager" among them: what others are
            compared with. All return the same results.
        time: slope of log time over log x that ours should have.
        memory: of its memory beyond inputs and results; None where that is not measured.
    """

    axis: str
    xs: tuple[int, ...]
    fixed: str
    calls: Callable[[int], Calls]
    time: float
    memory: float | None


def differentiated(
    function: Callable[..., tuple[Tensor, ...]], leaves: tuple[Tensor, ...], checked: int
) -> Call:
    """`checked` outputs of `function(*leaves)` and the gradients of their sum."""

    def call() -> tuple[Tensor, ...]:
        outputs = function(*leaves)[:checked]
        return *outputs, *torch.autograd.grad([o.sum() for o in outputs], leaves)

    return call


def logprobs(tokens: int, vocab: int = VOCAB) -> Calls:
    logits = (torch.randn(tokens, vocab) * 2).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    functions = {
        "ours": lambda z: tuple(rk.token_logprobs(z, labels, entropy=True)),
        "eager": lambda z: logprobs_points.eager_entropy(z, labels),
    }
    return {n: differentiated(f, (logits,), 2) for n, f in functions.items()}


def divergence(tokens: int, vocab: int = VOCAB) -> Calls:
    ref = torch.randn(tokens, vocab) * 2
    logits = ref + 0.3 * torch.randn_like(ref)
    return {
        "ours": lambda: (rk.kl_divergence(logits, ref),),
        "eager": lambda: (kl.eager_divergence(logits, ref),),
    }


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
    # Away from the clip's bounds: rounding must not decide on which side a token is.
    steps = torch.tensor([-0.4, -0.1, 0.05, 0.1, 0.4])
    new = (old + steps[torch.randint(0, 5, shape)]).requires_grad_()
    mask = torch.ones(shape, dtype=torch.bool)
    rest = (old, torch.randn(shape), mask, mask.float())
    functions = {"ours": policy_points.ours, "eager": policy_points.eager}
    return {n: differentiated(lambda x, f=f: f(x, *rest), (new,), 1) for n, f in functions.items()}


def head(tokens: int, vocab: int = VOCAB) -> Calls:
    hidden = torch.randn(1, tokens, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, WIDTH) * 2 / WIDTH**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens))
    old, advantages = torch.full((1, tokens), -math.log(vocab)), torch.randn(1, tokens)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    config = rk.PolicyLossConfig.reinforce()

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        args = (hidden, weight, labels, old, advantages, mask)
        return (rk.linear_policy_loss(*args[:5], mask=args[5], config=config).loss,)

    def after(logprobs: Tensor) -> tuple[Tensor, ...]:
        return (rk.policy_loss(logprobs, old, advantages, mask=mask, config=config).loss,)

    def eager(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return after(head_points.eager_logprobs(hidden, weight, labels))

    functions: dict[str, Any] = {"ours": ours, "eager": eager}
    trl = head_points.trl_head()
    if trl:
        functions["TRL"] = lambda h, w: after(trl(h[0], w, labels[0], ())[0][None])
    return {n: differentiated(f, (hidden, weight), 1) for n, f in functions.items()}


def _powers(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    found = [first]
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return tuple(found)


def _threads(fixed: str, calls: Callable[[], Calls]) -> Curve:
    """1 to as many threads as torch takes here."""
    most = torch.get_num_threads()
    xs = tuple(sorted({*_powers(1, most), most}))
    return Curve("threads", xs, fixed, lambda _: calls(), -1.0, None)


def curves(quick: bool) -> dict[str, list[Curve]]:
    """Of each operation. Time is linear in the size, memory of ours is none or a fixed budget."""
    small = 64 if quick else 1

    def sized(axis: str, xs: tuple[int, ...], fixed: str, calls: Callable[[int], Calls]) -> Curve:
        return Curve(axis, tuple(max(2, x // small) for x in xs), fixed, calls, 1.0, 0.0)

    n, v = 512 // small, VOCAB // small
    vocabs = _powers(8192, 131072)
    return {
        "token_logprobs + entropy, forward+backward, fp32": [
            sized("tokens", _powers(128, 2048), f"vocabulary {v}", lambda x: logprobs(x, v)),
            sized("vocabulary", vocabs, f"{n} tokens", lambda x: logprobs(n, x)),
            _threads(f"{n}×{v}", lambda: logprobs(n, v)),
        ],
        "kl_divergence, forward, fp32": [
            sized("tokens", _powers(128, 2048), f"vocabulary {v}", lambda x: divergence(x, v)),
            sized("vocabulary", vocabs, f"{n} tokens", lambda x: divergence(n, x)),
            _threads(f"{n}×{v}", lambda: divergence(n, v)),
        ],
        "gae, forward, fp32": [
            sized("sequence length", _powers(2048, 32768), "64 sequences", gae),
            sized("sequences", _powers(256, 4096), "length 1024", lambda x: gae(1024 // small, x)),
            _threads(f"512×{4096 // small}", lambda: gae(4096 // small, 512)),
        ],
        "policy_loss, forward+backward, fp32": [
            sized("tokens", _powers(2**18, 2**22), "in sequences of 2048", policy),
            _threads(f"{2**22 // small} tokens", lambda: policy(2**22 // small)),
        ],
        f"linear_policy_loss, forward+backward, bf16, width {WIDTH}": [
            sized("tokens", _powers(1024, 8192), f"vocabulary {v}", lambda x: head(x, v)),
            sized("vocabulary", vocabs[1:], "2048 tokens", lambda x: head(2048 // small, x)),
            _threads(f"2048 tokens, vocabulary {v}", lambda: head(2048 // small, v)),
        ],
    }


def gate(calls: Calls, where: str) -> None:
    """Raises GateError where a provider's results are not eager's."""
    expected = calls["eager"]()
    # What is rounded on the way is as coarse as the coarsest.
    gap = max(measure.GATE[e.dtype] for e in expected)
    for name, call in calls.items():
        for a, e in zip(call(), expected, strict=True):
            allowed = gap * float(e.abs().max())
            if not float((a.float() - e.float()).abs().max()) <= allowed:
                raise measure.GateError(f"{name}: {where}")


def seconds(calls: Calls, budget: float) -> dict[str, float]:
    """Medians of the same rounds for all, in which the providers take turns."""
    clock = clocks.timer(CPU)
    times: dict[str, list[float]] = {n: [] for n in calls}
    for turn in range(1, MOST_ROUNDS + 1):
        for name, call in calls.items():
            clock.start(0.0)
            result = call()
            times[name].append(clock.stop())
            del result
        medians = {n: statistics.median(t) for n, t in times.items()}
        if turn >= max(LEAST_ROUNDS, int(budget / max(medians.values()))):
            break
    return medians


def peaks(calls: Calls) -> dict[str, int | None]:
    """Bytes beyond inputs and results that each provider holds at its highest."""
    found = {}
    for name, call in calls.items():
        # Once before, for what is set up once.
        call()
        found[name] = memory.measured(call, CPU).get("extra_bytes")
    return found


def along(op: str, curve: Curve, measure: Callable[[Calls], Any]) -> list[Any]:
    """`measure` of the providers at each x of a curve."""
    threads, found = torch.get_num_threads(), []
    for x in curve.xs:
        torch.manual_seed(0)
        torch.set_num_threads(x if curve.axis == "threads" else threads)
        found.append(measure(curve.calls(x)))
        print(op, curve.axis, x, json.dumps(found[-1]), file=sys.stderr, flush=True)
    torch.set_num_threads(threads)
    return found


def own_peaks(op: str, quick: bool) -> None:
    """Prints the peaks of every curve of `op` at each x as JSON; None where they do not matter."""
    found = [
        None if curve.memory is None else along(op, curve, peaks) for curve in curves(quick)[op]
    ]
    print(json.dumps(found))


def peaks_elsewhere(op: str, quick: bool) -> list[list[dict[str, int | None]] | None]:
    """`own_peaks` of a process whose freed memory goes back to the system at once."""
    words = ["benchmarks.studies.growth", "--peaks", "--only", op, *(["--quick"] if quick else [])]
    return json.loads(memory.elsewhere(*words))


def grown(op: str, quick: bool) -> list[dict[str, Any]]:
    """The curves of an operation, as the JSON has them."""

    def timed(calls: Calls) -> dict[str, float]:
        gate(calls, op)
        return seconds(calls, 0.0 if quick else SECONDS)

    found = []
    for curve, size in zip(curves(quick)[op], peaks_elsewhere(op, quick), strict=True):
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
        own_peaks(ops[0], args.quick)
        return
    file = kept.measured(args, "growth", "curves", ops, grown)
    print("\n".join(report.lines(file)))


if __name__ == "__main__":
    main()
