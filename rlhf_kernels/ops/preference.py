"""Preference learning: sequence log-probabilities, losses of pairs, KTO, the reward model's loss.

Plain torch on every backend: the tensors are only [B], and the logprobs are the expensive part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config import preference as rules
from ..config.enums import F_DIVERGENCES, PREFERENCE_LOSSES, FDivergence, PreferenceLossName
from ..core import checks, data_checks, option_checks
from ..core.option_checks import shown


class PreferenceLoss(NamedTuple):
    """Result of `preference_loss`."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class KTOLoss(NamedTuple):
    """Result of `kto_loss`."""

    loss: Tensor
    rewards: Tensor


class RewardModelLoss(NamedTuple):
    """Result of `reward_model_loss`."""

    loss: Tensor
    accuracy: Tensor


def _check_pairs(op: str, pairs: dict[str, Tensor]) -> None:
    (like, first), *_ = pairs.items()
    for name, value in pairs.items():
        checks.floating(op, name, value, double=True)
        if value.dim() != 1:
            raise ValueError(f"{op}: {name} must be [B], got {shown(value.shape)}")
        checks.same_shape(op, name, value, like, first.shape)
        checks.same_device(op, name, value, like, first.device)


def _names(op: str, loss: object) -> tuple[str, ...]:
    """The names of losses that `loss` is or holds."""
    names = tuple(loss) if isinstance(loss, list | tuple) else (loss,)
    if not names:
        raise ValueError(f"{op}: loss must be a name or several, got none")
    for name in names:
        option_checks.one_of(op, "loss", name, PREFERENCE_LOSSES)
    return names


def _loss_weights(op: str, names: Sequence[str], given: Any) -> list[float]:
    """One number per loss."""
    if given is None:
        return [1.0] * len(names)
    if not isinstance(given, list | tuple):
        option_checks.number(op, "loss_weights", given)
        raise TypeError(f"{op}: loss_weights must be a list of numbers, got {type(given).__name__}")
    if len(given) != len(names):
        found = f"{len(names)} numbers, one per loss, got {len(given)}"
        raise ValueError(f"{op}: loss_weights must be {found}")
    return [option_checks.number(op, "loss_weights", x) for x in given]


def _given(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}


def _both(op: str, values: dict[str, Tensor | None]) -> None:
    if len(_given(values)) == 1:
        (here, missing) = sorted(values, key=lambda name: values[name] is None)
        raise ValueError(f"{op}: {missing} must be given with {here}, got None")


def _check_references(op: str, names: Sequence[str], references: dict[str, Tensor | None]) -> None:
    """Requires them where a loss has them, and nowhere else."""
    given = _given(references)
    for name in names:
        free = name in rules.REFERENCE_FREE or name in rules.REFERENCE_OPTIONAL
        if not given and not free:
            needed = f"{' and '.join(references)} must be given with loss {name!r}"
            raise ValueError(f"{op}: {needed}, got None")
    if given and all(name in rules.REFERENCE_FREE for name in names):
        found = f"None with loss {' and '.join(map(repr, names))}, which has no reference"
        raise ValueError(f"{op}: {next(iter(given))} must be {found}")


def _beta(op: str, value: object) -> float:
    """Requires a beta that is neither 0 nor infinite where it meets fp32."""
    beta = option_checks.positive(op, "beta", value)
    if not 2.0**-126 <= beta <= 3.4e38:
        raise ValueError(f"{op}: beta must be within float32's range, got {shown(beta)}")
    return beta


def _check_options(op: str, names: Sequence[str], options: dict[str, Any]) -> None:
    option_checks.one_of(op, "f_divergence", options["f_divergence"], F_DIVERGENCES)
    smoothing = options["label_smoothing"]
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {shown(smoothing)}")
    if wrong := rules.contradiction(names, options):
        name, expected = wrong
        raise ValueError(f"{op}: {name} must be {expected}, got {shown(options[name])}")


def sequence_logprobs(
    logprobs: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    shared_lengths: Tensor | None = None,
    ld_alpha: float = 1.0,
) -> Tensor:
    """Log-probability of each sequence: the sum of its unmasked tokens' log-probabilities.

    LD-DPO (Liu et al. 2024, arXiv:2409.06411) weighs by ld_alpha the tokens by which an answer is
    longer than the other of its pair: shared_lengths is the lesser of the two lengths, for both.

    Args:
        logprobs: [B, T], or packed [N] with cu_seqlens; float32, bfloat16 or float16.
        mask: same shape; bool or integer, nonzero = keep, or floating with only 0 and 1. Values of
            masked tokens, even NaN, have no effect.
        cu_seqlens: offsets [S + 1] of packed sequences, int32 or int64.
        average: return the mean over the unmasked tokens instead of the sum (for IPO).
        shared_lengths: [B] (packed: [S]) integers: as many first unmasked tokens of each sequence
            weigh 1, the rest ld_alpha. None: all weigh 1.
        ld_alpha: weight in [0, 1] of the rest; with 0 it is left out. 1 without shared_lengths.

    Returns:
        [B] (packed: [S]), float32, differentiable; 0 for a sequence without unmasked tokens.

    Raises:
        TypeError: wrong dtype or type of an argument; a floating mask with values besides 0 and 1.
        ValueError: shapes or devices that do not match; bad cu_seqlens; a bad ld_alpha.
    """
    op = "sequence_logprobs"
    mask = checks.token_inputs(op, {"logprobs": logprobs}, mask, cu_seqlens)
    average = option_checks.flag(op, "average", average)
    ld_alpha = option_checks.rate(op, "ld_alpha", ld_alpha)
    cu_seqlens, good = data_checks.usable_offsets(op, cu_seqlens, logprobs.shape[0])
    if shared_lengths is not None:
        checks.integers(op, "shared_lengths", shared_lengths)
        count = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        what = "(number of sequences,)"
        checks.same_shape(op, "shared_lengths", shared_lengths, what, torch.Size([count]))
        checks.same_device(op, "shared_lengths", shared_lengths, "logprobs", logprobs.device)
    elif ld_alpha != 1:
        raise ValueError(f"{op}: ld_alpha must be 1 without shared_lengths, got {shown(ld_alpha)}")
    found = reference.sequence_logprobs(
        logprobs,
        mask,
        cu_seqlens=cu_seqlens,
        average=average,
        shared_lengths=shared_lengths,
        ld_alpha=ld_alpha,
    )
    return found if good is None else torch.where(good, found, torch.nan)


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    loss: PreferenceLossName | Sequence[PreferenceLossName] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    gamma: float = 0.5,
    alpha: float = 0.25,
) -> PreferenceLoss:
    """Loss of preference pairs, by name: DPO's family, and the losses without a reference.

    Each is a mean over pairs. With the log-ratios w = chosen - ref_chosen and
    l = rejected - ref_rejected, d = w - l, z = beta d, S = log sigmoid, s = label_smoothing:

    - "sigmoid": -(1 - s) S(z) - s S(-z), DPO, arXiv:2305.18290; s > 0 is its conservative form.
    - "hinge": max(0, 1 - z), arXiv:2305.10425. "ipo": (d - 1 / (2 beta))^2, arXiv:2310.12036.
    - "robust": (-(1 - s) S(z) + s S(-z)) / (1 - 2 s), arXiv:2403.00409.
    - "exo_pair": KL of (sigmoid(z), sigmoid(-z)) from (1 - s, s), s > 0, arXiv:2402.00856.
    - "nca_pair": -S(beta w) - (S(-beta w) + S(-beta l)) / 2, arXiv:2402.05369.
    - "bco_pair": -S(beta w) - S(-beta l), arXiv:2404.04656 without its moving shift.
    - "sppo_hard": (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2, arXiv:2405.00675.
    - "aot": "sigmoid" of sorted chosen - rejected less sorted ref_chosen - ref_rejected;
      "aot_unpaired": of sorted w less sorted l, arXiv:2406.05882.
    - "apo_zero": sigmoid(-beta w) + sigmoid(beta l); "apo_down": sigmoid(beta w) + sigmoid(-z),
      arXiv:2408.06266.
    - "discopop": m exp(-z) - (1 - m) S(z), m = sigmoid(z / discopop_tau), arXiv:2406.08414.
    - "sigmoid_norm": -S(beta (w / chosen_lengths - l / rejected_lengths)), arXiv:2411.15124.
    - "sft": -sum of chosen / sum of chosen_lengths, the mean over the tokens of the batch.

    Those without a reference, with the sequences' log-probabilities c, r and their means C, R:

    - "cpo": -(1 - s) S(beta (c - r)) - s S(beta (r - c)), arXiv:2401.08417; its whole objective is
      loss=("cpo", "sft").
    - "simpo": as "cpo" of beta (C - R) - gamma, arXiv:2405.14734.
    - "alphapo": as "simpo" of (1 - exp(-alpha C)) / alpha, R too, arXiv:2501.03884; exponents are
      cut off at 80.
    - "orpo": -beta S(log odds(C) - log odds(R)), odds(x) = exp(x) / (1 - exp(x)),
      arXiv:2403.07691; its whole objective is loss=("sft", "orpo").

    "sigmoid", "hinge" and "ipo" without a reference are what CPO's trainers call so. An
    f-divergence (arXiv:2309.16240) puts f'(exp(x)) for x = w and l: "forward_kl" 1 - exp(-x),
    "js_divergence" S(x) + log 2, "alpha_divergence" (exp((a - 1) x) - 1) / (a - 1), a = f_alpha;
    exponents are cut off at 40. Only for losses of d, and "sft".

    The weights of WPO (arXiv:2406.11827) are, of both answers multiplied, exp of the mean over
    tokens of logprob - log(sum of p^2 over the vocabulary).

    Args:
        chosen_logprobs: [B], sums over sequences (`sequence_logprobs`); float32, bfloat16, float16.
        rejected_logprobs: [B].
        ref_chosen_logprobs: [B], of the reference policy; a constant or not. None where no loss
            has a reference.
        ref_rejected_logprobs: [B].
        loss: a name, or several of them: the losses are added.
        loss_weights: one number per loss; None for ones.
        beta: strength of the implicit KL, > 0 and within float32's range.
        label_smoothing: probability that a pair is labelled wrongly, in [0, 0.5): "sigmoid",
            "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo", "alphapo". Losses beside
            one of these are not smoothed. TRL's DPO smooths all of these but "sigmoid".
        chosen_lengths: [B] integers, tokens of the sequences (at least 1 is counted). "ipo",
            "sigmoid_norm", "simpo", "alphapo" and "orpo" divide by them. Without lengths these take
            what is given for means (`average=True`), and "ipo" of sums is the form of its paper.
        rejected_lengths: [B].
        weights: [B], >= 0 (not looked at), constant: each pair's term is multiplied by its weight;
            not with "aot" and "aot_unpaired".
        f_divergence: "reverse_kl" (the log-ratio itself), "forward_kl", "js_divergence" or
            "alpha_divergence".
        f_alpha: of "alpha_divergence"; 1 is "reverse_kl".
        discopop_tau: > 0.
        gamma: target margin of "simpo" and "alphapo".
        alpha: of "alphapo"; 0 is "simpo".

    Returns:
        PreferenceLoss(loss, chosen_rewards [B], rejected_rewards [B]), float32. The rewards, beta
        times what the first loss compares, f-divergence aside (beta w, beta w / chosen_lengths,
        beta c, ...), are detached. Without pairs the loss is 0. NaN in an input makes it NaN.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; bad or contradictory options; an option
            that none of the losses has.
    """
    op = "preference_loss"
    names = _names(op, loss)
    pairs = {"chosen_logprobs": chosen_logprobs, "rejected_logprobs": rejected_logprobs}
    references = {"ref_chosen_logprobs": ref_chosen_logprobs,
                  "ref_rejected_logprobs": ref_rejected_logprobs}  # fmt: skip
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_references(op, names, references)
    _both(op, references)
    _both(op, lengths)
    _check_pairs(op, pairs | _given({**references, "weights": weights}))
    for name, value in _given(lengths).items():
        checks.integers(op, name, value)
        checks.same_shape(op, name, value, "chosen_logprobs", chosen_logprobs.shape)
        checks.same_device(op, name, value, "chosen_logprobs", chosen_logprobs.device)
    if "sft" in names and chosen_lengths is None:
        raise ValueError(f"{op}: chosen_lengths must be given with loss 'sft', got None")
    sort = [name for name in names if name in rules.SORTED]
    if weights is not None and sort:
        raise ValueError(f"{op}: weights must be None with loss {sort[0]!r}, which sorts the pairs")
    options: dict[str, Any] = {
        "label_smoothing": option_checks.number(op, "label_smoothing", label_smoothing),
        "f_divergence": f_divergence,
        "f_alpha": option_checks.number(op, "f_alpha", f_alpha),
        "discopop_tau": option_checks.positive(op, "discopop_tau", discopop_tau),
        "gamma": option_checks.number(op, "gamma", gamma),
        "alpha": option_checks.number(op, "alpha", alpha),
    }
    _check_options(op, names, options)
    return PreferenceLoss(
        *reference.preference_loss(
            chosen_logprobs,
            rejected_logprobs,
            ref_chosen_logprobs,
            ref_rejected_logprobs,
            loss=names,
            loss_weights=_loss_weights(op, names, loss_weights),
            beta=_beta(op, beta),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            **options,
        )
    )


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306): answers that are good or bad, without pairs.

    With the log-ratio x = logprob - ref and the baseline k = max(kl, 0), the mean over sequences of
    desirable_weight sigmoid(-beta (x - k)) where desirable, undesirable_weight
    sigmoid(beta (x - k)) elsewhere. With kl=0 it is the unpaired form of "apo_zero"
    (arXiv:2408.06266), TRL's "apo_zero_unpaired".

    Args:
        logprobs: [B], sums over sequences (`sequence_logprobs`); float32, bfloat16 or float16.
        ref_logprobs: [B], of the reference policy.
        desirable: [B] bool or integer, nonzero = desirable.
        kl: estimate of KL(policy || reference), a number or a 0-d tensor, constant: the mean of
            logprob - ref over answers that belong to other prompts, over all processes.
        beta: strength of the implicit KL, > 0 and within float32's range.
        desirable_weight: >= 0.
        undesirable_weight: >= 0.

    Returns:
        KTOLoss(loss, rewards [B]), float32; the rewards beta * (logprob - ref) are detached. The
        loss without sequences is 0. NaN in an input, kl too, makes it NaN.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; bad options.
    """
    op = "kto_loss"
    values = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    _check_pairs(op, values)
    checks.integers(op, "desirable", desirable)
    checks.same_shape(op, "desirable", desirable, "logprobs", logprobs.shape)
    checks.same_device(op, "desirable", desirable, "logprobs", logprobs.device)
    if isinstance(kl, Tensor):
        checks.floating(op, "kl", kl, double=True)
        checks.same_shape(op, "kl", kl, "a number", torch.Size())
        checks.same_device(op, "kl", kl, "logprobs", logprobs.device)
    else:
        kl = option_checks.number(op, "kl", kl)
    return KTOLoss(
        *reference.kto_loss(
            logprobs,
            ref_logprobs,
            desirable,
            kl=kl,
            beta=_beta(op, beta),
            desirable_weight=option_checks.non_negative(op, "desirable_weight", desirable_weight),
            undesirable_weight=option_checks.non_negative(
                op, "undesirable_weight", undesirable_weight
            ),
        )
    )


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> RewardModelLoss:
    """Pairwise reward-model loss: mean of -log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2.

    Bradley-Terry, as in Ouyang et al. 2022 (arXiv:2203.02155), without options also the LogExp
    loss log(1 + exp(r_l - r_w)) of Bai et al. 2022 (arXiv:2204.05862); margin as in Llama 2
    (arXiv:2307.09288); centering, which fixes the free offset of the rewards, as in Eisenstein et
    al. 2023 (arXiv:2312.09244).

    Args:
        chosen_rewards: [B], float32, bfloat16 or float16.
        rejected_rewards: [B].
        margin: a number, a constant tensor [B] (floating or integer), or None.
        center_coef: weight >= 0 of the centering term.

    Returns:
        RewardModelLoss(loss, accuracy), 0-d float32; accuracy is the fraction of pairs with
        r_w > r_l. Without pairs both are 0.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; a negative center_coef.
    """
    op = "reward_model_loss"
    pairs = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    _check_pairs(op, pairs)
    if isinstance(margin, Tensor) and margin.dim() > 0:
        margin = checks.real(op, "margin", margin).detach()
        _check_pairs(op, {**pairs, "margin": margin})
        margin = margin if margin.dtype is torch.float64 else margin.float()
    elif margin is not None:
        margin = option_checks.number(op, "margin", margin)
    center_coef = option_checks.non_negative(op, "center_coef", center_coef)
    return RewardModelLoss(
        *reference.reward_model_loss(*pairs.values(), margin=margin, center_coef=center_coef)
    )
