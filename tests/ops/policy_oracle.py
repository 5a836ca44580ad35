"""The policy loss from its formula, sequence by sequence in float64, with autograd's gradients."""

import torch
from torch import Tensor

import rlhf_kernels as rk


def _ratio(x: Tensor, config: rk.PolicyLossConfig) -> Tensor:
    low, high = config.log_ratio_bounds()
    log = torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)
    return log.exp()


def _sequence_ratio(x: Tensor, a: Tensor, config: rk.PolicyLossConfig) -> Tensor:
    """The ratios of a sequence's tokens, from their log-ratios and advantages."""
    if config.ratio_level == "token":
        return _ratio(x, config)
    if config.ratio_level == "clipped-sequence":
        low, high = (torch.tensor(bound).to(x).log() for bound in config.clip_bounds())
        cut = torch.where(a > 0, torch.minimum(x, high), torch.maximum(x, low))
        return _ratio(cut.mean(), config).expand_as(x)
    if config.ratio_level == "sequence":
        return _ratio(x.mean(), config).expand_as(x)
    return _ratio(x.mean().detach() + x - x.detach(), config)


def _correction(old: Tensor, rollout: Tensor, config: rk.PolicyLossConfig) -> Tensor | float:
    if config.correction_level is None:
        return 1.0
    d = old - rollout
    of = {"token": d, "sequence": d.sum(), "geometric": d.mean()}
    w = of[config.correction_level].exp().expand_as(d)
    low, high = config.correction_min or 0.0, config.correction_max or torch.inf
    if config.correction_mode == "truncate":
        return w.clamp(low, high)
    return w * ((w >= low) & (w <= high))


def _objective(
    r: Tensor, lp: Tensor, a: Tensor, w: Tensor | float, config: rk.PolicyLossConfig
) -> Tensor:
    low, high = config.clip_bounds()
    if config.ratio_level == "clipped-sequence":
        return -w * a * r
    if config.objective == "reinforce":
        return -w * a * lp
    if config.objective == "cispo":
        return -w * a * r.detach().clamp(low, high) * lp
    if config.objective == "penalty":
        return -w * a * r + config.penalty_coef * (r - 1 - r.log())
    if config.objective == "sapo":
        tau = torch.where(a > 0, config.sapo_tau_pos, config.sapo_tau_neg)
        return -w * a * torch.sigmoid(tau * (r - 1)) * 4 / tau
    free = r if config.delta is None else r.clamp(max=config.delta)
    term = torch.maximum(-a * free, -a * r.clamp(low, high))
    if config.dual_clip is not None:
        term = torch.where(a < 0, torch.minimum(term, -a * config.dual_clip), term)
    return w * term


def _kl(x: Tensor, r: Tensor, config: rk.PolicyLossConfig) -> Tensor:
    kl = {"k1": x, "k2": x * x / 2, "k3": (-x).exp() - 1 + x, "abs": x.abs()}[config.kl_estimator]
    if config.kl_weight is None:
        return kl
    if config.kl_weight == "one":
        return kl * (x - x.detach()).exp()
    most = torch.inf if config.kl_weight_max is None else config.kl_weight_max
    w = torch.where(r > most, r.detach().clamp(max=most), r)
    return kl * (w.detach() if config.kl_weight == "detached-ratio" else w)


def _dropped(
    lp: Tensor, anchor: Tensor, a: Tensor, config: rk.PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Whether the gate drops each token of a sequence: below its lower bound, above its upper."""
    p, q = lp.exp(), anchor.exp()
    low = -torch.inf if config.gate_low is None else config.gate_low
    high = torch.inf if config.gate_high is None else config.gate_high
    if config.gate is None:
        return p < 0, p < 0
    if config.gate == "opsm":
        return (a < 0) & ((anchor - lp).mean() > low), p < 0
    if config.gate == "ratio":
        return p / q < low, p / q > high
    size = (p - q).abs()
    if config.gate == "binary_kl":
        size = q * (anchor - lp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    low = torch.inf if config.gate_low is None else config.gate_low
    below, above = (p < q) & (size > low), (p > q) & (size > high)
    if config.gate_two_sided:
        return below, above
    return below & (a < 0), above & (a > 0)


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor,
    rollout_logprobs: Tensor,
    entropy: Tensor,
    weights: Tensor,
    config: rk.PolicyLossConfig,
) -> dict[str, Tensor]:
    """The loss, its three terms and the fractions of a gate, of inputs [B, T] in float64.

    No clamps of the KL, and estimators without "+". `advantages` and `weights` [B, T] or [B].
    """
    terms: dict[str, list[Tensor]] = {"pg_loss": [], "kl_loss": [], "entropy_loss": []}
    gated = torch.zeros(2, dtype=torch.float64)
    tokens, sequences = int(mask.sum()), int(mask.any(-1).sum())
    for s, keep in enumerate(mask):
        if not keep.any():
            continue
        lp, before, ref, rollout, h = (
            t[s][keep] for t in (logprobs, old, ref_logprobs, rollout_logprobs, entropy)
        )
        a, u = (t[s] if t.dim() == 1 else t[s][keep] for t in (advantages, weights))
        r = _sequence_ratio(lp - before, a.expand_as(lp), config)
        anchor = before if config.gate_against == "old" else rollout
        below, above = _dropped(lp.detach(), anchor, a.expand_as(lp), config)
        gated += torch.stack((below.sum(), above.sum()))
        w = _correction(before, rollout, config) * (~below & ~above)
        share = u / len(lp) if config.aggregation == "seq-mean-token-mean" else u
        terms["pg_loss"].append((share * _objective(r, lp, a, w, config)).sum())
        terms["kl_loss"].append((share * _kl(lp - ref, r, config)).sum())
        terms["entropy_loss"].append((share * h).sum())
    divisor = config.normalizer
    if divisor is None:
        divisor = tokens if config.aggregation == "token-mean" else sequences
    found = {k: torch.stack(v).sum() / divisor for k, v in terms.items()}
    loss = found["pg_loss"] + config.kl_coef * found["kl_loss"]
    gates = dict(zip(("gate_frac_low", "gate_frac_high"), gated / tokens, strict=True))
    return {"loss": loss - config.entropy_coef * found["entropy_loss"], **found, **gates}
