"""ppo_advantages: PPO's shaped rewards, their GAE and its whitening.

Nothing here is differentiable: advantages and returns are constants of the loss.
"""

from typing import NamedTuple

from torch import Tensor

from .. import reference
from ..config.enums import PLAIN_KL_ESTIMATORS, MaskedSteps, PlainKlEstimator
from ..core import checks, data_checks, option_checks
from ..core.layout import fp32_like
from ..kernels import backends
from . import advantages_general as general
from ._operator import define
from .advantages import check_scan


@define("ppo_advantages")
def _ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    masked: str,
    whiten: bool,
    reward_clip: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fp32_like(logprobs), fp32_like(logprobs), fp32_like(logprobs)


class PPOAdvantages(NamedTuple):
    """Result of `ppo_advantages`."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor


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
    tokens = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    if not usual or general.needed(gamma, lam, value_lam, truncated, None, None, None):
        flags = {"mask": mask, "terminated": terminated, "truncated": truncated}
        _, logprobs, ref_logprobs, values, mask, terminated, truncated, scores = check_scan(
            op, "fFfMMM", tokens, flags, {"scores": scores}, cu_seqlens, masked
        )
        whiten, kl_coef, kl_estimator, reward_clip = _check_shaping(
            op, whiten, kl_coef, kl_estimator, reward_clip
        )
        checked = general.Tokens("logprobs", logprobs, values, mask, cu_seqlens, masked)
        ends = general.Ends(terminated, truncated, bootstrap_values)
        shaping = general.Shaping(scores, ref_logprobs, kl_coef, kl_estimator, reward_clip)
        rates = (gamma, lam, value_lam)
        return PPOAdvantages(*general.scan(op, checked, ends, rates, whiten, shaping))
    _, logprobs, ref_logprobs, values, mask, scores = check_scan(
        op, "fFfM", tokens, {"mask": mask}, {"scores": scores}, cu_seqlens, masked
    )
    gamma = option_checks.rate(op, "gamma", gamma)
    lam = option_checks.rate(op, "lam", lam)
    whiten, kl_coef, kl_estimator, reward_clip = _check_shaping(
        op, whiten, kl_coef, kl_estimator, reward_clip
    )
    backend = backends.select(op, logprobs.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, logprobs.shape[0])
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
