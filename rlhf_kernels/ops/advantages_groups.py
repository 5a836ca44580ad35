"""Advantages of whole answers relative to their group, and the optimal token baseline.

Nothing here is differentiable: advantages and returns are constants of the loss.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config.enums import (
    BASELINES,
    PLAIN_BASELINES,
    PLAIN_SCALES,
    SCALES,
    Baseline,
    PlainBaseline,
    PlainScale,
    Scale,
)
from ..core import checks, data_checks, option_checks
from ..core.layout import constant
from ..core.option_checks import shown
from ..kernels import backends
from ._operator import define
from .advantages import Advantages


@define("group_advantages")
def _group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    greedy_rewards: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.float32)


def _of_sequences(op: str, name: str, t: object) -> Tensor:
    """Checked rewards of whole sequences; integers become float64, the dtype of the statistics."""
    if isinstance(t, Tensor) and t.dtype is not torch.bool and not t.is_floating_point():
        checks.integers(op, name, t)
        return t.double()
    return constant(checks.real(op, name, t))


def _check_groups(
    op: str, groups: object, like: str, count: int, device: torch.device
) -> int | Tensor:
    """Checked groups of `count` sequences: a size that divides it, or an id for each."""
    if isinstance(groups, Tensor) and groups.dim() > 0:
        checks.integers(op, "groups", groups)
        checks.same_shape(op, "groups", groups, like, torch.Size((count,)))
        checks.same_device(op, "groups", groups, like, device)
        return groups
    size = option_checks.integer(op, "groups", groups, low=1, what=" or an integer tensor [B]")
    if count % size:
        raise ValueError(
            f"{op}: groups must divide the number of {like}, {shown(count)}, got {shown(size)}"
        )
    return size


def _check_belongs(op: str, name: str, value: object, baseline: str, wanted: str) -> None:
    """Requires a tensor with the baseline `wanted` and with no other."""
    if (value is None) == (baseline == wanted):
        raise ValueError(
            f"{op}: {name} belong to baseline {wanted!r}; got baseline {baseline!r} "
            f"{'without' if value is None else 'with'} {name}"
        )


def _sum_of_components(
    rewards: Tensor, weights: Tensor | None, groups: int | Tensor, **options: Any
) -> Tensor:
    """The weighted sum of `group_advantages` of each column of rewards [B, K]."""
    total = rewards.new_zeros(rewards.shape[0], dtype=torch.float64)
    for k in range(rewards.shape[1]):
        own = group_advantages(rewards[:, k], groups, **options).double()
        total = total + (own if weights is None else own * weights[k].double())
    return total.float()


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    baseline: Baseline | PlainBaseline = "mean",
    scale: Scale | PlainScale = "group",
    greedy_rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    component_weights: Tensor | None = None,
    tau: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Rewards of whole sequences relative to the other answers to the same prompt.

    GRPO (2402.03300): "mean", "group". Dr.GRPO (2503.20783): "mean", "none". RLOO (2402.14740):
    "leave-one-out", "none"; NeMo-RL's GRPO: "leave-one-out", "leave-one-out". REINFORCE++
    (2501.03262): "none" or "mean", "batch". ReMax (2310.10505): "greedy", "none". OPO (2505.23585):
    "length-mean", "none". MaxRL: "mean", "mean". Pass@k (2503.19595): "pass@k", "group" or "none".
    OPMD (Trinity): "log-mean-exp", "none". OpenRLHF's flash_reinforce: "batch-mean", "none".
    GDPO (2601.05242), TRL's normalize_then_sum: rewards [B, K], then
    `group_advantages(x, groups, baseline="none", scale="batch")` of the result.

    Statistics are fp64 and relative to a group's first reward, so a large common offset costs no
    precision while rewards are exact in fp64 (integers to 2^53). "length-mean", "log-mean-exp",
    "pass@k" and "batch-mean", and the scales "leave-one-out" and "mean", are plain torch on every
    backend.

    Args:
        rewards: [B], floating, integer or bool; or [B, K], K rewards of each sequence. Each column
            then has baseline and scale by itself, and the result is their weighted sum.
        groups: size of consecutive groups, which divides B; or an integer tensor [B] with the group
            id of each sequence, where groups may differ in size and be in any order.
        baseline: value to subtract: "mean" of the group, mean of the others in the group
            ("leave-one-out"), `greedy_rewards` ("greedy"), mean of the group weighted by `lengths`
            ("length-mean"), tau log mean exp(r / tau) over the group ("log-mean-exp"), mean of the
            batch ("batch-mean"), or "none". "pass@k": the best reward of a group keeps what it
            exceeds the second best by; all others are 0.
        scale: "group" divides by the std of the group's rewards + eps. "leave-one-out" divides by
            the std of the others in the group + eps, but not at all where that std is 0. "mean"
            divides by the mean of the group + eps and gives 0 where that mean is not above 0.
            "batch" subtracts the batch mean after the baseline, then divides by the batch std +
            eps. "none" does not divide. Standard deviations are unbiased.
        greedy_rewards: [B], the reward of the greedy answer to each sequence's prompt.
        lengths: [B], the number of tokens of each sequence, >= 0; not all 0 in a group.
        component_weights: [K], weights of the columns of rewards [B, K]; 1 if None.
        tau: temperature of "log-mean-exp", > 0.
        eps: added to the standard deviation or mean, >= 0. TRL's is 1e-4, verl's 1e-6, OpenRLHF's
            1e-9.

    Returns:
        Advantages [B], float32, detached. Exactly 0 where the standard deviation to divide by is 0
        (equal rewards, groups of one), but for "leave-one-out"; with scale "none" the baselines of
        a group but "greedy" also give exactly 0 there. A NaN or infinite reward makes only its own
        group NaN; with "batch" and "batch-mean" the whole batch; with "none" or "greedy" and scale
        "none" only itself, and it stays infinite.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; an unknown option; a group size that does
            not divide B; greedy_rewards, lengths or component_weights without what they belong to,
            or vice versa; a length below 0, on CPU.
    """
    op = "group_advantages"
    rewards = _of_sequences(op, "rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"{op}: rewards must be [B] or [B, K], got {shown(rewards.shape)}")
    option_checks.one_of(op, "baseline", baseline, BASELINES + PLAIN_BASELINES)
    option_checks.one_of(op, "scale", scale, SCALES + PLAIN_SCALES)
    tau = option_checks.positive(op, "tau", tau)
    eps = option_checks.non_negative(op, "eps", eps)
    sequences = rewards.shape[:1]
    groups = _check_groups(op, groups, "rewards", sequences[0], rewards.device)
    _check_belongs(op, "greedy_rewards", greedy_rewards, baseline, "greedy")
    _check_belongs(op, "lengths", lengths, baseline, "length-mean")
    if greedy_rewards is not None:
        greedy_rewards = _of_sequences(op, "greedy_rewards", greedy_rewards)
        checks.same_shape(op, "greedy_rewards", greedy_rewards, "rewards", sequences)
        checks.same_device(op, "greedy_rewards", greedy_rewards, "rewards", rewards.device)
    if lengths is not None:
        lengths = _of_sequences(op, "lengths", lengths)
        checks.same_shape(op, "lengths", lengths, "rewards", sequences)
        checks.same_device(op, "lengths", lengths, "rewards", rewards.device)
        if data_checks.can_read_on_host(lengths) and not (lengths >= 0).all():
            raise ValueError(f"{op}: lengths must be >= 0")
    if component_weights is not None:
        component_weights = constant(checks.real(op, "component_weights", component_weights))
        if rewards.dim() != 2 or component_weights.shape != rewards.shape[1:]:
            raise ValueError(
                f"{op}: component_weights must be [K] for rewards [B, K], got "
                f"{shown(component_weights.shape)} for {shown(rewards.shape)}"
            )
        checks.same_device(op, "component_weights", component_weights, "rewards", rewards.device)
    backend = backends.select(op, rewards.device)
    if rewards.dim() == 2:
        options: dict[str, Any] = {"baseline": baseline, "scale": scale, "tau": tau, "eps": eps}
        options |= {"greedy_rewards": greedy_rewards, "lengths": lengths}
        return _sum_of_components(rewards, component_weights, groups, **options)
    plain = baseline in PLAIN_BASELINES or scale in PLAIN_SCALES
    if plain or backend == backends.REFERENCE:
        return reference.group_advantages(
            rewards,
            groups,
            baseline=baseline,
            scale=scale,
            greedy_rewards=greedy_rewards,
            lengths=lengths,
            tau=tau,
            eps=eps,
        ).float()
    ids, size = (groups, 0) if isinstance(groups, Tensor) else (None, groups)
    return _group_advantages(rewards, ids, size, baseline, scale, greedy_rewards, eps, backend)


def optimal_token_baseline(
    rewards: Tensor,
    logprobs: Tensor,
    collision: Tensor,
    groups: int | Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    zero_tail: bool = True,
    eps: float = 1e-8,
) -> Advantages:
    """Returns to go minus the baseline of least variance for each token (verl's OTB, TIR-OTB).

    With w_t = (1 - 2 p_t + sum_v p_v^2) rho_t^2, the squared norm of the gradient of the logits,
    W_t = w_1 + ... + w_t and G_t = r_t + r_{t+1} + ..., the baseline is
    sum G_t W_t / (sum W_t + eps), over the sequences of a group that have a t-th token. Tokens are
    counted by their place among the kept ones: turns of a tool that are masked leave no gap
    (TIR-OTB; without gaps that is OTB). fp64, plain torch on every backend.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; the reward at each token.
        logprobs: the shape of rewards; log p_t of the sampled tokens.
        collision: the shape of rewards; sum over the vocabulary of p_v^2.
        groups: as in `group_advantages`, for B or packed S sequences.
        mask: the shape of rewards; as in `gae`.
        importance_weights: the shape of rewards; rho_t of a rollout correction, >= 0. 1 if None.
        cu_seqlens: as in `gae`.
        zero_tail: baseline 0 where a token has no counterpart in its group, so that the end of a
            group's longest answer is not compared with itself. False: only for a group of one.
        eps: added to the sum of W_t, >= 0.

    Returns:
        Advantages(advantages, returns), float32 in the shape of rewards, detached; exactly 0 at
        masked positions, whatever the inputs hold there.

    Raises:
        TypeError, ValueError: as in `gae` and `group_advantages`.
    """
    op = "optimal_token_baseline"
    rewards = checks.real(op, "rewards", rewards)
    tokens = {"rewards": rewards, "logprobs": logprobs, "collision": collision}
    if importance_weights is not None:
        tokens["importance_weights"] = importance_weights
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    mask = checks.token_inputs(op, tokens, mask, cu_seqlens)
    zero_tail = option_checks.flag(op, "zero_tail", zero_tail)
    eps = option_checks.non_negative(op, "eps", eps)
    offsets, good = data_checks.usable_offsets(op, cu_seqlens, rewards.shape[0])
    count = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    groups = _check_groups(op, groups, "sequences", count, rewards.device)
    advantages, returns = reference.optimal_token_baseline(
        constant(rewards),
        constant(logprobs),
        constant(collision),
        groups,
        mask,
        importance_weights=constant(importance_weights),
        cu_seqlens=offsets,
        zero_tail=zero_tail,
        eps=eps,
    )
    if good is not None:
        advantages, returns = (torch.where(good, x, torch.nan) for x in (advantages, returns))
    return Advantages(advantages.float(), returns.float())
