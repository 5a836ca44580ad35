"""Random calls of the operations, and what is right for each: what `fuzz.py` runs.

A case is made from its seed alone. It is judged against the reference in float64 per element: where
a softmax or a product is inside, by the bounds of `bounds.py`; elsewhere by how far the exact
result moves when every input moves by a rounding, which is the error of the best algorithm.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.head.bounds import HeadBounds, SoftmaxBounds, logprobs_bounds, policy_bounds
from tests.ops.support_cases import within

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import policy
from rlhf_kernels.ops import _examples
from rlhf_kernels.testing import assert_within_bound, to_float64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around vectors, unrolled steps, blocks and tiles of the kernels.
EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
FAR_EDGES = (511, 513, 1023, 1024, 1025, 2047, 2049, 4096, 4099, 8200)
# What an interpreted kernel can do in a second.
INTERPRETED_MOST = 140
EPS = torch.finfo(torch.float32).eps
INVARIANT = "batch_invariant"
# Roundings of a result beside those of its inputs.
ROUNDINGS = 8.0
# Bounds of (results..., gradients...) from the exact results and the upstream gradients.
Bounds = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclasses.dataclass
class Case:
    """A call: the operation's name, its keyword arguments, and how its results are judged."""

    op: str
    arguments: dict[str, Any]
    draw: "Draw"
    bounds: Bounds | None = None
    # A result that is a sum with this argument, which rounds whatever cancels.
    beside: tuple[int, str] | None = None

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                grad = " grad" if value.requires_grad else ""
                return f"{kind}{list(value.shape)} strides {list(value.stride())}{grad}"
            if isinstance(value, tuple):
                return f"({', '.join(map(shown, value))})"
            if isinstance(value, rk.PolicyLossConfig):
                fields = dataclasses.fields(value)
                set_here = [f.name for f in fields if getattr(value, f.name) != f.default]
                return f"Config({', '.join(f'{n}={getattr(value, n)!r}' for n in set_here)})"
            return repr(value)

        return f"{self.op}({', '.join(f'{k}={shown(v)}' for k, v in self.arguments.items())})"


class Draw:
    """Random values of a case."""

    def __init__(self, seed: int, interpreted: bool) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self._interpreted = interpreted
        self.expanded_upstream = self.chance(0.3)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int = 1 << 30, least: int = 0) -> int:
        most = min(most, INTERPRETED_MOST) if self._interpreted else most
        sizes = [s for s in EDGES + FAR_EDGES * self.chance(0.3) if least <= s <= most]
        return self.pick(self.pick(*sizes), self.random.randint(least, min(most, 70)))

    def dtype(self) -> torch.dtype:
        return self.pick(torch.float32, *DTYPES)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = (self.normal(*shape) * scale).to(dtype or self.dtype())
        return self.laid_out(values, expand=True)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, max(high, low + 1), shape, generator=self.torch)
        return self.laid_out(values.to(self.pick(torch.int64, torch.int32)))

    def wanted(self, t: Tensor, p: float = 0.8) -> Tensor:
        return t.requires_grad_() if self.chance(p) else t

    def laid_out(self, t: Tensor, expand: bool = False) -> Tensor:
        """The same values in other strides, beside values that nobody may look at.

        With `expand` also one value, or one slice, in place of all along a dimension.
        """
        if t.dim() == 0 or self.chance(0.4):
            return t
        way = self.pick("offset", "transposed", "wider", "every second", "expanded")
        junk = torch.nan if t.is_floating_point() else 1
        if way == "transposed" and t.dim() > 1:
            a, b = self.random.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if way == "expanded":
            at = self.random.randrange(t.dim())
            if expand and t.shape[at] > 1 and self.chance(0.5):
                return t.narrow(at, 0, 1).expand(t.shape)
            return t
        if way == "wider":
            at = self.random.randrange(t.dim())
            shape = list(t.shape)
            before, after = self.random.randint(0, 3), self.random.randint(0, 3)
            shape[at] += before + after
            out = torch.full(shape, junk, dtype=t.dtype).narrow(at, before, t.shape[at])
        elif way == "every second":
            out = torch.full((*t.shape, 2), junk, dtype=t.dtype)[..., self.random.randint(0, 1)]
        else:
            start = self.random.randint(1, 5)
            flat = torch.full((t.numel() + start,), junk, dtype=t.dtype)
            out = flat[start:].view(t.shape)
        return out.copy_(t)

    def mask(self, shape: Sequence[int], p: float | None = None) -> Tensor:
        """Bool or integer; sometimes nothing, or everything, or whole sequences."""
        keep = torch.rand(tuple(shape), generator=self.torch) < (p or self.pick(0.0, 0.5, 0.9, 1.1))
        if len(shape) > 1 and shape[0] > 1 and self.chance(0.3):
            keep[self.random.randrange(shape[0])] = False
        dtype = self.pick(torch.bool, torch.bool, torch.int64, torch.int32, torch.uint8)
        return self.laid_out(keep if dtype is torch.bool else keep.to(dtype) * 3)

    def hidden(self, t: Tensor, mask: Tensor | None) -> Tensor:
        """t with NaN and infinities where the mask is 0."""
        if mask is None or t.numel() == 0 or self.chance(0.5):
            return t
        # Expanded memory holds one value for several tokens.
        t = t.clone() if 0 in t.stride() else t
        junk = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(t.dtype)
        t[mask == 0] = junk[self.random.randrange(3)]
        return t

    def tokens(self) -> tuple[tuple[int, ...], Tensor | None, int]:
        """(shape, cu_seqlens, sequences) of values per token: padded or packed."""
        if self.chance(0.5):
            rows = self.size(20)
            return (rows, self.size(20_000 // max(rows, 1))), None, rows
        lengths = [self.size(3000) for _ in range(self.random.randint(1, 12))]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(self.pick(torch.int32, torch.int64))
        return (int(offsets[-1]),), self.laid_out(offsets), len(lengths)


def temperature(d: Draw, shape: Sequence[int]) -> float | Tensor:
    if d.chance(0.3):
        values = torch.rand(tuple(shape), generator=d.torch) * 2 + 0.3
        return d.laid_out(values.to(d.dtype()))
    return d.pick(1.0, 0.7, 1.3, 0.05, 20.0)


def logits(d: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    values = d.normal(*shape) * d.pick(1.0, 3.0, 30.0) + d.pick(0.0, 0.0, 100.0, -1e4)
    values = values.to(dtype)
    if values.numel() and d.chance(0.3):
        # Not the first word: a row of nothing is not a distribution.
        taken_out = torch.rand(values.shape, generator=d.torch) < 0.2
        taken_out[..., 0] = False
        values[taken_out] = -torch.inf
    return values


def with_faults(d: Draw, values: Tensor) -> Tensor:
    """One logit that is not a number, or infinite, or as large as can be."""
    if values.numel():
        at = d.random.randrange(values.numel())
        values.view(-1)[at] = d.pick(torch.nan, torch.inf, torch.finfo(values.dtype).max)
    return values


def labels(d: Draw, shape: Sequence[int], vocab: int, ignored: int = -100) -> Tensor:
    found = d.integers(0, vocab, *shape)
    skipped = torch.rand(tuple(shape), generator=d.torch) < d.pick(0.0, 0.3, 1.1)
    return torch.where(skipped, ignored, found).to(found.dtype)


def row_options(d: Draw, shape: Sequence[int]) -> dict[str, Any]:
    return {"temperature": temperature(d, shape), "softcap": d.pick(None, None, 5.0, 30.0)}


def support(d: Draw, count: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Random words of each token, at times none or all."""
    kept = torch.rand(count, vocab, generator=d.torch) < d.pick(0.05, 0.5, 1.1)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    words = [row.nonzero().flatten() for row in kept]
    words = [w[torch.randperm(len(w), generator=d.torch)] for w in words]
    words = torch.cat([*words, torch.zeros(0, dtype=torch.int64)])
    dtype = d.pick(torch.int32, torch.int64)
    return d.laid_out(indptr.to(dtype)), d.laid_out(words.to(dtype))


def judged(labels: Tensor, kept: Tensor | None) -> Tensor:
    """Labels, -1 for tokens without words: NaN, and a gradient of 0."""
    return labels if kept is None else labels.where(kept.any(-1).view(labels.shape), -1)


def token_logprobs(d: Draw) -> Case:
    shape = (d.size(40),) if d.chance(0.6) else (d.size(5), d.size(9))
    vocab = d.size(300_000 // max(1, torch.Size(shape).numel()), 1)
    x, faulty = logits(d, *shape, vocab, dtype=d.dtype()), d.chance(0.1)
    # A row that is not a distribution has a result, but no gradient to speak of.
    x = d.laid_out(with_faults(d, x)) if faulty else d.wanted(d.laid_out(x))
    ignored = d.pick(-100, -1, vocab + 3)
    y = labels(d, shape, vocab, ignored)
    options = row_options(d, shape)
    given = support(d, y.numel(), vocab) if d.chance(0.2) else None

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        z = x.detach().double().reshape(-1, vocab)
        kept = within(given, z.shape)
        if kept is not None:
            z = torch.where(kept | ~kept.any(-1, keepdim=True), z, -torch.inf)
        rows = SoftmaxBounds(z, torch.zeros_like(z), x.dtype, **options)
        known = judged(torch.where(y == ignored, -1, y.long()), kept)
        bound = torch.where(known >= 0, rows.logprobs(known), 0)
        gradient = rows.token_gradient(known, *upstream)[1] if upstream else None
        found = [bound, torch.where(known >= 0, rows.entropy(known.shape), 0), gradient]
        return [b for b, e in zip(found, (True, entropy, x.requires_grad), strict=True) if e]

    entropy = d.chance(0.5)
    arguments = {"logits": x, "labels": y, **options, "entropy": entropy}
    arguments |= {"ignore_index": ignored, "support": given}
    return Case("token_logprobs", arguments, d, bounds)


def kl_divergence(d: Draw) -> Case:
    shape = (d.size(40),) if d.chance(0.6) else (d.size(5), d.size(9))
    vocab, dtype = d.size(300_000 // max(1, torch.Size(shape).numel()), 1), d.dtype()
    scale = d.pick(1.0, 3.0, 10.0)
    x, r = (d.floats(*shape, vocab, scale=scale, dtype=dtype) for _ in range(2))
    t, reverse = d.pick(1.0, 0.7, 2.0), d.chance(0.5)

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        p, q = (
            SoftmaxBounds(z.reshape(-1, vocab), torch.zeros(z.numel() // vocab, vocab), dtype,
                          temperature=t)
            for z in (x.detach().double(), r.detach().double())
        )  # fmt: skip
        found = [p.kl(q, reverse, shape)]
        return found + ([p.kl_gradient(q, reverse, upstream[0])[1]] if upstream else [])

    direction = "reverse" if reverse else "forward"
    arguments = {"logits": d.wanted(x), "ref_logits": r, "temperature": t, "direction": direction}
    return Case("kl_divergence", arguments, d, bounds)


def head(d: Draw, count: int, dtype: torch.dtype, vocab: int) -> tuple[Tensor, ...]:
    """(hidden [count, H], weight, bias or None)"""
    width = d.size(80, 1)
    hidden = d.laid_out((d.normal(count, width) * d.pick(1.0, 1.0, 5.0)).to(dtype))
    weight = d.laid_out((d.normal(vocab, width) / width**0.5).to(dtype))
    bias = d.laid_out(d.normal(vocab).to(dtype)) if d.chance(0.4) else None
    return hidden, weight, bias


def leaves(d: Draw, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else d.wanted(t, 0.7) for t in operands]


def chunks(d: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {"chunk_tokens": d.pick(None, None, 1, 5, 16, 64)}
    return options | {INVARIANT: d.chance(0.15)}


def of_chunk(options: dict[str, Any]) -> int:
    return options["chunk_tokens"] or 16


def linear_token_logprobs(d: Draw) -> Case:
    count, dtype = d.size(300), d.dtype()
    vocab = d.size(40_000 // max(1, count), 1)
    hidden, weight, bias = leaves(d, head(d, count, dtype, vocab))
    y = labels(d, (count,), vocab)
    options = row_options(d, (count,)) | {"logit_scale": d.pick(1.0, 1.0, 0.3)}
    given = support(d, count, vocab) if d.chance(0.2) else None
    parts = chunks(d) if given is None else {}
    entropy = d.chance(0.5)

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        kept = within(given, (count, vocab))
        rows = HeadBounds(hidden, weight, bias, kept=kept, **options)
        size = of_chunk(parts) if parts else None
        up = upstream or (torch.zeros(count),)
        found = logprobs_bounds(rows, judged(y.long(), kept), up, tokens=size, words=64)
        wanted = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        return [b for b, e in zip(found, (True, entropy, *wanted), strict=True) if e]

    arguments = {"hidden": hidden, "weight": weight, "labels": y, "bias": bias, **options}
    arguments |= {"entropy": entropy, "support": given, **parts}
    return Case("linear_token_logprobs", arguments, d, bounds)


def linear_kl_divergence(d: Draw) -> Case:
    count, dtype = d.size(200), d.dtype()
    vocab = d.size(30_000 // max(1, count), 1)
    hidden, weight, bias = leaves(d, head(d, count, dtype, vocab))
    ref = head(d, count, dtype, vocab)
    mask = d.mask((count,)) if d.chance(0.6) else None
    options = {"temperature": d.pick(1.0, 0.7), "logit_scale": d.pick(1.0, 0.5)}
    parts, reverse = chunks(d), d.chance(0.5)

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        p, q = (HeadBounds(*operands, **options) for operands in ((hidden, weight, bias), ref))
        keep = torch.ones(count) if mask is None else mask != 0
        up = (upstream[0] if upstream else torch.zeros(count)) * keep
        found = p.products(p.kl_gradient(q, reverse, up), tokens=of_chunk(parts), words=64)
        given = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        return [p.kl(q, reverse, (count,)) * keep,
                *(b for b, e in zip(found, given, strict=True) if e)]  # fmt: skip

    direction = "reverse" if reverse else "forward"
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "ref_hidden": ref[0],
                 "ref_weight": ref[1], "ref_bias": ref[2], "mask": mask, **options, **parts,
                 "direction": direction}  # fmt: skip
    return Case("linear_kl_divergence", arguments, d, bounds)


def policy_config_of(d: Draw, smooth: bool = False) -> rk.PolicyLossConfig:
    """Any combination that a configuration allows; `smooth`: without clips and clamps."""
    objective = d.pick("reinforce", "sapo", *(() if smooth else ("clip", "clip", "cispo")))
    options: dict[str, Any] = {"objective": objective, "kl_coef": d.pick(0.0, 0.1)}
    if objective == "clip" and d.chance(0.5):
        options |= {"dual_clip": d.pick(None, 1.9), "delta": d.pick(None, 2.5)}
    if objective != "reinforce":
        options["ratio_level"] = d.pick("token", *policy.RATIO_LEVELS)
    if d.chance(0.4):
        mode = "truncate" if smooth else d.pick(*policy.CORRECTION_MODES)
        options |= {"correction_level": d.pick(*policy.CORRECTION_LEVELS),
                    "correction_mode": mode, "correction_max": 50.0 if smooth else 1.3}  # fmt: skip
    if not smooth and d.chance(0.3):
        options |= {"log_ratio_clamp": (-0.9, 1.1), "kl_input_clamp": 0.6, "kl_value_clamp": 0.5}
    estimators = ("k2", "k3") if smooth else policy.KL_ESTIMATORS
    aggregation = d.pick(*policy.AGGREGATIONS)
    return rk.PolicyLossConfig(
        **options,
        kl_estimator=d.pick(*estimators),
        kl_importance_weighted=d.chance(0.3),
        entropy_coef=d.pick(0.0, 0.02),
        aggregation=aggregation,
        normalizer=7.5 if aggregation == "constant" else d.pick(None, None, 11.0),
    )


def per_token(d: Draw, shape: Sequence[int], sequences: int, packed: bool) -> Tensor:
    """Advantages per token or per sequence."""
    whole = d.chance(0.3) and (not packed or sequences != shape[0])
    a = d.normal(sequences) if whole else d.normal(*shape)
    zero = torch.rand(a.shape, generator=d.torch) < d.pick(0.0, 0.3)
    return d.laid_out(a.masked_fill(zero, 0))


def linear_policy_loss(d: Draw) -> Case:
    rows, cols = d.random.randint(0, 3), d.random.randint(0, 7)
    dtype, vocab = d.dtype(), d.size(200, 1)
    hidden, weight, bias = head(d, rows * cols, dtype, vocab)
    hidden = hidden.reshape(rows, cols, hidden.shape[-1])
    mask = d.mask((rows, cols))
    y = d.integers(0, vocab, rows, cols)
    y = torch.where(mask == 0, d.pick(-7, vocab + 5, -100), y).to(y.dtype)
    start = reference.linear_token_logprobs(
        hidden, weight, y.long().masked_fill(mask == 0, -100), bias=bias
    )[0]
    config = policy_config_of(d, smooth=dtype != torch.float32)
    old = start + 0.3 * d.normal(rows, cols)
    constants = {"ref_logprobs": start + 0.3 * d.normal(rows, cols),
                 "rollout_logprobs": old + 0.2 * d.normal(rows, cols)}  # fmt: skip
    tokens = (y.long(), old, per_token(d, (rows, cols), rows, False), mask)
    hidden, weight, bias = leaves(d, (hidden, weight, bias))
    parts = chunks(d)

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        found = policy_bounds(
            HeadBounds(hidden, weight, bias), tokens, constants, config=config,
            upstream=float(upstream[0]) if upstream else 1.0, tokens_of_chunk=of_chunk(parts),
            words_of_block=64,
        )  # fmt: skip
        given = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        return [*found[:2], *(b for b, e in zip(found[2:], given, strict=True) if e)]

    arguments = {"hidden": hidden, "weight": weight, "labels": y, "old_logprobs": old,
                 "advantages": tokens[2], "mask": mask, "bias": bias, **constants, **parts,
                 "config": config}  # fmt: skip
    return Case("linear_policy_loss", arguments, d, bounds)


def policy_loss(d: Draw) -> Case:
    shape, offsets, sequences = d.tokens()
    mask = d.mask(shape)
    base = -3 * torch.rand(shape, generator=d.torch)

    def near(scale: float) -> Tensor:
        return d.hidden(d.laid_out((base + d.normal(*shape) * scale).to(d.dtype())), mask)

    arguments = {"logprobs": d.wanted(near(0.3)), "old_logprobs": near(0.2),
                 "advantages": per_token(d, shape, sequences, offsets is not None), "mask": mask,
                 "ref_logprobs": near(0.3), "rollout_logprobs": near(0.3),
                 "entropy": d.wanted(d.hidden(d.floats(*shape), mask)), "cu_seqlens": offsets,
                 "normalizer": d.pick(None, None, 3.5, torch.tensor(9.0)),
                 "config": policy_config_of(d)}  # fmt: skip
    return Case("policy_loss", arguments, d)


def value_loss(d: Draw) -> Case:
    shape, offsets, _ = d.tokens()
    mask, aggregation = d.mask(shape), d.pick(*policy.AGGREGATIONS)
    given = {n: d.hidden(d.floats(*shape), mask) for n in ("values", "old_values", "returns")}
    normalizer = 7.5 if aggregation == "constant" else d.pick(None, 3.5, torch.tensor(9.0))
    d.wanted(given["values"])
    arguments = {**given, "mask": mask, "clip_range": d.pick(None, 0.2, 2.0),
                 "aggregation": aggregation, "cu_seqlens": offsets,
                 "normalizer": normalizer}  # fmt: skip
    return Case("value_loss", arguments, d)


def kl_penalty(d: Draw) -> Case:
    shape = d.tokens()[0]
    x = d.floats(*shape, scale=d.pick(1.0, 30.0))
    estimator = d.pick(*policy.KL_ESTIMATORS)
    return Case("kl_penalty", {"logprobs": d.wanted(x), "ref_logprobs": d.floats(*shape),
                               "estimator": estimator}, d)  # fmt: skip


def _steps(d: Draw, names: Sequence[str]) -> tuple[dict[str, Any], int]:
    shape, offsets, sequences = d.tokens()
    mask = d.mask(shape) if d.chance(0.7) else None
    scale = d.pick(1.0, 1.0, 1e3)
    given = {n: d.hidden(d.floats(*shape, scale=scale), mask) for n in names}
    options = {"mask": mask, "cu_seqlens": offsets, "masked": d.pick("carry", "zero")}
    return given | options, sequences


def _ends(d: Draw, shape: Sequence[int], sequences: int) -> dict[str, Any]:
    dones = d.mask(shape, 0.05) if d.chance(0.4) else None
    bootstrap = d.floats(sequences) if d.chance(0.4) else None
    return {"dones": dones, "bootstrap_values": bootstrap, "gamma": d.pick(0.0, 0.9, 0.99, 1.0)}


def gae(d: Draw) -> Case:
    arguments, sequences = _steps(d, ("rewards", "values"))
    arguments |= _ends(d, arguments["rewards"].shape, sequences)
    arguments |= {"lam": d.pick(0.0, 0.5, 0.95, 1.0), "whiten": d.chance(0.3)}
    return Case("gae", arguments, d, beside=(1, "values"))


def discounted_returns(d: Draw) -> Case:
    arguments, sequences = _steps(d, ("rewards",))
    return Case(
        "discounted_returns", arguments | _ends(d, arguments["rewards"].shape, sequences), d
    )


def ppo_advantages(d: Draw) -> Case:
    arguments, sequences = _steps(d, ("logprobs", "ref_logprobs", "values"))
    arguments |= {"scores": d.floats(sequences), "kl_coef": d.pick(0.0, 0.05),
                  "kl_estimator": d.pick("k1", "k2", "abs"), "gamma": d.pick(0.0, 0.99, 1.0),
                  "lam": d.pick(0.0, 0.95, 1.0), "whiten": d.chance(0.5),
                  "reward_clip": d.pick(None, 0.7)}  # fmt: skip
    return Case("ppo_advantages", arguments, d, beside=(1, "values"))


def group_advantages(d: Draw) -> Case:
    size, groups = d.random.randint(1, 9), d.size(200)
    count = size * groups
    rewards = d.floats(count, scale=d.pick(1.0, 100.0)) if d.chance(0.7) else (
        d.laid_out(d.integers(0, 2, count).float()))  # fmt: skip
    baseline = d.pick("mean", "leave-one-out", "greedy", "none")
    ids = size if d.chance(0.5) else d.integers(-3, max(groups, 1), count)
    greedy = d.floats(count) if baseline == "greedy" else None
    arguments = {"rewards": rewards, "groups": ids, "baseline": baseline,
                 "scale": d.pick("group", "batch", "none"), "greedy_rewards": greedy,
                 "eps": d.pick(1e-6, 1e-4)}  # fmt: skip
    return Case("group_advantages", arguments, d)


def whiten(d: Draw) -> Case:
    shape = d.tokens()[0]
    mask = d.mask(shape) if d.chance(0.7) else None
    x = d.hidden(d.laid_out(d.normal(*shape) + d.pick(0.0, 1e3)), mask)
    arguments = {"x": x, "mask": mask, "shift_mean": d.chance(0.5), "unbiased": d.chance(0.5)}
    return Case("whiten", arguments, d)


def sequence_logprobs(d: Draw) -> Case:
    shape, offsets, _ = d.tokens()
    mask = d.mask(shape)
    arguments = {"logprobs": d.wanted(d.hidden(d.floats(*shape), mask)), "mask": mask,
                 "cu_seqlens": offsets, "average": d.chance(0.5)}  # fmt: skip
    return Case("sequence_logprobs", arguments, d)


def dpo_loss(d: Draw) -> Case:
    count, scale, kind = d.size(300), d.pick(1.0, 30.0), d.pick("sigmoid", "ipo", "hinge", "robust")
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    given = {n: d.floats(count, scale=scale) for n in names}
    for name in names[:2]:
        d.wanted(given[name])
    smoothing = d.pick(0.0, 0.1) if kind in ("sigmoid", "robust") else 0.0
    arguments = {**given, "beta": d.pick(0.1, 1.0), "loss_type": kind, "label_smoothing": smoothing}
    return Case("dpo_loss", arguments, d)


def reward_model_loss(d: Draw) -> Case:
    count = d.size(300)
    given = {n: d.wanted(d.floats(count)) for n in ("chosen_rewards", "rejected_rewards")}
    margin = d.pick(None, 0.5, d.floats(count))
    return Case(
        "reward_model_loss", {**given, "margin": margin, "center_coef": d.pick(0.0, 0.01)}, d
    )


CASES = (
    *(token_logprobs, token_logprobs, kl_divergence, linear_token_logprobs, linear_token_logprobs),
    *(linear_kl_divergence, linear_policy_loss, policy_loss, policy_loss, value_loss, kl_penalty),
    *(gae, gae, discounted_returns, ppo_advantages, group_advantages, whiten, sequence_logprobs),
    *(dpo_loss, reward_model_loss),
)


def make(seed: int, interpreted: bool) -> Case:
    """The case of a seed; small where the kernels are interpreted."""
    d = Draw(seed, interpreted)
    return d.pick(*CASES)(d)


def run(case: Case, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(results followed by gradients, upstream gradients)"""
    results = list(_examples.tensors(getattr(rk, case.op)(**arguments)))
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    outputs = [r for r in results if r.requires_grad]
    if not tensors or not outputs:
        return [r.detach() for r in results], []
    g = torch.Generator().manual_seed(1)
    upstream = []
    for i, o in enumerate(outputs):
        up = torch.randn(o.shape, generator=g)
        up = up.masked_fill(torch.rand(o.shape, generator=g) < 0.2, 0) if o.dim() else up
        # As of a sum: one number for all.
        up = torch.tensor(0.7).expand(o.shape) if i % 2 == 0 and case.draw.expanded_upstream else up
        upstream.append(up.to(o.dtype))
    found = torch.autograd.grad(outputs, tensors, upstream, materialize_grads=True)
    return [*(r.detach() for r in results), *found], upstream


def sensitivity(case: Case, exact: Sequence[Tensor]) -> list[Tensor]:
    """How far each result moves, at most, in several draws that move every input by a rounding."""
    g = torch.Generator().manual_seed(2)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        t = value.detach().double()
        t = t * (1 + EPS * torch.randn(t.shape, generator=g, dtype=torch.float64))
        return t.requires_grad_(value.requires_grad)

    worst = [torch.zeros_like(e) for e in exact]
    for _ in range(8):
        found, _ = run(case, {k: moved(v) for k, v in case.arguments.items()})
        worst = [
            torch.maximum(w, (f - e).abs().nan_to_num(0.0, 0.0, 0.0))
            for w, f, e in zip(worst, found, exact, strict=True)
        ]
    if case.beside is not None:
        i, name = case.beside
        size = case.arguments[name].detach().double().abs() + exact[i].abs()
        worst[i] = worst[i] + 2 * EPS * size.nan_to_num(0.0, 0.0, 0.0)
    return [ROUNDINGS * (w + EPS * e.abs().nan_to_num(0.0, 0.0, 0.0)) + 1e-37
            for w, e in zip(worst, exact, strict=True)]  # fmt: skip


def check(case: Case, backend: str) -> None:
    """Raises AssertionError where a backend's results are beyond their bounds."""
    before = {k: v.detach().clone() for k, v in case.arguments.items() if isinstance(v, Tensor)}
    with rk.use_backend(backend):
        actual, _ = run(case, case.arguments)
    with rk.use_backend("reference"):
        # It takes all logits at once.
        whole = {k: v for k, v in case.arguments.items() if k not in ("chunk_tokens", INVARIANT)}
        exact, upstream = run(case, to_float64(whole))
    with rk.use_backend(backend), torch.no_grad() if case.bounds else torch.enable_grad():
        if case.bounds is None:
            with rk.use_backend("reference"):
                bounds = sensitivity(case, exact)
        else:
            bounds = case.bounds(exact, upstream)
    if len(actual) != len(exact) or len(actual) != len(bounds):
        raise AssertionError(f"{len(actual)} results, {len(exact)} exact, {len(bounds)} bounds")
    for i, (a, e, bound) in enumerate(zip(actual, exact, bounds, strict=True)):
        # What float32 cannot hold is infinite.
        most, rounding = torch.finfo(a.dtype).max, torch.finfo(a.dtype).eps
        e = torch.where(e.abs() > most, e.sign() * torch.inf, e)
        if case.bounds is None:
            # The budget of `rlhf_kernels.testing`: twice one rounding.
            bound = bound + 1.5 * rounding * e.abs().nan_to_num(0.0, 0.0, 0.0)
        try:
            assert_within_bound(a, e, bound.reshape(e.shape))
        except AssertionError as error:
            raise AssertionError(f"result {i}: {error}") from None
    for name, value in before.items():
        now = case.arguments[name].detach()
        if not torch.equal(now.nan_to_num(7.0), value.nan_to_num(7.0)):
            raise AssertionError(f"{name} was changed")
