"""Advantages: GAE, discounted returns, PPO's shaped rewards and whitening.

Nothing here is differentiable: advantages and returns are constants of the loss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config.enums import (
    MASKED_STEPS,
    PLAIN_KL_ESTIMATORS,
    MaskedSteps,
    PlainKlEstimator,
)
from ..core import checks, option_checks
from ..core.layout import constant, constants
from ..core.option_checks import shown
from ..kernels import backends
from . import advantages_general as general
from ._operator import Operator, define


def _fp32(like: Tensor) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)


_gae: Operator[tuple[Tensor, Tensor]] = define(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? dones, "
    "Tensor? bootstrap_values, float gamma, float lam, str masked, bool whiten, str backend) "
    "-> (Tensor, Tensor)",
    lambda rewards, *_: (_fp32(rewards), _fp32(rewards)),
)
_discounted_returns: Operator[Tensor] = define(
    "discounted_returns",
    "(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? dones, Tensor? bootstrap_values, "
    "float gamma, str masked, str backend) -> Tensor",
    lambda rewards, *_: _fp32(rewards),
)
_ppo_advantages: Operator[tuple[Tensor, Tensor, Tensor]] = define(
    "ppo_advantages",
    "(Tensor scores, Tensor logprobs, Tensor? ref_logprobs, Tensor values, Tensor? mask, "
    "Tensor? cu_seqlens, float kl_coef, str kl_estimator, float gamma, float lam, str masked, "
    "bool whiten, float? reward_clip, str backend) -> (Tensor, Tensor, Tensor)",
    lambda scores, logprobs, *_: (_fp32(logprobs), _fp32(logprobs), _fp32(logprobs)),
)
_whiten: Operator[Tensor] = define(
    "whiten",
    "(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps, str backend) -> Tensor",
    lambda x, *_: _fp32(x),
)


class Advantages(NamedTuple):
    """Result of `gae`."""

    advantages: Tensor
    returns: Tensor


class PPOAdvantages(NamedTuple):
    """Result of `ppo_advantages`."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor


def _check_tokens(
    op: str,
    tokens: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The values of tokens and masks, checked; integer rewards become float32."""
    like, first = next(iter(tokens.items()))
    found: list[Tensor | None] = []
    for name, t in tokens.items():
        if name == "rewards":
            t = checks.real(op, name, t)
        elif t is not None or name != "ref_logprobs":
            checks.floating(op, name, t, double=True)
        found.append(t)
    assert first is not None  # the loop has raised otherwise
    if first.dim() != (2 if cu_seqlens is None else 1):
        expected = "[B, T]" if cu_seqlens is None else "[N], packed as cu_seqlens says,"
        raise ValueError(f"{op}: {like} must be {expected}, got {shown(first.shape)}")
    for name, t in masks.items():
        found.append(None if t is None else checks.mask(op, name, t))
    for name, t in (*tokens.items(), *masks.items()):
        if t is not None and t is not first:
            checks.same_shape(op, name, t, like, first.shape)
            checks.same_device(op, name, t, like, first.device)
    return tuple(found)


def _check_scan(
    op: str,
    kinds: str,
    tokens: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    sequences: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    masked: str,
) -> tuple[Any, ...]:
    """Checks the arguments common to the scans; the first of `tokens` sets shape and device.

    `kinds`: of tokens and masks, as `checks.plain` takes them.

    Returns:
        The values of tokens, masks and sequences in one flat list, as kernels take them.
        Integer rewards, scores and bootstrap values become float32. Before them, whether none of
        the tensors can be float64, which the reference accepts but kernels do not.
    """
    found: tuple[Tensor | None, ...] = (*tokens.values(), *masks.values())
    first: Any = found[0]
    plain = checks.plain(kinds, *found)
    if not plain or cu_seqlens is not None or first.dim() != 2:
        found = _check_tokens(op, tokens, masks, cu_seqlens)
    if cu_seqlens is not None:
        checks.offsets(op, cu_seqlens)
        checks.same_device(op, "cu_seqlens", cu_seqlens, next(iter(tokens)), first.device)
    for name, t in sequences.items():
        if t is not None or name == "scores":
            t, plain = checks.real(op, name, t), False
            count = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if t.shape != (count,):
                raise ValueError(
                    f"{op}: {name} must have one entry per sequence, ({count},), "
                    f"got {shown(t.shape)}"
                )
            checks.same_device(op, name, t, next(iter(tokens)), first.device)
        found = (*found, t)
    option_checks.one_of(op, "masked", masked, MASKED_STEPS)
    return plain, *constants(*found)


def _check_shaping(
    op: str,
    whiten: bool,
    kl_coef: float,
    kl_estimator: PlainKlEstimator,
    reward_clip: float | None,
) -> tuple[bool, float, PlainKlEstimator, float | None]:
    """The checked options of the shaped rewards and of whitening, in this order."""
    whiten = option_checks.flag(op, "whiten", whiten)
    kl_coef = option_checks.number(op, "kl_coef", kl_coef)
    option_checks.one_of(op, "kl_estimator", kl_estimator, PLAIN_KL_ESTIMATORS)
    if reward_clip is not None:
        reward_clip = option_checks.positive(op, "reward_clip", reward_clip)
    return whiten, kl_coef, kl_estimator, reward_clip


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    masked: MaskedSteps = "carry",
    whiten: bool = False,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 1506.02438).

    delta_t = r_t + gamma_t V_{t+1} - V_t, A_t = delta_t + gamma_t lam_t A_{t+1}, returns = A + V.
    lam = 0 is TD(0), lam = 1 Monte Carlo. Results are detached: constants of the loss.

    At a terminated step V_{t+1} and A_{t+1} are 0. At a truncated step V_{t+1} is the bootstrap
    value and A_{t+1} is 0. A step that is both is terminated. This is what gymnasium's two flags
    mean, and what torchrl and Stable-Baselines3 compute from them.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16 or float16; integers and
            bools become float32.
        values: the shape of rewards; V_t, the value before step t.
        mask: the shape of rewards; bool or integer, nonzero = keep, or floating with only 0 and 1.
            None keeps everything.
        cu_seqlens: [S+1] int32 or int64; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
        dones: the shape and dtypes of mask; nonzero where the step ended its episode. No later
            value or advantage enters such a step. Another name of `terminated`; where a trainer's
            dones include truncated steps, pass terminated and truncated instead.
        terminated: the shape and dtypes of mask; nonzero where the episode ended in this step.
        truncated: the shape and dtypes of mask; nonzero where the episode was cut off after this
            step. Needs `bootstrap_values`.
        bootstrap_values: the value of the state that follows. [B], or [S] if packed: after the end
            of each sequence; of its steps, only the last kept one may then be truncated (checked
            on CPU; elsewhere an earlier one receives the same value). Or in the shape of rewards:
            read at truncated steps and at the last step of each sequence, and 0 where masked. 0 if
            None.
        gamma: discount, in [0, 1]: a number, or a tensor of floating or integer dtype. A tensor has
            one entry per sequence, [B] or packed [S], or one per step, in the shape of rewards.
            Packed with S = N it has one per sequence. Entries outside [0, 1] raise on CPU and give
            NaN elsewhere. As numbers, entries of fp32 tensors are those of fp32.
        lam: decay of the estimator, like gamma. VAPO's (2504.05118) has one entry per sequence.
        value_lam: the lam of the returns, like gamma; None for `lam`. Advantages keep `lam`
            (VC-PPO, 2503.01491, and VAPO: value_lam=1.0). Costs no second pass.
        masked: how masked steps count. "carry" (verl, NeMo-RL, AReaL): not at all; the steps before
            and after are neighbours. "zero" (OpenRLHF): as steps with reward 0 and value 0, which
            discount the advantage that passes through; their `dones`, `truncated` and rates apply,
            and `bootstrap_values` [B] follow the padding.
        whiten: give advantages zero mean and unit variance over the mask, as `whiten` does. verl's
            gae is whiten=True; OpenRLHF's is masked="zero", then whiten(unbiased=False, eps=0).

    Returns:
        Advantages(advantages, returns), float32 in the shape of rewards; exactly 0 at masked
        positions, whatever the inputs hold there.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; an unknown option; dones beside terminated
            or truncated; truncated without bootstrap_values; on CPU, cu_seqlens that do not start
            at 0, decrease, or do not end at N.
    """
    op = "gae"
    of_ends = "dones"
    usual = bootstrap_values is terminated is truncated is value_lam is None
    if not usual or type(gamma) is not float or type(lam) is not float:
        of_ends, dones = general.the_ends(op, dones, terminated, truncated)
        if general.needed(gamma, lam, value_lam, truncated, bootstrap_values, rewards, cu_seqlens):
            flags = {"mask": mask, of_ends: dones, "truncated": truncated}
            _, rewards, values, mask, dones, truncated = _check_scan(
                op, "ffMMM", {"rewards": rewards, "values": values}, flags, {}, cu_seqlens, masked
            )
            whiten = option_checks.flag(op, "whiten", whiten)
            advantages, returns, _ = general.scan(
                op, "rewards", rewards, values, mask, cu_seqlens, dones, truncated,
                bootstrap_values, gamma, lam, value_lam, masked, whiten,
            )  # fmt: skip
            return Advantages(advantages, returns)
    plain = checks.plain("ffMM", rewards, values, mask, dones) and rewards.dim() == 2
    if not plain or cu_seqlens is not None or bootstrap_values is not None:
        plain, rewards, values, mask, dones, bootstrap_values = _check_scan(
            op, "ffMM", {"rewards": rewards, "values": values}, {"mask": mask, of_ends: dones},
            {"bootstrap_values": bootstrap_values}, cu_seqlens, masked,
        )  # fmt: skip
    else:
        rewards, values = constant(rewards), constant(values)
        option_checks.one_of(op, "masked", masked, MASKED_STEPS)
    gamma = option_checks.rate(op, "gamma", gamma)
    lam = option_checks.rate(op, "lam", lam)
    whiten = option_checks.flag(op, "whiten", whiten)
    backend = backends.select(op, rewards.device)
    if backend == backends.REFERENCE:
        checks.offsets_valid(op, cu_seqlens, rewards.shape[0])
        return Advantages(
            *reference.gae(
                rewards,
                values,
                mask=mask,
                cu_seqlens=cu_seqlens,
                dones=dones,
                bootstrap_values=bootstrap_values,
                gamma=gamma,
                lam=lam,
                masked=masked,
                whiten=whiten,
            )
        )
    if not plain:
        checks.not_double(op, rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    return Advantages(
        *_gae(
            rewards, values, mask, cu_seqlens, dones, bootstrap_values,
            gamma, lam, masked, whiten, backend, plain=plain and cu_seqlens is None,
        )
    )  # fmt: skip


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    masked: MaskedSteps = "carry",
) -> Tensor:
    """Return to go, G_t = r_t + gamma G_{t+1} (REINFORCE, REINFORCE++).

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16 or float16; integers and
            bools become float32.
        mask: as in `gae`.
        cu_seqlens: as in `gae`.
        dones: as in `gae`.
        bootstrap_values: [B], or [S] if packed: return after the last step. 0 if None.
        gamma: discount, in [0, 1].
        masked: as in `gae`: "carry" skips masked steps, "zero" discounts through them.

    Returns:
        Returns, float32 in the shape of rewards, detached; exactly 0 at masked positions.

    Raises:
        TypeError, ValueError: as in `gae`.
    """
    op = "discounted_returns"
    plain, rewards, mask, dones, bootstrap_values = _check_scan(
        op, "fMM", {"rewards": rewards}, {"mask": mask, "dones": dones},
        {"bootstrap_values": bootstrap_values}, cu_seqlens, masked,
    )  # fmt: skip
    gamma = option_checks.rate(op, "gamma", gamma)
    backend = backends.select(op, rewards.device)
    if backend == backends.REFERENCE:
        checks.offsets_valid(op, cu_seqlens, rewards.shape[0])
        return reference.discounted_returns(
            rewards,
            mask=mask,
            cu_seqlens=cu_seqlens,
            dones=dones,
            bootstrap_values=bootstrap_values,
            gamma=gamma,
            masked=masked,
        )
    if not plain:
        checks.not_double(op, rewards=rewards, bootstrap_values=bootstrap_values)
    return _discounted_returns(
        rewards, mask, cu_seqlens, dones, bootstrap_values, gamma, masked, backend
    )


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float = 0.0,
    kl_estimator: PlainKlEstimator = "k1",
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    masked: MaskedSteps = "carry",
    whiten: bool = True,
    reward_clip: float | None = None,
) -> PPOAdvantages:
    """Shaped rewards (InstructGPT, 2203.02155), their GAE and its whitening, in one pass.

    r_t = -kl_coef * KL_t, plus the sequence's score at its last kept token. With
    x = logprob - ref_logprob, KL_t is x (k1), x^2 / 2 (k2), exp(-x) - 1 + x (k3) or |x| (abs).
    Results are detached: constants of the loss.

    Args:
        scores: [B], or [S] if packed: the reward of each sequence. Unused if no token is kept.
        logprobs: [B, T], or packed [N] with `cu_seqlens`: log-probabilities of the sampling policy.
        ref_logprobs: the shape of logprobs; None for no KL penalty.
        values: the shape of logprobs.
        mask: the shape of logprobs; as in `gae`.
        kl_coef: weight of the penalty, a finite number; with 0, `ref_logprobs` are not read.
        kl_estimator: "k1", "k2", "k3" or "abs".
        cu_seqlens: as in `gae`.
        terminated: as in `gae`.
        truncated: as in `gae`.
        bootstrap_values: as in `gae`, also without truncated steps.
        gamma: as in `gae`.
        lam: as in `gae`.
        value_lam: as in `gae`.
        masked: as in `gae`.
        whiten: as in `gae`.
        reward_clip: scores are clipped to [-reward_clip, reward_clip]; None for no clipping.

    Returns:
        PPOAdvantages(advantages, returns, rewards), float32 in the shape of logprobs; exactly 0 at
        masked positions. `rewards` are the shaped rewards, whose `gae` are the other two.

    Raises:
        TypeError, ValueError: as in `gae`.
    """
    op = "ppo_advantages"
    usual = bootstrap_values is terminated is truncated is value_lam is None
    if not usual or general.needed(gamma, lam, value_lam, truncated, None, None, None):
        tokens = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        flags = {"mask": mask, "terminated": terminated, "truncated": truncated}
        _, logprobs, ref_logprobs, values, mask, terminated, truncated, scores = _check_scan(
            op, "fFfMMM", tokens, flags, {"scores": scores}, cu_seqlens, masked
        )
        whiten, kl_coef, kl_estimator, reward_clip = _check_shaping(
            op, whiten, kl_coef, kl_estimator, reward_clip
        )
        return PPOAdvantages(
            *general.scan(
                op, "logprobs", logprobs, values, mask, cu_seqlens, terminated, truncated,
                bootstrap_values, gamma, lam, value_lam, masked, whiten,
                general.Shaping(scores, ref_logprobs, kl_coef, kl_estimator, reward_clip),
            )
        )  # fmt: skip
    _, logprobs, ref_logprobs, values, mask, scores = _check_scan(
        op, "fFfM", {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values},
        {"mask": mask}, {"scores": scores}, cu_seqlens, masked,
    )  # fmt: skip
    gamma = option_checks.rate(op, "gamma", gamma)
    lam = option_checks.rate(op, "lam", lam)
    whiten, kl_coef, kl_estimator, reward_clip = _check_shaping(
        op, whiten, kl_coef, kl_estimator, reward_clip
    )
    backend = backends.select(op, logprobs.device)
    if backend == backends.REFERENCE:
        checks.offsets_valid(op, cu_seqlens, logprobs.shape[0])
        return PPOAdvantages(
            *reference.ppo_advantages(
                scores,
                logprobs,
                ref_logprobs,
                values,
                mask,
                kl_coef=kl_coef,
                kl_estimator=kl_estimator,
                cu_seqlens=cu_seqlens,
                gamma=gamma,
                lam=lam,
                masked=masked,
                whiten=whiten,
                reward_clip=reward_clip,
            )
        )
    checks.not_double(
        op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values
    )
    return PPOAdvantages(
        *_ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask, cu_seqlens, kl_coef, kl_estimator,
            gamma, lam, masked, whiten, reward_clip, backend,
        )
    )  # fmt: skip


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps), with mean and variance over the kept elements.

    Statistics are two-pass in fp64, never E[x^2] - mean^2.

    Args:
        x: [...], float32, bfloat16 or float16; integers and bools become float32.
        mask: the shape of x; as in `gae`.
        shift_mean: False adds the mean back.
        unbiased: divide the sum of squares by n - 1, not n. True for TRL and verl, False for
            OpenRLHF.
        eps: added to the variance, >= 0.

    Returns:
        float32 in the shape of x, detached; exactly 0 at masked positions. A single kept element
        has variance 0, so its result is 0 (with shift_mean=False, its own value).

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; eps below 0.
    """
    op = "whiten"
    x = constant(checks.real(op, "x", x))
    mask = checks.row_mask(op, mask, "x", x.shape, x.device)
    shift_mean = option_checks.flag(op, "shift_mean", shift_mean)
    unbiased = option_checks.flag(op, "unbiased", unbiased)
    eps = option_checks.non_negative(op, "eps", eps)
    backend = backends.select(op, x.device)
    if backend == backends.REFERENCE:
        return reference.whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
    checks.not_double(op, x=x)
    return _whiten(x, mask, shift_mean, unbiased, eps, backend)
