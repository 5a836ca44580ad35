"""Random calls of losses and of other operations on tokens and pairs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases.fuzz.draw import Case, Draw
from tests.head.bounds import EPS

import rlhf_kernels as rk
from rlhf_kernels.config import enums, preference
from rlhf_kernels.config.mismatch import CRITERIA


def policy_config_of(d: Draw, smooth: bool = False) -> rk.PolicyLossConfig:
    """A random valid configuration; with `smooth` it has no clips and clamps."""
    objective = d.pick("reinforce", "sapo", *(() if smooth else ("clip", "clip", "cispo")))
    options: dict[str, Any] = {"objective": objective, "kl_coef": d.pick(0.0, 0.1)}
    if objective == "clip" and d.chance(0.5):
        options |= {"dual_clip": d.pick(None, 1.9), "delta": d.pick(None, 2.5)}
    if objective != "reinforce":
        options["ratio_level"] = d.pick("token", "sequence", "sequence-token")
    if objective == "clip" and d.chance(0.2):
        options = {k: v for k, v in options.items() if k not in ("dual_clip", "delta")}
        options["ratio_level"] = "clipped-sequence"
    if d.chance(0.4):
        mode = "truncate" if smooth else d.pick(*enums.CORRECTION_MODES)
        options |= {"correction_level": d.pick(*enums.CORRECTION_LEVELS),
                    "correction_mode": mode, "correction_max": 50.0 if smooth else 1.3}  # fmt: skip
    if not smooth and d.chance(0.3):
        options |= {"log_ratio_clamp": (-0.9, 1.1), "kl_input_clamp": 0.6, "kl_value_clamp": 0.5}
    if not smooth and d.chance(0.3):
        gate = d.pick(*enums.GATES)
        low, high = {"ratio": (0.83, 1.19), "opsm": (0.0317, None)}.get(gate, (0.0317, 0.0271))
        options |= {"gate": gate, "gate_low": low if gate == "opsm" else d.pick(None, low),
                    "gate_high": high, "gate_against": d.pick(*enums.GATE_ANCHORS),
                    "gate_two_sided": gate in ("tv", "binary_kl") and d.chance(0.3)}  # fmt: skip
    options["kl_weight"] = d.pick(None, None, None, *enums.KL_WEIGHTS)
    if not smooth and options["kl_weight"] in ("ratio", "detached-ratio"):
        options["kl_weight_max"] = d.pick(None, 1.17)
    estimators = ("k2", "k3") if smooth else enums.KL_ESTIMATORS
    aggregation = d.pick(*enums.AGGREGATIONS)
    return rk.PolicyLossConfig(
        **options,
        kl_estimator=d.pick(*estimators),
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


def weights_of(d: Draw, shape: Sequence[int], sequences: int, packed: bool) -> Tensor | None:
    """Weights per token or per sequence, or None."""
    return per_token(d, shape, sequences, packed).abs() if d.chance(0.4) else None


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
                 "weights": weights_of(d, shape, sequences, offsets is not None),
                 "normalizer": d.pick(None, None, 3.5, torch.tensor(9.0)),
                 "config": policy_config_of(d)}  # fmt: skip
    return Case("policy_loss", arguments, d)


def value_loss(d: Draw) -> Case:
    shape, offsets, _ = d.tokens()
    mask, aggregation = d.mask(shape), d.pick(*enums.AGGREGATIONS)
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
    estimator = d.pick(*enums.KL_ESTIMATORS)
    return Case("kl_penalty", {"logprobs": d.wanted(x), "ref_logprobs": d.floats(*shape),
                               "estimator": estimator}, d)  # fmt: skip


def mismatch_weights(d: Draw) -> Case:
    shape, offsets, _ = d.tokens()
    mask, spread = d.mask(shape), d.pick(0.003, 0.1, 1.0)
    base = -3 * torch.rand(shape, generator=d.torch)
    # Options that decide compare logarithms with numbers that are no 16-bit float's.
    dtype = d.dtype()
    old, rollout = (
        (base + d.normal(*shape) * spread).to(dtype if d.chance(0.7) else d.dtype())
        for _ in range(2)
    )
    missing = d.pick("raise", *enums.MISSING)
    if missing != "raise":
        rollout[torch.rand(shape, generator=d.torch) < 0.05] = torch.nan
    near = 1 + 1.37 * spread
    reject = {}
    for name in d.random.sample(CRITERIA, d.pick(0, 0, 1, 2)):
        bound = d.pick(near, (None, near), (1 / near**2, near))
        # Divergences, and the largest of a sequence, have one bound.
        bound = near if name.startswith("seq_max") else bound
        reject[name] = 0.73 * spread**2 if name.endswith(("k2", "k3")) else bound
    level = d.pick(*enums.MISMATCH_CODES)
    arguments = {"old_logprobs": d.hidden(d.laid_out(old), mask),
                 "rollout_logprobs": d.hidden(d.laid_out(rollout), mask),
                 "mask": mask, "cu_seqlens": offsets, "level": level,
                 "mode": d.pick(*enums.CORRECTION_MODES), "reject": reject or None,
                 "veto": d.pick(None, None, 0.5 / near), "normalize": d.chance(0.3),
                 "missing": missing, "log_ratio_clamp": d.pick(None, None, 20.0, 0.61)}  # fmt: skip
    if level is not None:
        arguments |= {"low": d.pick(None, 0.97 / near), "high": d.pick(None, 0.98 * near)}
    return Case("mismatch_weights", arguments, d)


def topk_divergence(d: Draw) -> Case:
    shape, k = (d.size(40),), d.size(20, 1)
    # Of one token more than are given.
    own, ref = ((d.normal(*shape, k + 1) * 2).log_softmax(-1)[..., :k] for _ in range(2))
    mask = d.mask(shape) if d.chance(0.5) else None
    arguments = {"logprobs": d.wanted(own), "ref_logprobs": ref, "mask": mask}
    arguments["direction"] = d.pick("forward", "reverse", "jsd")

    def bounds(exact: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        logp, logq = own.detach().double(), ref.double()
        of_p, of_q = (1 - x.exp().sum(-1) for x in (logp, logq))
        size = 1 + logp.abs().amax(-1) + logq.abs().amax(-1)
        # The rest is a difference, rounded as 1 is.
        rounded = 1 / of_p + 1 / of_q
        found = [24 * EPS * (size + (of_p + of_q) * rounded)]
        if upstream:
            ratio = (of_p / of_q).log().abs() + of_q / of_p + 1
            slopes = torch.maximum(logp.exp(), logq.exp()) * size.unsqueeze(-1) ** 2
            slopes = slopes + logp.exp() * (rounded * ratio).unsqueeze(-1)
            found.append(24 * EPS * slopes * upstream[0].double().abs().unsqueeze(-1))
        return found

    return Case("topk_divergence", arguments, d, bounds)


def sequence_logprobs(d: Draw) -> Case:
    shape, offsets, _ = d.tokens()
    mask = d.mask(shape)
    arguments = {"logprobs": d.wanted(d.hidden(d.floats(*shape), mask)), "mask": mask,
                 "cu_seqlens": offsets, "average": d.chance(0.5)}  # fmt: skip
    return Case("sequence_logprobs", arguments, d)


def preference_loss(d: Draw) -> Case:
    count, scale, kind = d.size(300), d.pick(1.0, 30.0), d.pick(*enums.PREFERENCE_LOSSES)
    names = ["chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs"]
    if kind in preference.REFERENCE_FREE:
        names = names[:2]
    # ORPO takes means below 0. They stay away from 0, where rounding decides the result.
    made = {n: d.floats(count, scale=scale) for n in names}
    given = {n: (-x.abs() - 0.5 if kind == "orpo" else x) for n, x in made.items()}
    for name in names[:2]:
        d.wanted(given[name])
    smoothing = d.pick(0.1, 0.2 if kind == "exo_pair" else 0.0)
    difference = kind in preference.OF_DIFFERENCES and scale == 1.0
    divergence = d.pick("reverse_kl", "js_divergence", "forward_kl") if difference else "reverse_kl"
    lengths = kind == "sft" or d.chance(0.5)
    arguments = {**given, "beta": d.pick(0.1, 1.0), "loss": kind, "f_divergence": divergence,
                 "label_smoothing": smoothing if kind in preference.SMOOTHED else 0.0,
                 "weights": d.pick(None, d.floats(count).abs())
                 if kind not in preference.SORTED else None,
                 "chosen_lengths": d.integers(1, 9, count) if lengths else None,
                 "rejected_lengths": d.integers(1, 9, count) if lengths else None}  # fmt: skip
    return Case("preference_loss", arguments, d)


def kto_loss(d: Draw) -> Case:
    count, scale = d.size(300), d.pick(1.0, 30.0)
    arguments = {"logprobs": d.wanted(d.floats(count, scale=scale)),
                 "ref_logprobs": d.floats(count, scale=scale),
                 "desirable": d.integers(0, 2, count), "beta": d.pick(0.1, 1.0),
                 "kl": d.pick(0.0, -0.5, 0.7, torch.tensor(0.3)),
                 "desirable_weight": d.pick(1.0, 1.5)}  # fmt: skip
    return Case("kto_loss", arguments, d)


def reward_model_loss(d: Draw) -> Case:
    count = d.size(300)
    given = {n: d.wanted(d.floats(count)) for n in ("chosen_rewards", "rejected_rewards")}
    margin = d.pick(None, 0.5, d.floats(count))
    return Case(
        "reward_model_loss", {**given, "margin": margin, "center_coef": d.pick(0.0, 0.01)}, d
    )
