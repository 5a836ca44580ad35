"""Random calls of operations on logits, with the bounds of their softmaxes and products."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases.fuzz.draw import INVARIANT, Case, Draw
from tests.cases.fuzz.tokens import per_token, policy_config_of, weights_of
from tests.head.bounds import EPS, HeadBounds, SoftmaxBounds, policy_bounds
from tests.ops.support_cases import within

from rlhf_kernels import reference


def temperature(d: Draw, shape: Sequence[int]) -> float | Tensor:
    if d.chance(0.3):
        values = torch.rand(tuple(shape), generator=d.torch) * 2 + 0.3
        return d.laid_out(values.to(d.dtype()))
    return d.pick(1.0, 0.7, 1.3, 0.05, 20.0)


def logits(d: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    values = d.normal(*shape) * d.pick(1.0, 3.0, 30.0) + d.pick(0.0, 0.0, 100.0, -1e4)
    values = values.to(dtype)
    if values.numel() and d.chance(0.3):
        # Column 0 stays, because a row of -inf alone is not a distribution.
        taken_out = torch.rand(values.shape, generator=d.torch) < 0.2
        taken_out[..., 0] = False
        values[taken_out] = -torch.inf
    return values


def with_faults(d: Draw, values: Tensor) -> Tensor:
    """Makes one logit NaN, infinite or the largest number of its dtype."""
    if values.numel():
        at = d.random.randrange(values.numel())
        values.view(-1)[at] = d.pick(torch.nan, torch.inf, torch.finfo(values.dtype).max)
    return values


def labels(d: Draw, shape: Sequence[int], vocab: int, ignored: int = -100) -> Tensor:
    found = d.integers(0, vocab, *shape)
    skipped = torch.rand(tuple(shape), generator=d.torch) < d.pick(0.0, 0.3, 1.1)
    return torch.where(skipped, ignored, found).to(found.dtype)


def several_labels(d: Draw, shape: Sequence[int], vocab: int, ignored: int = -100) -> Tensor:
    """As `labels`, or some for each token, of which some come twice."""
    count = d.pick(0, 0, 0, 1, 2, 5)
    if count == 0:
        return labels(d, shape, vocab, ignored)
    found = labels(d, (*shape, count), vocab, ignored)
    return torch.cat([found, found[..., :1]], -1) if d.chance(0.3) else found


def row_options(d: Draw, shape: Sequence[int]) -> dict[str, Any]:
    return {"temperature": temperature(d, shape), "softcap": d.pick(None, None, 5.0, 30.0)}


def support(d: Draw, count: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Random vocabulary entries for each token, sometimes none or all."""
    kept = torch.rand(count, vocab, generator=d.torch) < d.pick(0.05, 0.5, 1.1)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    words = [row.nonzero().flatten() for row in kept]
    words = [w[torch.randperm(len(w), generator=d.torch)] for w in words]
    words = torch.cat([*words, torch.zeros(0, dtype=torch.int64)])
    dtype = d.pick(torch.int32, torch.int64)
    return d.laid_out(indptr.to(dtype)), d.laid_out(words.to(dtype))


def judged(labels: Tensor, kept: Tensor | None) -> Tensor:
    """Labels, with -1 for tokens that keep no vocabulary entry: NaN, with a gradient of 0."""
    return labels if kept is None else labels.where(kept.any(-1).view(labels.shape), -1)


#: Results beside the log-probabilities, in the order in which they are returned.
FURTHER = ("entropy", "collision", "lse", "argmax")


def further(d: Draw, given: tuple[Tensor, Tensor] | None) -> dict[str, bool]:
    """Which of the FURTHER results are asked for; with a support only the entropy may be."""
    usual = d.chance(0.5) or given is not None
    return {n: d.chance(0.5) and (n == "entropy" or not usual) for n in FURTHER}


def row_bounds(
    rows: SoftmaxBounds, known: Tensor, several: bool, asked: dict[str, bool]
) -> list[Tensor]:
    """Of the log-probabilities and what is asked for beside them; 0 for ignored tokens."""
    own = known.amax(-1) if several else known
    if several:
        of_labels = torch.stack([rows.logprobs(k) for k in known.unbind(-1)], -1)
    else:
        of_labels = rows.logprobs(known)
    of_labels = torch.where(known >= 0, of_labels, 0)
    found = {"entropy": rows.entropy(own.shape), "collision": rows.collision(own.shape),
             "lse": rows.lse(own.shape), "argmax": torch.zeros(own.shape)}  # fmt: skip
    return [of_labels, *(torch.where(own >= 0, b, 0) for n, b in found.items() if asked[n])]


def token_gradient(
    rows: SoftmaxBounds, known: Tensor, several: bool, g: Tensor, **others: Tensor
) -> tuple[Tensor, Tensor]:
    """That of the rows; of several labels per token the sum of theirs."""
    if not several:
        return rows.token_gradient(known, g, **others)
    own = known.amax(-1)
    found, bound = rows.token_gradient(own, torch.zeros(own.shape), **others)
    for label, upstream in zip(known.unbind(-1), g.unbind(-1), strict=True):
        more, of_more = rows.token_gradient(label, upstream)
        found, bound = found + more, bound + of_more
    return found, bound


def tokens_apart(rows: SoftmaxBounds, best: Tensor) -> Tensor:
    """How far from the most likely token there are tokens that rounding may put first."""
    x, error = rows.x, rows.x_error
    near = x + error >= (x - error).amax(-1, keepdim=True)
    ids = torch.arange(x.shape[-1])
    apart = torch.where(near, (ids - best.reshape(-1, 1)).abs(), 0).amax(-1)
    return torch.where(best.reshape(-1) >= 0, apart, 0).view(best.shape)


def upstreams(given: Sequence[Tensor], asked: dict[str, bool]) -> dict[str, Tensor]:
    """The upstream gradients by the names of `SoftmaxBounds.token_gradient`."""
    names = {"entropy": "h", "collision": "of_collision", "lse": "of_lse"}
    found = ["g", *(name for result, name in names.items() if asked[result])]
    return dict(zip(found, given, strict=True))


def token_logprobs(d: Draw) -> Case:
    shape = (d.size(40),) if d.chance(0.6) else (d.size(5), d.size(9))
    vocab = d.size(300_000 // max(1, torch.Size(shape).numel()), 1)
    x, faulty = logits(d, *shape, vocab, dtype=d.dtype()), d.chance(0.1)
    # A row that is not a distribution has a result, but no meaningful gradient.
    x = d.laid_out(with_faults(d, x)) if faulty else d.wanted(d.laid_out(x))
    ignored = d.pick(-100, -1, vocab + 3)
    y = several_labels(d, shape, vocab, ignored)
    several = y.dim() == x.dim()
    options = row_options(d, shape)
    given = support(d, y.numel(), vocab) if not several and d.chance(0.2) else None

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        z = x.detach().double().reshape(-1, vocab)
        kept = within(given, z.shape)
        rows = SoftmaxBounds(z, torch.zeros_like(z), x.dtype, kept=kept, **options)
        known = judged(torch.where(y == ignored, -1, y.long()), kept)
        found = row_bounds(rows, known, several, asked)
        if upstream:
            found.append(token_gradient(rows, known, several, **upstreams(upstream, asked))[1])
        return found

    asked = further(d, given)
    arguments = {"logits": x, "labels": y, **options, **asked}
    arguments |= {"ignore_index": ignored, "support": given}
    return Case("token_logprobs", arguments, d, bounds)


def _options_of_two(d: Draw) -> dict[str, Any]:
    """Options of a divergence, those of each model on their own."""
    found: dict[str, Any] = {"direction": d.pick("jsd", "jsd", "reverse", "forward")}
    found |= {"temperature": d.pick(1.0, 0.7, 2.0), "softcap": d.pick(None, None, 5.0, 30.0)}
    if found["direction"] == "jsd":
        found["beta"] = d.pick(None, 0.1, 0.9, 0.0, 1.0)
    for name, *choices in (("ref_temperature", 0.8, 1.5), ("ref_softcap", None, 8.0)):
        if d.chance(0.4):
            found[name] = d.pick(*choices)
    return found | {"entropy": d.chance(0.5)}


def _divergence_of_two(d: Draw) -> Case:
    """kl_divergence with options of each model, a mixture, and the entropy."""
    shape, dtype = (d.size(40),), d.dtype()
    vocab = d.size(100_000 // max(1, shape[0]), 1)
    scale, options = d.pick(1.0, 3.0, 10.0), _options_of_two(d)
    x, r = (d.floats(*shape, vocab, scale=scale, dtype=dtype) for _ in range(2))
    caps = options["softcap"], options.get("ref_softcap", options["softcap"])
    rates = options["temperature"], options.get("ref_temperature", options["temperature"])

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        z, w = (
            (t.detach().double() if c is None else c * torch.tanh(t.detach().double() / c)) / rate
            for t, c, rate in zip((x, r), caps, rates, strict=True)
        )
        logp, logq = z.log_softmax(-1), w.log_softmax(-1)
        # What the terms of the sums are differences of.
        size = torch.maximum(z.abs().amax(-1), w.abs().amax(-1)) + math.log(vocab + 1)
        of_rows = 24 * EPS * size
        found = [of_rows] * (1 + options["entropy"])
        if upstream:
            # A difference of exponents, each with its own rounding, times what it multiplies.
            amplitude = (1 + logp.abs() + logq.abs() + size.unsqueeze(-1)) / rates[0]
            amplitude *= 1 + (logp - logq).abs() + exact[0].unsqueeze(-1)
            mass = torch.maximum(logp.exp(), logq.exp())
            rounded = torch.finfo(dtype).eps * exact[-1].abs()
            slopes = mass * upstream[0].double().abs().unsqueeze(-1) * amplitude
            found.append(24 * EPS * slopes + rounded)
        return found

    arguments = {"logits": d.wanted(x), "ref_logits": r, **options}
    return Case("kl_divergence", arguments, d, bounds)


def kl_divergence(d: Draw) -> Case:
    if d.chance(0.5):
        return _divergence_of_two(d)
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
    y = several_labels(d, (count,), vocab)
    several = y.dim() > 1
    options = row_options(d, (count,)) | {"logit_scale": d.pick(1.0, 1.0, 0.3)}
    given = support(d, count, vocab) if not several and d.chance(0.2) else None
    parts = chunks(d) if given is None else {}
    asked = further(d, given)

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        kept = within(given, (count, vocab))
        rows = HeadBounds(hidden, weight, bias, kept=kept, **options)
        known = judged(y.long(), kept)
        found = row_bounds(rows, known, several, asked)
        if asked["argmax"]:
            found[-1] = tokens_apart(rows, exact[len(found) - 1])
        if not upstream:
            return found
        gradient = token_gradient(rows, known, several, **upstreams(upstream, asked))
        size = of_chunk(parts) if parts else None
        products = rows.products(gradient, tokens=size, words=64)
        leaves = zip((hidden, weight, bias), products, strict=True)
        return found + [b for t, b in leaves if t is not None and t.requires_grad]

    arguments = {"hidden": hidden, "weight": weight, "labels": y, "bias": bias, **options}
    arguments |= {**asked, "support": given, **parts}
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
    weights = weights_of(d, (rows, cols), rows, False)
    constants |= {} if weights is None else {"weights": weights}
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
