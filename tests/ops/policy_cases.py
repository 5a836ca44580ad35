"""Configurations and inputs of policy_loss, and how its results are judged."""

import dataclasses
import itertools

import torch

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import enums
from rlhf_kernels.core.sequences import token_weights
from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import (
    assert_within_budget,
    generator,
    random_mask,
    to_float64,
)

Config = rk.PolicyLossConfig


# Options beside the grid's, every term on and every bound within reach of the inputs below.
EVERYTHING = {
    "kl_coef": 0.3,
    "entropy_coef": 0.05,
    "log_ratio_clamp": (-0.9, 1.1),
    "kl_input_clamp": 0.6,
    "kl_value_clamp": 0.5,
}


OF_OBJECTIVE = {
    "clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.9, "delta": 1.7},
    "penalty": {"penalty_coef": 0.4},
    "reinforce": {},
    "cispo": {"clip_low": 0.3, "clip_high": 0.4},
    "sapo": {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.5},
}


CORRECTIONS = (
    {},
    {"correction_level": "token", "correction_max": 1.1},
    {"correction_level": "token", "correction_mode": "mask", "correction_min": 0.9},
    {"correction_level": "sequence", "correction_min": 0.5, "correction_max": 1.5},
    {"correction_level": "sequence", "correction_mode": "mask", "correction_max": 2.0},
)


BASES = [
    {"objective": o, "ratio_level": level} | OF_OBJECTIVE[o]
    for o, level in itertools.product(OF_OBJECTIVE, enums.RATIO_LEVELS)
    if (o != "reinforce" or level == "token") and level != "clipped-sequence"
]
# Only the objective "clip" has it.
BASES.append({"ratio_level": "clipped-sequence", "objective": "clip", "clip_low": 0.2,
              "clip_high": 0.28})  # fmt: skip


def make_config(base, aggregation, correction, estimator, weighted):
    return Config(
        **EVERYTHING,
        **base,
        **correction,
        aggregation=aggregation,
        kl_estimator=estimator,
        kl_weight="ratio" if weighted else None,
        normalizer=7.5 if aggregation == "constant" else None,
    )


# Those with kernels of their own.
KERNELS = ("cpu", "triton")


def grid(objective):
    """Objective x level x aggregation x correction, estimators cycling; then all estimators."""
    bases = [b for b in BASES if b["objective"] == objective]
    estimators = itertools.cycle(enums.KL_ESTIMATORS)
    weighted = itertools.cycle((False, True, True))
    for base, *rest in itertools.product(bases, enums.AGGREGATIONS, CORRECTIONS):
        yield make_config(base, *rest, next(estimators), next(weighted))
    for base, estimator in itertools.product(bases, enums.KL_ESTIMATORS):
        yield make_config(base, "token-mean", CORRECTIONS[1], estimator, True)


def make_inputs(rows=5, cols=37, dtype=torch.float32, *, seed=0, keep=0.7):
    """Positional arguments and keyword arguments of policy_loss; gradients wanted."""
    g = generator(seed)

    def noise(scale):
        return scale * torch.randn(rows, cols, generator=g)

    old = -3 * torch.rand(rows, cols, generator=g)
    # Whole sequences drift too, so that sequence ratios meet their bounds.
    drift = torch.linspace(-0.9, 0.9, rows).unsqueeze(-1) if rows > 1 else 0.1
    logprobs = (old + drift + noise(0.4)).to(dtype).requires_grad_()
    entropy = torch.rand(rows, cols, generator=g).to(dtype).requires_grad_()
    args = (logprobs, old.to(dtype), noise(1.0).to(dtype), random_mask(rows, cols, keep=keep))
    options = {
        "ref_logprobs": (old + noise(0.4)).to(dtype),
        "rollout_logprobs": (old + noise(0.2)).to(dtype),
        "entropy": entropy,
    }
    return args, options


def run(function, args, options, **more):
    """(loss, metrics, gradient of logprobs, gradient of entropy)."""
    loss, metrics = function(*args[:3], mask=args[3], **options, **more)
    wanted = (args[0], options["entropy"])
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    metrics = metrics if isinstance(metrics, torch.Tensor) else metrics.tensor
    return loss.detach(), metrics, *gradients


def portion(backend, cases, part, parts):
    """All cases. In Triton's interpreter, which is slow, a part: the parts together are all."""
    if backend == "triton" and triton.interpreted():
        return list(cases)[part % parts :: parts]
    return cases


def check(args, options, config):
    actual = run(rk.policy_loss, args, options, config=config)
    plain = run(reference.policy_loss, args, options, config=config)
    wide = to_float64(args), to_float64(options)
    oracle = run(reference.policy_loss, *wide, config=config)
    # The terms that the gradient is a sum of: objective, penalty, KL, and the slope of its weight.
    parts = [
        run(reference.policy_loss, *wide, config=dataclasses.replace(config, **off))[2]
        for off in (
            {"kl_weight": None, "kl_weight_max": None},
            {"kl_coef": 0.0},
            {"kl_coef": 0.0, "penalty_coef": 0.0},
        )
    ]
    scale = (oracle[2] - parts[0]).abs() + (oracle[2] - parts[1]).abs()
    scale = scale + (parts[1] - parts[2]).abs() + parts[2].abs()
    if config.ratio_level == "sequence":
        # A sum over the sequence, whose terms may cancel.
        scale = torch.where(args[3], scale.amax(-1, keepdim=True) + scale.amax(), 0)
    weights = token_weights(args[3], config.aggregation, config.normalizer, torch.float64, None)
    mass = float(torch.where(args[3], weights, 0).sum())
    assert_within_budget(actual[0], oracle[0], plain[0], scale=mass)
    # Products of some ten roundings, in any of which torch may be lucky.
    assert_within_budget(actual[1], oracle[1], plain[1], scale=max(1.0, mass), factor=4.0)
    assert_within_budget(actual[2], oracle[2], plain[2], scale=scale, factor=4.0)
    assert_within_budget(actual[3], oracle[3], plain[3])
    return oracle
