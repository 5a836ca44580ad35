"""Random calls of the operations and their checks, for `tools/fuzz.py`.

A case is made from its seed alone. Each element is compared with the reference in float64. With a
softmax or a product inside, its bound is that of `tests/head/bounds.py`; else it is the change of
the exact result when every input changes by a rounding, which is the error of the best algorithm.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases.fuzz.advantages import (
    discounted_returns,
    gae,
    group_advantages,
    optimal_token_baseline,
    ppo_advantages,
    whiten,
)
from tests.cases.fuzz.draw import INVARIANT, Case, Draw
from tests.cases.fuzz.rows import (
    kl_divergence,
    linear_kl_divergence,
    linear_policy_loss,
    linear_token_logprobs,
    token_logprobs,
)
from tests.cases.fuzz.tokens import (
    kl_penalty,
    kto_loss,
    mismatch_weights,
    policy_loss,
    preference_loss,
    reward_model_loss,
    sequence_logprobs,
    topk_divergence,
    value_loss,
)

import rlhf_kernels as rk
from rlhf_kernels.config.metrics import MISMATCH_METRICS
from rlhf_kernels.ops._calls import tensors
from rlhf_kernels.testing import assert_within_bound, to_float64

EPS = torch.finfo(torch.float32).eps
# Roundings of a result beside those of its inputs; a term of SAPO has a dozen, its sum some more.
ROUNDINGS, SAPO_ROUNDINGS = 8.0, 16.0
# Not moved: they are exact in float32, and one of 1 has no larger neighbour.
RATES = ("gamma", "lam", "value_lam")
# Steps below the normal numbers of float32 may flush to zero.
FLUSHED = 1e-37

CASES = (
    *(token_logprobs, token_logprobs, kl_divergence, linear_token_logprobs, linear_token_logprobs),
    *(kl_divergence, linear_kl_divergence, linear_policy_loss, policy_loss, policy_loss),
    *(value_loss, kl_penalty, topk_divergence),
    *(gae, gae, discounted_returns, ppo_advantages, group_advantages, whiten, sequence_logprobs),
    *(preference_loss, kto_loss, reward_model_loss, mismatch_weights, optimal_token_baseline),
)


def make(seed: int, interpreted: bool) -> Case:
    """The case of a seed; it is small if the kernels are interpreted."""
    d = Draw(seed, interpreted)
    return d.pick(*CASES)(d)


def run(case: Case, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(results followed by gradients, upstream gradients)"""
    results = list(tensors(getattr(rk, case.op)(**arguments), integers=True))
    results = [r if r.is_floating_point() else r.float() for r in results]
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    outputs = [r for r in results if r.requires_grad]
    if not leaves or not outputs:
        return [r.detach() for r in results], []
    g = torch.Generator().manual_seed(1)
    upstream = []
    for i, o in enumerate(outputs):
        up = torch.randn(o.shape, generator=g)
        up = up.masked_fill(torch.rand(o.shape, generator=g) < 0.2, 0) if o.dim() else up
        # The upstream gradient of a sum is one number, expanded.
        up = torch.tensor(0.7).expand(o.shape) if i % 2 == 0 and case.draw.expanded_upstream else up
        upstream.append(up.to(o.dtype))
    found = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    return [*(r.detach() for r in results), *found], upstream


def cancelling_slopes(arguments: dict[str, Any]) -> Tensor:
    """Magnitudes of the slopes of apo_down, whose sigmoids may cancel; for an upstream below 1."""
    given = to_float64(arguments)
    chosen = given["beta"] * (given["chosen_logprobs"] - given["ref_chosen_logprobs"]).detach()
    rejected = given["beta"] * (given["rejected_logprobs"] - given["ref_rejected_logprobs"])
    sizes = sum(z.sigmoid() * (-z).sigmoid() for z in (chosen, chosen - rejected.detach()))
    weights = 1.0 if given["weights"] is None else given["weights"].abs()
    return given["beta"] * sizes * weights / max(len(chosen), 1)


def scan_roundings(case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """Magnitudes beyond inputs and results that a scan of advantages and returns rounds to fp32.

    Triton rounds every step, even if values cancel: the scan of |reward| + gamma |next value| +
    |value|. The other backends step in float64. Whitening rounds the advantages before it.
    """
    given = {k: v for k, v in to_float64(case.arguments).items() if k != "whiten"}
    values = given["values"].abs()
    plain = getattr(rk, case.op)(**given)
    names = ("mask", "dones", "terminated", "truncated", "cu_seqlens", "masked", "gamma")
    options = {k: given[k] for k in (*names, "bootstrap_values") if k in given}
    if options.get("bootstrap_values") is not None:
        options["bootstrap_values"] = options["bootstrap_values"].abs()
    sizes = of_returns = torch.zeros_like(values)
    if backend == "triton":
        rewards = plain.rewards if case.op == "ppo_advantages" else given["rewards"]
        next_values = rk.gae(sizes, values, lam=0.0, **options).advantages + values
        steps = rewards.abs() + next_values + values
        none = torch.zeros_like(values)
        if options.get("bootstrap_values") is not None:
            options["bootstrap_values"] = torch.zeros_like(options["bootstrap_values"])
        lams = {k: given[k] for k in ("lam", "value_lam") if k in given}
        found = rk.gae(steps, none, **lams, **options)
        sizes, of_returns = found.advantages, found.returns
    if not case.arguments["whiten"]:
        return sizes, of_returns
    kept = slice(None) if given["mask"] is None else given["mask"] != 0
    before = sizes + plain.advantages.abs()
    if plain.advantages[kept].numel() < 2:
        return sizes, of_returns
    # The errors of mean and deviation add to that of the token itself.
    most = before.nan_to_num(0.0, 0.0, 0.0).max() if before.numel() else 0.0
    return (before + most) / plain.advantages[kept].std(), of_returns


def sensitivity(case: Case, exact: Sequence[Tensor], backend: str) -> list[Tensor]:
    """The largest change of each result in several draws that change every input by a rounding."""
    g = torch.Generator().manual_seed(2)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        t = value.detach().double()
        t = t * (1 + EPS * torch.randn(t.shape, generator=g, dtype=torch.float64))
        return t.requires_grad_(value.requires_grad)

    worst = [torch.zeros_like(e) for e in exact]
    for _ in range(8):
        found, _ = run(case, {k: v if k in RATES else moved(v) for k, v in case.arguments.items()})
        worst = [
            torch.maximum(w, (f - e).abs().nan_to_num(0.0, 0.0, 0.0))
            for w, f, e in zip(worst, found, exact, strict=True)
        ]
    if case.beside is not None:
        i, name = case.beside
        size = case.arguments[name].detach().double().abs() + exact[i].abs()
        worst[i] = worst[i] + 2 * EPS * size.nan_to_num(0.0, 0.0, 0.0)
    if case.op == "value_loss":
        # The explained variance is 1 minus a number, whose own size bounds the rounding.
        worst[1][4] += EPS * (1 + (1 - exact[1][4]).abs().nan_to_num(0.0, 0.0, 0.0)) / ROUNDINGS
    if case.op == "preference_loss" and "apo_down" in case.arguments["loss"]:
        sizes = cancelling_slopes(case.arguments)
        for i in range(3, len(worst)):
            worst[i] = worst[i] + EPS * sizes
    if case.op == "mismatch_weights":
        for name in ("weight", "seq_weight"):
            mean, std = (MISMATCH_METRICS.index(f"{name}_{of}") for of in ("mean", "std"))
            off, deviation = exact[2][mean] - 1, exact[2][std]
            size = torch.hypot(off, deviation).nan_to_num(0.0, 0.0, 0.0)
            worst[2][std] += EPS / ROUNDINGS * size
            if name == "weight" and case.arguments["level"] == "token":
                # The root of a difference of squares of distances from 1, sums in float32.
                moved_root = torch.hypot(deviation, (2 * EPS) ** 0.5 * size) - deviation
                worst[2][std] += moved_root.nan_to_num(0.0, 0.0, 0.0) / ROUNDINGS
    config = case.arguments.get("config")
    if (
        case.op == "policy_loss"
        and config.kl_weight in ("ratio", "one")
        and config.kl_estimator == "abs+"
    ):
        # |x| by the ratio's slope and x by the estimator's cancel below 0, whatever the inputs.
        # With k1+ they add there: what that changes is the sum of their sizes.
        given = to_float64(case.arguments)
        if given["logprobs"].requires_grad:
            added, none = (
                run(case, given | {"config": dataclasses.replace(config, **change)})[0][2]
                for change in ({"kl_estimator": "k1+"}, {"kl_coef": 0.0})
            )
            size = (added - none).abs().nan_to_num(0.0, 0.0, 0.0)
            worst[2] += EPS / ROUNDINGS * size
    if "lam" in case.arguments:
        for i, size in enumerate(scan_roundings(case, backend)):
            worst[i] = worst[i] + EPS / ROUNDINGS * size.nan_to_num(0.0, 0.0, 0.0)
    sapo = getattr(case.arguments.get("config"), "objective", "") == "sapo"
    roundings = SAPO_ROUNDINGS if sapo else ROUNDINGS
    return [
        roundings * (w + EPS * e.abs().nan_to_num(0.0, 0.0, 0.0))
        for w, e in zip(worst, exact, strict=True)
    ]


def check(case: Case, backend: str) -> None:
    """Raises AssertionError if results of a backend are out of bounds."""
    before = {k: v.detach().clone() for k, v in case.arguments.items() if isinstance(v, Tensor)}
    with rk.use_backend(backend):
        actual, _ = run(case, case.arguments)
    with rk.use_backend("reference"):
        # The reference computes all logits at once.
        whole = {k: v for k, v in case.arguments.items() if k not in ("chunk_tokens", INVARIANT)}
        exact, upstream = run(case, to_float64(whole))
    with rk.use_backend(backend), torch.no_grad() if case.bounds else torch.enable_grad():
        if case.bounds is None:
            with rk.use_backend("reference"):
                bounds = sensitivity(case, exact, backend)
        else:
            bounds = case.bounds(exact, upstream)
    if case.arguments.get("estimator") == "k3" and len(exact) > 1:
        # If float32 cannot hold the value, its slope is infinite too, for any upstream.
        held = (exact[0].abs() <= torch.finfo(torch.float32).max) | (exact[1] == 0)
        exact[1] = torch.where(held, exact[1], exact[1] * torch.inf)
    if len(actual) != len(exact) or len(actual) != len(bounds):
        raise AssertionError(f"{len(actual)} results, {len(exact)} exact, {len(bounds)} bounds")
    for i, (a, e, bound) in enumerate(zip(actual, exact, bounds, strict=True)):
        # Values that float32 cannot hold are infinite.
        most, rounding = torch.finfo(a.dtype).max, torch.finfo(a.dtype).eps
        e = torch.where(e.abs() > most, e.sign() * torch.inf, e)
        if case.bounds is None:
            # The budget of `rlhf_kernels.testing` is twice one rounding.
            bound = bound + 1.5 * rounding * e.abs().nan_to_num(0.0, 0.0, 0.0)
        try:
            assert_within_bound(a, e, bound.reshape(e.shape) + FLUSHED)
        except AssertionError as error:
            raise AssertionError(f"result {i}: {error}") from None
    for name, value in before.items():
        now = case.arguments[name].detach()
        if not torch.equal(now.nan_to_num(7.0), value.nan_to_num(7.0)):
            raise AssertionError(f"{name} was changed")
