"""Bad data and odd layouts for the Triton kernels, in guarded memory. Run by test_triton_faults.py:

python -m tests.kernels.triton_fault_cases OPERATION FILE saves the results of its cases, from both
sides of the guard; `--errors` prints as JSON what RLHF_KERNELS_CHECK=1 raises, for all operations;
`--bad-kernel READ WRITE` copies with offsets that lie outside the tensors unless both are 0.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tests.kernels.guarded_memory import SIDES, GuardedMemory
from tests.kernels.quick_interpreter import quicken

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends
from rlhf_kernels.kernels.triton import _tokens, advantages, policy
from rlhf_kernels.kernels.triton._launch import kernel, launch

NAN, INF = math.nan, math.inf
ALL = "all"


class Case(NamedTuple):
    """A call and what is promised of its results, tensors whose first dimension is rows."""

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    # Name of the case whose results these repeat, bit for bit, but for the poisoned rows.
    like: str = "clean"
    # Rows that are NaN in every result, or ALL results.
    poisoned: tuple[int, ...] | str = ()
    # What RLHF_KERNELS_CHECK=1 raises: part of the message.
    error: str = ""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `t` behind other addresses and strides, or behind a sign."""
    t = t.detach()
    yield "misaligned", torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)
    yield "strided", torch.stack((t, torch.zeros_like(t)), -1)[..., 0]
    yield "wide rows", torch.cat((t, t, t), -1)[..., t.shape[-1] : 2 * t.shape[-1]]
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.dtype is torch.float32:
        yield "negated", torch.view_as_complex(torch.stack((t, -t), -1)).conj().imag


def with_layouts(
    call: Callable[..., tuple[Tensor, ...]], arguments: Callable[[], dict[str, Tensor]]
) -> Iterator[Case]:
    """Every layout of every argument of `call`, which takes them by name: another one for each."""
    names = [[layout for layout, _ in layouts(t)] for t in arguments().values()]
    for i in range(max(map(len, names))):

        def odd(i: int = i) -> tuple[Tensor, ...]:
            given = {}
            for place, (name, t) in enumerate(arguments().items()):
                views = list(layouts(t))
                given[name] = views[(i + place) % len(views)][1]
            return call(**given)

        yield Case(", ".join(n[(i + place) % len(n)] for place, n in enumerate(names)), odd)


def backward(outputs: tuple[Tensor, ...], of: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(outputs, of, [upstream.expand_as(o) for o in outputs])[0]


# token_logprobs and kl_divergence: rows of 16-byte loads for every case; for a few a vocabulary of
# several tiles, the last one ragged.
ROWS, VOCAB, TILES = 3, 304, 8197


def named(prefix: str, cases: Iterator[Case]) -> Iterator[Case]:
    return (c._replace(name=f"{prefix} {c.name}", like=f"{prefix} {c.like}") for c in cases)


def token_logprobs() -> Iterator[Case]:
    yield from named("small", _token_logprobs(VOCAB))
    yield from named("tiles", _token_logprobs(TILES))


def _token_logprobs(vocab: int) -> Iterator[Case]:
    def call(
        logits: Tensor, labels: Tensor, upstream: Tensor, temperature: Tensor | float = 1.0
    ) -> tuple[Tensor, ...]:
        logits = logits.detach().requires_grad_()
        out = rk.token_logprobs(logits, labels, temperature=temperature, entropy=True)
        return (*out, backward(tuple(out), logits, upstream))

    def arguments() -> dict[str, Tensor]:
        labels = torch.tensor([0, vocab - 1, vocab // 2])
        return {"logits": normal(ROWS, vocab), "labels": labels, "upstream": torch.ones(ROWS)}

    def with_label(row: int, label: int, dtype: torch.dtype = torch.int64) -> Case:
        def run() -> tuple[Tensor, ...]:
            given = arguments()
            given["labels"][row] = label
            return call(**given | {"labels": given["labels"].to(dtype)})

        error = f"IndexError: token_logprobs: label at flat position {row} is {label};"
        return Case(f"label {label} {dtype} in row {row}", run, "clean", (row,), error)

    def with_temperature(value: float) -> Case:
        def run() -> tuple[Tensor, ...]:
            temperature = torch.ones(ROWS)
            temperature[1] = value
            return call(**arguments(), temperature=temperature)[:2]

        error = "temperature at flat position 1 must be a finite number > 0, between 2^-60 and "
        error += f"2^60 (8.7e-19 and 1.2e18), got {value}"
        return Case(f"temperature {value}", run, "clean", (1,), error)

    def ignored(fill: float) -> tuple[Tensor, ...]:
        given = arguments()
        given["labels"][[0, 2]] = -100
        given["logits"][[0, 2]] = fill
        return call(**given)

    def one_word() -> tuple[Tensor, ...]:
        return call(normal(ROWS, 1), torch.zeros(ROWS, dtype=torch.long), torch.ones(ROWS))

    def empty() -> tuple[Tensor, ...]:
        return call(normal(0, vocab), torch.zeros(0, dtype=torch.long), torch.ones(0))

    def expanded() -> tuple[Tensor, ...]:
        given = arguments()
        return call(given["logits"], given["labels"], torch.ones(()).expand(ROWS))

    yield Case("clean", lambda: call(**arguments()))
    yield Case("ignored", lambda: ignored(0.0), like="ignored")
    yield Case("NaN in ignored rows", lambda: ignored(NAN), like="ignored")
    for label in (vocab, -1, 2**40):
        yield with_label(ROWS - 1, label)
    if vocab == TILES:
        return
    for row in (0, ROWS - 1):
        for label in (vocab + 1, 2**31, -(2**31), -(2**40), 2**63 - 1, -(2**63)):
            yield with_label(row, label)
        for label in (vocab, -1, 2**31 - 1, -(2**31)):
            yield with_label(row, label, torch.int32)
    for value in (0.0, -1.0, NAN, INF):
        yield with_temperature(value)
    for fill in (INF, -INF):
        yield Case(f"{fill} in ignored rows", lambda f=fill: ignored(f), like="ignored")
    yield Case("vocabulary of one", one_word, like="vocabulary of one")
    yield Case("empty", empty, like="empty")
    yield Case("expanded upstream", expanded)
    yield from with_layouts(call, arguments)


def kl_divergence() -> Iterator[Case]:
    for direction in ("reverse", "forward"):
        yield from named(f"{direction} small", _kl_divergence(direction, VOCAB))
        yield from named(f"{direction} tiles", _kl_divergence(direction, TILES))


def _kl_divergence(direction: str, vocab: int) -> Iterator[Case]:
    def call(logits: Tensor, ref_logits: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        logits = logits.detach().requires_grad_()
        kl = rk.kl_divergence(logits, ref_logits, direction=direction, temperature=0.7)
        return kl, backward((kl,), logits, upstream)

    def arguments() -> dict[str, Tensor]:
        return {
            "logits": normal(ROWS, vocab),
            "ref_logits": normal(ROWS, vocab, seed=1),
            "upstream": torch.ones(ROWS),
        }

    def dirty(name: str, column: int | slice, value: float) -> Case:
        def run() -> tuple[Tensor, ...]:
            given = arguments()
            given[name][2, column] = value
            return call(**given)[:1]

        return Case(f"{value} in {name} at {column}", run, "clean", (2,))

    def frozen(fill: float) -> tuple[Tensor, ...]:
        given = arguments()
        given["upstream"][2] = 0.0
        given["logits"][2] = fill
        return call(**given)[1:]

    yield Case("clean", lambda: call(**arguments()))
    for name in ("logits", "ref_logits"):
        yield dirty(name, vocab - 1, NAN)
    if vocab == TILES:
        return
    for name in ("logits", "ref_logits"):
        yield dirty(name, vocab // 2, INF)
        yield dirty(name, slice(None), -INF)
    yield Case("frozen", lambda: frozen(0.0), like="frozen")
    yield Case("NaN in a row without upstream", lambda: frozen(NAN), like="frozen")
    one = "vocabulary of one"
    yield Case(one, lambda: call(normal(3, 1), normal(3, 1, seed=1), torch.ones(3)), like=one)
    yield Case("empty", lambda: call(normal(0, 9), normal(0, 9), torch.ones(0)), like="empty")
    yield Case(
        "expanded upstream", lambda: call(**arguments() | {"upstream": torch.ones(()).expand(ROWS)})
    )
    # The direction only swaps the two.
    if direction == "reverse":
        yield from with_layouts(call, arguments)


def kl_penalty() -> Iterator[Case]:
    def call(logprobs: Tensor, ref_logprobs: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        logprobs = logprobs.detach().requires_grad_()
        kl = rk.kl_penalty(logprobs, ref_logprobs, estimator="k3")
        return kl, backward((kl,), logprobs, upstream)

    def arguments() -> dict[str, Tensor]:
        shape = 7, 211
        return {
            "logprobs": normal(*shape),
            "ref_logprobs": normal(*shape, seed=1),
            "upstream": normal(*shape, seed=2),
        }

    def dirty(value: float) -> Case:
        def run() -> tuple[Tensor, ...]:
            given = arguments()
            given["logprobs"][3] = value
            return call(**given)

        return Case(f"{value} in a row", run, "clean", (3,))

    def frozen(fill: float) -> tuple[Tensor, ...]:
        given = arguments()
        given["upstream"][2] = 0.0
        given["logprobs"][2] = fill
        return call(**given)[1:]

    yield Case("clean", lambda: call(**arguments()))
    yield dirty(NAN)
    yield Case("frozen", lambda: frozen(0.0), like="frozen")
    for fill in (NAN, INF, -INF):
        yield Case(f"{fill} without upstream", lambda f=fill: frozen(f), like="frozen")
    yield Case("empty", lambda: call(normal(0, 9), normal(0, 9), torch.ones(0, 9)), like="empty")
    for name, shape in (("ones", (7, 211)), ("expanded upstream", ())):
        yield Case(
            name, lambda s=shape: call(**arguments() | {"upstream": torch.ones(s)}), like="ones"
        )
    yield from with_layouts(call, arguments)


# Tokens: rows of two tiles of 64, the last one ragged. Sequences of four: the one with all tokens.
BATCH, LENGTH = 3, 70
EVEN = [0, 70, 140, 210]

# The same tokens packed, each list wrong in its own way.
BAD_OFFSETS = {
    "late start": ([7, 70, 140, 210], 0),
    "negative start": ([-7, 70, 140, 210], 0),
    "early end": ([0, 70, 140, 200], 3),
    "end beyond": ([0, 70, 140, 211], 3),
    "end far beyond": ([0, 70, 140, 100_000], 3),
    "falling": ([0, 140, 70, 210], 2),
    "negative": ([0, -5, 140, 210], 1),
    "huge": ([0, 2**40, 140, 210], 1),
    "hugely negative": ([0, -(2**40), 140, 210], 1),
    "all huge": ([2**62] * 4, 0),
    "falling from beyond": ([0, 2**31 - 1, -(2**31), 210], 1),
    "no sequence": ([0], 0),
}

# Those for which the width of an entry could matter and which are not too large for 32 bits.
OF_32_BITS = ("negative", "end beyond", "falling from beyond", "no sequence")


def mask() -> Tensor:
    keep = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7
    keep[1] = False
    return keep


def token_cases(
    operation: str,
    call: Callable[..., tuple[Tensor, ...]],
    arguments: Callable[[], dict[str, Tensor]],
    per_sequence: tuple[str, ...] = (),
) -> Iterator[Case]:
    """What every operation on tokens promises; `arguments` are [BATCH, LENGTH], or [BATCH]."""
    tokens = [name for name in arguments() if name not in per_sequence]

    def packed(offsets: list[int], dtype: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
        given = arguments()
        given |= {name: given[name].reshape(-1) for name in tokens}
        # One entry per sequence, however many the offsets name.
        given |= {name: given[name][: len(offsets) - 1] for name in per_sequence}
        return call(**given, cu_seqlens=torch.tensor(offsets, dtype=dtype))

    def masked(fill: float) -> tuple[Tensor, ...]:
        given = arguments()
        for name in tokens:
            if given[name].is_floating_point():
                given[name] = given[name].masked_fill(~mask(), fill)
        return call(**given | {"mask": mask()})

    def resized(rows: int, cols: int) -> tuple[Tensor, ...]:
        given = arguments()
        given |= {n: t[:rows] if n in per_sequence else t[:rows, :cols] for n, t in given.items()}
        return call(**given)

    yield Case("clean", lambda: call(**arguments()))
    yield Case("packed", lambda: packed(EVEN), like="packed")
    for dtype in (torch.int32, torch.int64):
        for name, (offsets, at) in BAD_OFFSETS.items():
            if dtype is torch.int32 and name not in OF_32_BITS:
                continue
            error = f"{operation}: cu_seqlens must start at 0"
            # S = 0 of tokens has no operation on sequences to compare its one entry with.
            yield Case(
                f"offsets {name} {dtype}",
                lambda o=offsets, d=dtype: packed(o, d),
                "packed",
                ALL,
                f"ValueError: {error}, never decrease and end at the number of tokens, 210; "
                f"entry {at} is {offsets[at]}",
            )
    for dtype in (torch.int32, torch.int64):
        gaps = [0, 0, 0, 210] if dtype is torch.int32 else [0, 210, 210, 210]
        name = f"sequences of no tokens {dtype}"
        yield Case(name, lambda o=gaps, d=dtype: packed(o, d), like=name)
    yield Case("masked", lambda: masked(0.0), like="masked")
    for fill in (NAN, INF, -INF):
        yield Case(f"{fill} under the mask", lambda f=fill: masked(f), like="masked")
    for rows, cols in ((0, LENGTH), (BATCH, 0), (1, 1), (BATCH, 1)):
        yield Case(
            f"{rows} x {cols}", lambda r=rows, c=cols: resized(r, c), like=f"{rows} x {cols}"
        )
    yield from with_layouts(call, arguments)


def gae() -> Iterator[Case]:
    def call(rewards: Tensor, values: Tensor, **options: Tensor) -> tuple[Tensor, ...]:
        return tuple(rk.gae(rewards, values, gamma=0.9, lam=0.8, **options))

    def arguments() -> dict[str, Tensor]:
        return {
            "rewards": normal(BATCH, LENGTH),
            "values": normal(BATCH, LENGTH, seed=1),
            "mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
            "dones": normal(BATCH, LENGTH, seed=2) > 2,
            "bootstrap_values": normal(BATCH, seed=4),
        }

    yield from token_cases("gae", call, arguments, ("bootstrap_values",))


def discounted_returns() -> Iterator[Case]:
    def call(rewards: Tensor, **options: Tensor) -> tuple[Tensor, ...]:
        return (rk.discounted_returns(rewards, gamma=0.9, **options),)

    def arguments() -> dict[str, Tensor]:
        ones = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        return {"rewards": normal(BATCH, LENGTH), "mask": ones, "bootstrap_values": normal(BATCH)}

    yield from token_cases("discounted_returns", call, arguments, ("bootstrap_values",))


def ppo_advantages() -> Iterator[Case]:
    def call(**given: Tensor) -> tuple[Tensor, ...]:
        return tuple(rk.ppo_advantages(**given, kl_coef=0.1, kl_estimator="k3", gamma=0.9))

    def arguments() -> dict[str, Tensor]:
        return {
            "scores": normal(BATCH, seed=4),
            "logprobs": normal(BATCH, LENGTH),
            "ref_logprobs": normal(BATCH, LENGTH, seed=1),
            "values": normal(BATCH, LENGTH, seed=2),
            "mask": torch.ones(BATCH, LENGTH, dtype=torch.uint8),
        }

    yield from token_cases("ppo_advantages", call, arguments, ("scores",))


def whiten() -> Iterator[Case]:
    def call(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (rk.whiten(x, mask=mask),)

    def arguments() -> dict[str, Tensor]:
        return {"x": normal(BATCH, 1500), "mask": normal(BATCH, 1500, seed=1) > 0}

    def masked(fill: float) -> tuple[Tensor, ...]:
        given = arguments()
        return call(given["x"].masked_fill(~given["mask"], fill), given["mask"])

    yield Case("clean", lambda: call(**arguments()))
    for fill in (NAN, INF, -INF):
        yield Case(f"{fill} under the mask", lambda f=fill: masked(f))
    for shape in ((0, 7), (7, 0), (1,), ()):
        name = f"shape {shape}"
        yield Case(name, lambda s=shape: call(normal(*s), normal(*s) == normal(*s)), like=name)
    yield from with_layouts(call, arguments)


def group_advantages() -> Iterator[Case]:
    def call(rewards: Tensor, groups: Tensor | int) -> tuple[Tensor, ...]:
        return (rk.group_advantages(rewards, groups),)

    def arguments() -> dict[str, Tensor]:
        return {"rewards": normal(300), "groups": torch.arange(300) % 7}

    def ids(values: list[int]) -> tuple[Tensor, ...]:
        return call(normal(300), torch.tensor(values)[torch.arange(300) % 7])

    yield Case("clean", lambda: call(**arguments()))
    extreme = [-(2**63), -(2**40), -1, 0, 2**31, 2**40, 2**63 - 1]
    yield Case("any ids", lambda: ids(extreme))
    yield Case("ids in falling order", lambda: ids(extreme[::-1]))
    yield Case("groups of one", lambda: call(normal(300), 1), like="groups of one")
    yield Case("one group", lambda: call(normal(300), 300), like="one group")
    yield Case("empty", lambda: call(normal(0), normal(0) > 0), like="empty")
    yield from with_layouts(call, arguments)


def policy_loss() -> Iterator[Case]:
    # With sequences as a whole there is a pass over the tokens before, and one behind.
    sequences = rk.PolicyLossConfig(
        ratio_level="sequence",
        correction_level="sequence",
        correction_max=2.0,
        aggregation="seq-mean-token-mean",
    )
    terms = rk.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)
    yield from named("terms", _policy_loss(terms))
    yield from named("sequences", _policy_loss(sequences))


def _policy_loss(config: rk.PolicyLossConfig) -> Iterator[Case]:
    def call(logprobs: Tensor, old_logprobs: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        logprobs = logprobs.detach().requires_grad_()
        mask = given.pop("mask", None)
        mask = torch.ones(logprobs.shape, dtype=torch.bool) if mask is None else mask
        loss, metrics = rk.policy_loss(logprobs, old_logprobs, mask=mask, config=config, **given)
        return loss, backward((loss,), logprobs, torch.ones(())), metrics.tensor

    def arguments() -> dict[str, Tensor]:
        return {
            "logprobs": normal(BATCH, LENGTH) * 0.2,
            "old_logprobs": normal(BATCH, LENGTH, seed=1) * 0.2,
            "ref_logprobs": normal(BATCH, LENGTH, seed=2) * 0.2,
            "rollout_logprobs": normal(BATCH, LENGTH, seed=3) * 0.2,
            "entropy": normal(BATCH, LENGTH, seed=4),
            "advantages": normal(BATCH, seed=5),
        }

    yield from token_cases("policy_loss", call, arguments, ("advantages",))
    yield from normalizers(lambda n: call(**arguments(), normalizer=n)[:2])


def value_loss() -> Iterator[Case]:
    def call(values: Tensor, mask: Tensor | None = None, **given: Tensor) -> tuple[Tensor, ...]:
        values = values.detach().requires_grad_()
        mask = torch.ones(values.shape, dtype=torch.bool) if mask is None else mask
        loss, metrics = rk.value_loss(values, mask=mask, clip_range=0.2, **given)
        return loss, backward((loss,), values, torch.ones(())), metrics.tensor

    def arguments() -> dict[str, Tensor]:
        names = ("values", "old_values", "returns")
        return {name: normal(BATCH, LENGTH, seed=i) for i, name in enumerate(names)}

    yield from token_cases("value_loss", call, arguments)
    yield from normalizers(lambda n: call(**arguments(), normalizer=n)[:2])


def normalizers(call: Callable[[Tensor], tuple[Tensor, ...]]) -> Iterator[Case]:
    for bad in (0.0, -2.0, NAN, INF):
        error = f"normalizer must be a finite number > 0, got {bad}"
        yield Case(f"normalizer {bad}", lambda b=bad: call(torch.tensor(b)), "clean", ALL, error)


_ALL = (
    token_logprobs, kl_divergence, kl_penalty, gae, discounted_returns, ppo_advantages, whiten,
    group_advantages, policy_loss, value_loss,
)  # fmt: skip
OPERATIONS = {f.__name__: f for f in _ALL if f.__name__ in backends.triton.launchers()}


def results(operation: str) -> dict[str, dict[str, list[Tensor]]]:
    """Results of every case, by side of the guard and by name."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for side in SIDES:
        found[side] = {}
        for case in OPERATIONS[operation]():
            with GuardedMemory(side) as memory:
                tensors = [t.detach() for t in case.call()]
            memory.check()
            found[side][case.name] = [t.clone() for t in tensors]
    return found


def errors() -> dict[str, dict[str, str]]:
    """Type and text of what the bad cases raise, by operation and name."""
    found: dict[str, dict[str, str]] = {}
    for operation, cases in OPERATIONS.items():
        found[operation] = {}
        for case in cases():
            if case.error:
                try:
                    case.call()
                    found[operation][case.name] = "nothing"
                except (IndexError, ValueError) as error:
                    found[operation][case.name] = f"{type(error).__name__}: {error}"
    return found


@kernel
def copy_kernel(x, out, n, read, write, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i + write, tl.load(x + i + read, mask=i < n, other=0.0), mask=i < n)


def bad_kernel(read: int, write: int) -> None:
    for side in SIDES:
        with GuardedMemory(side) as memory:
            x, out = torch.ones(100), torch.empty(100)
            launch(copy_kernel, 1, x, x, out, 100, read, write, BLOCK=128, warps=1)
            memory.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", nargs="?", choices=OPERATIONS)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--bad-kernel", type=int, nargs=2)
    options = parser.parse_args()
    if options.bad_kernel:
        bad_kernel(*options.bad_kernel)
    quicken()
    # As small as the interpreter's tiles of the scans, so that sequences here have several.
    _tokens.TILE = policy.BACKWARD_TILE = advantages.TILE
    with rk.use_backend("triton"):
        if options.operation:
            torch.save(results(options.operation), options.file)
        if options.errors:
            print(json.dumps(errors()))


if __name__ == "__main__":
    main()
