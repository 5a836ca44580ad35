"""Reference of sequence log-probabilities and the losses of preferences."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.preference import AVERAGED, REFERENCE_FREE
from ..core.sequences import sequence_ids, sequence_sums, spread
from ._common import clamped, compute


def sequence_logprobs(
    logprobs: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    shared_lengths: Tensor | None = None,
    ld_alpha: float = 1.0,
) -> Tensor:
    """Sum (with `average`: mean) of each sequence's unmasked token log-probabilities, [B].

    Those after the first shared_lengths unmasked tokens weigh ld_alpha.
    """
    mask = kept = mask != 0
    if shared_lengths is not None:
        shared = _positions(mask, cu_seqlens) <= spread(shared_lengths, mask, cu_seqlens)
        kept = mask & shared if ld_alpha == 0 else mask
    x = torch.where(kept, compute(logprobs), 0)
    if shared_lengths is not None:
        x = torch.where(shared, x, ld_alpha * x)
    total = sequence_sums(x, cu_seqlens)
    if average:
        total = total / sequence_sums(mask, cu_seqlens).clamp(min=1)
    return total.to(x.dtype)


def _positions(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Which of its sequence's unmasked tokens each of them is, from 1."""
    counts = mask.long().cumsum(-1)
    if cu_seqlens is None or not counts.numel():
        return counts
    starts = cu_seqlens.long()[sequence_ids(mask, cu_seqlens)]
    starts = starts.clamp(0, counts.shape[0] - 1)
    return counts - counts[starts] + mask[starts].long()


#: The largest exponent of an f-divergence: its square is still finite in fp32.
_LARGEST_EXPONENT = 40.0
#: That of AlphaPO's rewards, which are finite in fp32 for any usual alpha and beta.
_LARGEST_POWER = 80.0


class _Pairs(NamedTuple):
    """Log-probabilities of (chosen, rejected), and the options. Methods: pairs of tensors [B]."""

    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor] | None
    lengths: tuple[Tensor, Tensor] | None
    beta: float
    smoothing: float
    f_divergence: str
    f_alpha: float
    tau: float
    gamma: float
    alpha: float

    def per_token(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Divided by the lengths; without lengths they are means already."""
        if self.lengths is None:
            return x
        return x[0] / self.lengths[0], x[1] / self.lengths[1]

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference)."""
        if self.reference is None:
            return self.policy
        return self.policy[0] - self.reference[0], self.policy[1] - self.reference[1]

    def rewards(self) -> tuple[Tensor, Tensor]:
        """Rewards over beta: f'(policy / reference)."""
        chosen, rejected = self.ratios()
        return self._slope(chosen), self._slope(rejected)

    def _slope(self, x: Tensor) -> Tensor:
        """f'(u) at log u = x."""
        if self.f_divergence == "forward_kl":
            return _power(x, -1.0, _LARGEST_EXPONENT)
        if self.f_divergence == "js_divergence":
            return F.logsigmoid(x) + math.log(2)
        if self.f_divergence == "alpha_divergence":
            return _power(x, self.f_alpha - 1, _LARGEST_EXPONENT)
        return x


def _power(x: Tensor, a: float, most: float = math.inf) -> Tensor:
    """(exp(a x) - 1) / a, x at a = 0; the exponent is cut off at `most`."""
    if abs(a) < 1e-6:
        return x
    return _expm1(clamped(a * x, -math.inf, most)) / a


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1; the slope of torch's is made from its result, which far below 0 is -1."""
    return torch.where(x < -1, torch.exp(x) - 1, torch.expm1(x))


def _sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x), with a slope that is right where it has come near 1."""
    return torch.exp(F.logsigmoid(x))


def _difference(x: tuple[Tensor, Tensor]) -> Tensor:
    return x[0] - x[1]


def _smoothed(z: Tensor, s: float) -> Tensor:
    """-(1 - s) log sigmoid(z) - s log sigmoid(-z)."""
    term = -(1 - s) * F.logsigmoid(z)
    # Skipped without smoothing: 0 times an infinite term is NaN.
    return term - s * F.logsigmoid(-z) if s != 0 else term


def _dpo(p: _Pairs) -> Tensor:
    return _smoothed(p.beta * _difference(p.rewards()), p.smoothing)


def _hinge(p: _Pairs) -> Tensor:
    x = 1 - p.beta * _difference(p.rewards())
    # Not relu, whose slope at NaN is 0.
    return torch.where(x <= 0, 0, x)


def _ipo(p: _Pairs) -> Tensor:
    d = _difference(p.per_token(p.rewards()))
    return torch.square(d - 1 / (2 * p.beta))


def _exo_pair(p: _Pairs) -> Tensor:
    # KL(q || p) of q = (sigmoid(z), sigmoid(-z)), p = (1 - s, s), from the smaller of the two of
    # q, which keeps the slope of the tails.
    z, s = p.beta * _difference(p.rewards()), p.smoothing
    right = z >= 0
    odds = z - (math.log1p(-s) - math.log(s))
    certain = torch.where(right, torch.full_like(z, math.log1p(-s)), math.log(s))
    distance = torch.where(right, z, -z)
    return F.logsigmoid(distance) - certain - _sigmoid(-distance) * torch.where(right, odds, -odds)


def _nca_pair(p: _Pairs) -> Tensor:
    chosen, rejected = (p.beta * x for x in p.ratios())
    both = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * both


def _robust(p: _Pairs) -> Tensor:
    z, s = p.beta * _difference(p.rewards()), p.smoothing
    term = -(1 - s) * F.logsigmoid(z)
    return (term + s * F.logsigmoid(-z)) / (1 - 2 * s) if s != 0 else term


def _bco_pair(p: _Pairs) -> Tensor:
    chosen, rejected = p.ratios()
    return -F.logsigmoid(p.beta * chosen) - F.logsigmoid(-p.beta * rejected)


def _sppo_hard(p: _Pairs) -> Tensor:
    chosen, rejected = p.ratios()
    half = 0.5 / p.beta
    return torch.square(chosen - half) + torch.square(rejected + half)


def _sorted(x: Tensor) -> Tensor:
    """Ascending; among equals the first comes first, everywhere."""
    return torch.sort(x, stable=True).values


def _aot(p: _Pairs) -> Tensor:
    """Quantiles of the policy's margins against quantiles of the reference's."""
    margins, own = _difference(p.policy), _difference(p.reference or p.policy)
    return _smoothed(p.beta * (_sorted(margins) - _sorted(own)), p.smoothing)


def _aot_unpaired(p: _Pairs) -> Tensor:
    """Quantiles of the chosen log-ratios against quantiles of the rejected."""
    chosen, rejected = p.ratios()
    return _smoothed(p.beta * (_sorted(chosen) - _sorted(rejected)), p.smoothing)


def _apo_zero(p: _Pairs) -> Tensor:
    chosen, rejected = p.ratios()
    return _sigmoid(-p.beta * chosen) + _sigmoid(p.beta * rejected)


def _apo_down(p: _Pairs) -> Tensor:
    chosen, rejected = p.ratios()
    return _sigmoid(p.beta * chosen) + _sigmoid(-p.beta * (chosen - rejected))


def _discopop(p: _Pairs) -> Tensor:
    # m exp(-z) - (1 - m) log sigmoid(z), m = sigmoid(z / tau), with one exponential for m exp(-z).
    z = p.beta * _difference(p.rewards())
    modulation = z / p.tau
    exponential = torch.exp(F.logsigmoid(modulation) - z)
    return exponential - _sigmoid(-modulation) * F.logsigmoid(z)


def _sft(p: _Pairs) -> Tensor:
    """The mean over pairs is the mean over all tokens."""
    chosen = p.policy[0]
    if p.lengths is None:
        return -chosen
    return -chosen * (chosen.numel() / p.lengths[0].sum().clamp(min=1))


def _sigmoid_norm(p: _Pairs) -> Tensor:
    return -F.logsigmoid(p.beta * _difference(p.per_token(p.rewards())))


def _cpo(p: _Pairs) -> Tensor:
    return _smoothed(p.beta * _difference(p.policy), p.smoothing)


def _simpo(p: _Pairs) -> Tensor:
    z = p.beta * _difference(p.per_token(p.policy)) - p.gamma
    return _smoothed(z, p.smoothing)


def _alphapo(p: _Pairs) -> Tensor:
    """(1 - exp(-alpha C)) / alpha less that of R, from the larger of the two exponents.

    Each alone may overflow where the loss and its gradient are 0; the larger is cut off.
    """
    chosen, rejected = p.per_token(p.policy)
    if abs(p.alpha) < 1e-6:
        return _smoothed(p.beta * (chosen - rejected) - p.gamma, p.smoothing)
    chosen, rejected = -p.alpha * chosen, -p.alpha * rejected
    ahead = rejected >= chosen
    high, low = torch.where(ahead, rejected, chosen), torch.where(ahead, chosen, rejected)
    # Its slope stays beyond the cut: a loss that is too large is not flat.
    cut = torch.where(high > _LARGEST_POWER, _LARGEST_POWER + (high - high.detach()), high)
    share = torch.exp(cut) * -_expm1(low - high) / p.alpha
    return _smoothed(p.beta * torch.where(ahead, share, -share) - p.gamma, p.smoothing)


def _orpo(p: _Pairs) -> Tensor:
    """log odds = x - log(1 - exp(x)); beta weighs the term, as in the paper's lambda."""
    chosen, rejected = p.per_token(p.policy)
    # At x = 0 the odds are infinite.
    tiny = torch.finfo(chosen.dtype).tiny
    chosen, rejected = (clamped(x, -math.inf, -tiny) for x in (chosen, rejected))
    others = torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected))
    return -p.beta * F.logsigmoid(chosen - rejected - others)


_TERMS: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": _dpo,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
    "cpo": _cpo,
    "simpo": _simpo,
    "alphapo": _alphapo,
    "orpo": _orpo,
}


def _shown_rewards(p: _Pairs, first: str) -> tuple[Tensor, Tensor]:
    """beta times the log-ratio as the first loss reads it."""
    found = p.policy if first in REFERENCE_FREE else p.ratios()
    if first in AVERAGED:
        found = p.per_token(found)
    if first == "alphapo":
        chosen, rejected = (_power(x, -p.alpha, _LARGEST_POWER) for x in found)
        found = chosen, rejected
    return p.beta * found[0].detach(), p.beta * found[1].detach()


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    loss: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    gamma: float = 0.5,
    alpha: float = 0.25,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of losses, each the mean over pairs of its term; rewards of both sides.

    The formulas are those of `rlhf_kernels.preference_loss`.
    """
    names = (loss,) if isinstance(loss, str) else tuple(loss)
    policy = compute(chosen_logprobs), compute(rejected_logprobs)
    reference = lengths = None
    if ref_chosen_logprobs is not None and ref_rejected_logprobs is not None:
        reference = compute(ref_chosen_logprobs), compute(ref_rejected_logprobs)
    if chosen_lengths is not None and rejected_lengths is not None:
        both = (x.to(policy[0].dtype).clamp(min=1) for x in (chosen_lengths, rejected_lengths))
        lengths = (next(both), next(both))
    pairs = _Pairs(
        policy, reference, lengths, beta, label_smoothing, f_divergence, f_alpha, discopop_tau,
        gamma, alpha,
    )  # fmt: skip
    total: Tensor | None = None
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        term = _TERMS[name](pairs)
        if weights is not None:
            term = term * compute(weights.detach())
        mean = weight * (term.sum() / max(term.numel(), 1))
        total = mean if total is None else total + mean
    assert total is not None
    return total, *_shown_rewards(pairs, names[0])


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean of w sigmoid(-+ beta (logprob - ref - max(kl, 0))), - where desirable; rewards."""
    ratio = compute(logprobs) - compute(ref_logprobs)
    base = clamped(torch.as_tensor(kl, dtype=ratio.dtype, device=ratio.device), 0.0, math.inf)
    wanted = desirable != 0
    z = beta * (ratio - base.detach())
    weight = torch.where(wanted, torch.full_like(z, desirable_weight), undesirable_weight)
    term = weight * _sigmoid(torch.where(wanted, -z, z))
    return term.sum() / max(term.numel(), 1), beta * ratio.detach()


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean over pairs of -log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2; accuracy."""
    chosen, rejected = compute(chosen_rewards), compute(rejected_rewards)
    d = chosen - rejected
    z = d if margin is None else d - margin
    term = -F.logsigmoid(z)
    if center_coef != 0:
        term = term + center_coef * (chosen + rejected) ** 2
    pairs = max(d.numel(), 1)
    return term.sum() / pairs, (d.detach() > 0).to(d.dtype).sum() / pairs
