"""Random calls of the advantages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases.fuzz.draw import Case, Draw

from rlhf_kernels.config import enums


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


def _cuts(d: Draw, shape: Sequence[int], sequences: int, mask: Tensor | None) -> dict[str, Any]:
    """Episodes that terminate or are truncated inside of a row."""
    truncated = d.mask(shape, 0.05) if d.chance(0.6) else None
    per_step = truncated is not None or d.chance(0.5)
    values = d.hidden(d.floats(*shape), mask) if per_step else d.floats(sequences)
    return {"terminated": d.mask(shape, 0.05) if d.chance(0.5) else None,
            "truncated": truncated, "bootstrap_values": values}  # fmt: skip


def _rate(d: Draw, shape: Sequence[int], sequences: int, *numbers: float) -> float | Tensor:
    """A number, or a tensor of rates of sequences or steps."""
    of = d.pick(None, (sequences,), tuple(shape))
    return d.pick(*numbers) if of is None else d.laid_out(
        torch.rand(of, generator=d.torch).to(d.dtype()))  # fmt: skip


def _rates(d: Draw, shape: Sequence[int], sequences: int) -> dict[str, Any]:
    numbers = (0.0, 0.5, 0.95, 1.0)
    return {"gamma": _rate(d, shape, sequences, 0.0, 0.99, 1.0),
            "lam": _rate(d, shape, sequences, *numbers),
            "value_lam": _rate(d, shape, sequences, None, *numbers)}  # fmt: skip


def _general(d: Draw, given: dict[str, Any], like: str, sequences: int) -> dict[str, Any]:
    """Options of the general scan, or none of them."""
    if d.chance(0.5):
        return {}
    shape = given[like].shape
    cuts = _cuts(d, shape, sequences, given["mask"]) if d.chance(0.6) else {}
    return cuts | _rates(d, shape, sequences)


def gae(d: Draw) -> Case:
    arguments, sequences = _steps(d, ("rewards", "values"))
    general = _general(d, arguments, "rewards", sequences)
    if "terminated" not in general:
        arguments |= _ends(d, arguments["rewards"].shape, sequences)
    arguments |= {"lam": d.pick(0.0, 0.5, 0.95, 1.0), "whiten": d.chance(0.3), **general}
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
    arguments |= _general(d, arguments, "logprobs", sequences)
    return Case("ppo_advantages", arguments, d, beside=(1, "values"))


def _groups(d: Draw, count: int, size: int) -> int | Tensor:
    """The size of equal groups, or ids of others."""
    return size if d.chance(0.5) else d.integers(-3, max(count // size, 1), count)


def group_advantages(d: Draw) -> Case:
    size, groups = d.random.randint(1, 9), d.size(200)
    count, parts = size * groups, d.pick(None, None, None, 3)
    shape = (count,) if parts is None else (count, parts)
    rewards = d.floats(*shape, scale=d.pick(1.0, 100.0)) if d.chance(0.7) else (
        d.laid_out(d.integers(0, 2, *shape).float()))  # fmt: skip
    baseline = d.pick(*enums.BASELINES, *enums.PLAIN_BASELINES)
    greedy = d.floats(count) if baseline == "greedy" else None
    lengths = d.integers(1, 50, count) if baseline == "length-mean" else None
    arguments = {"rewards": rewards, "groups": _groups(d, count, size), "baseline": baseline,
                 "scale": d.pick(*enums.SCALES, *enums.PLAIN_SCALES), "greedy_rewards": greedy,
                 "lengths": lengths, "tau": d.pick(1.0, 0.3),
                 "eps": d.pick(1e-6, 1e-4)}  # fmt: skip
    if parts is not None:
        arguments["component_weights"] = d.pick(None, d.floats(parts))
    return Case("group_advantages", arguments, d)


def optimal_token_baseline(d: Draw) -> Case:
    shape, offsets, sequences = d.tokens()
    mask = d.mask(shape)
    given = {"rewards": d.floats(*shape), "logprobs": -d.floats(*shape).abs(),
             "collision": d.floats(*shape).abs().clamp(max=1.0),
             "importance_weights": d.pick(None, d.floats(*shape).abs())}  # fmt: skip
    given = {k: None if t is None else d.hidden(d.laid_out(t), mask) for k, t in given.items()}
    size = d.pick(*(s for s in (1, 2, 3, 4) if sequences % s == 0))
    arguments = {**given, "groups": _groups(d, sequences, size), "mask": mask,
                 "cu_seqlens": offsets, "zero_tail": d.chance(0.5), "eps": 1e-3}  # fmt: skip
    return Case("optimal_token_baseline", arguments, d)


def whiten(d: Draw) -> Case:
    shape = d.tokens()[0]
    mask = d.mask(shape) if d.chance(0.7) else None
    x = d.hidden(d.laid_out(d.normal(*shape) + d.pick(0.0, 1e3)), mask)
    arguments = {"x": x, "mask": mask, "shift_mean": d.chance(0.5), "unbiased": d.chance(0.5)}
    return Case("whiten", arguments, d)
