"""Policy losses."""

import torch
from torch import Tensor

from tools.variants import Family, Variant
from tools.variants.policy_formulas import (
    binary_kl_keep,
    cispo,
    clipped,
    covariance,
    dual,
    fipo,
    geometric_mean,
    k3,
    mean,
    mismatch,
    of_rows,
    ratio,
    row,
    sapo,
    sequence_mismatch,
    sequence_ratio,
    tv_keep,
    two_sided,
    vespo,
    within,
)
from tools.variants.theirs import verl


def tensors() -> dict[str, Tensor]:
    """Log-probabilities [6, 40] of four policies, advantages, entropies, two answers a prompt."""
    g = torch.Generator().manual_seed(3)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(6, 40, generator=g)

    logprobs = -3 * torch.rand(6, 40, generator=g) - 0.05
    old = (logprobs + noise(0.3)).clamp(max=-0.01)
    rollout = (old + noise(0.2)).clamp(max=-0.005)
    mask = torch.rand(6, 40, generator=g) < 0.8
    mask[:, 0] = True
    return {
        "logprobs": logprobs,
        "old": old,
        "rollout": rollout,
        "ref": (logprobs + noise(0.2)).clamp(max=-0.02),
        "advantages": torch.randn(6, 1, generator=g).expand(6, 40).contiguous(),
        "entropy": torch.rand(6, 40, generator=g) + 0.5,
        "teacher": (logprobs + noise(0.4)).clamp(max=-0.02),
        "weights": torch.rand(6, 40, generator=g) * 2,
        "mask": mask,
        "values": torch.randn(6, 1, generator=g).expand(6, 40).contiguous(),
    }


PPO = "rk.policy_loss(logprobs, old, advantages, mask, config=C({}))"
FOLD = "rk.policy_loss(logprobs, old, {}, mask, config=C({}))"
REF = "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=ref, config=C({}))"
ROLLOUT = "rk.policy_loss(logprobs, old, advantages, mask, rollout_logprobs=rollout, config=C({}))"
FREE = "clip_low=None, clip_high=None"

VARIANTS = (
    Variant("PPO, clip", "all", PPO.format(""), lambda t: mean(clipped(ratio(t), t.advantages), t),
        theirs=verl("vanilla", clip_ratio_c=1e6)),
    Variant(
        "clip-higher (DAPO)", "all", PPO.format("clip_high=0.28"),
        lambda t: mean(clipped(ratio(t), t.advantages, high=0.28), t),
        theirs=verl("vanilla", clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1e6)),
    Variant(
        "dual clip", "verl, OpenRLHF, NeMo-RL, AReaL (c_clip), slime", PPO.format("dual_clip=3.0"),
        lambda t: mean(dual(t), t),
        note="AReaL's bound, c times the absolute advantage, binds for negative advantages alone.",
        theirs=verl("vanilla", clip_ratio_c=3.0)),
    Variant(
        "two-sided clip", "TRL (delta), INTELLECT-2", PPO.format("delta=1.6"),
        lambda t: mean(two_sided(t), t),
    ),
    Variant(
        "GRPO", "TRL, Liger, unsloth",
        REF.format("kl_coef=0.04, aggregation='seq-mean-token-mean'"),
        lambda t: of_rows(clipped(ratio(t), t.advantages) + 0.04 * k3(t), t),
    ),
    Variant(
        "BNPO", "TRL, Liger, unsloth", REF.format("kl_coef=0.04"),
        lambda t: mean(clipped(ratio(t), t.advantages) + 0.04 * k3(t), t),
        note="DAPO is the same with the tokens of the whole step as `normalizer`.",
    ),
    Variant(
        "Dr. GRPO", "TRL, Liger, verl, unsloth",
        PPO.format("aggregation='constant', normalizer=6 * 40"),
        lambda t: (clipped(ratio(t), t.advantages) * t.mask).sum() / 240,
    ),
    Variant(
        "LUSPO", "TRL", PPO.format("ratio_level='sequence', aggregation='seq-mean-token-sum'"),
        lambda t: (clipped(sequence_ratio(t), t.advantages) * t.mask).sum(1).mean(),
    ),
    Variant(
        "GSPO", "TRL, verl, NeMo-RL, AReaL, OpenRLHF, slime, miles, tinker",
        PPO.format("ratio_level='sequence', aggregation='seq-mean-token-mean'"),
        lambda t: of_rows(clipped(sequence_ratio(t), t.advantages), t),
    ),
    Variant(
        "GSPO-token", "verl, SkyRL, ms-swift",
        PPO.format("ratio_level='sequence-token', aggregation='seq-mean-token-mean'"),
        lambda t: of_rows(clipped(sequence_ratio(t, per_token=True), t.advantages), t),
        theirs=verl("gspo", "seq-mean-token-mean", clip_ratio_low=0.2, clip_ratio_high=0.2)),
    Variant(
        "CISPO", "TRL, verl, SkyRL, prime-rl, tinker", PPO.format("objective='cispo'"),
        lambda t: mean(cispo(t), t),
        note="`clip_absolute=True` for TRL's and tinker's absolute bounds.",
        theirs=verl("cispo", clip_ratio_low=0.2, clip_ratio_high=0.2)),
    Variant("SAPO", "TRL, verl, SkyRL, ms-swift", 
        PPO.format("objective='sapo', aggregation='seq-mean-token-mean'"),
        lambda t: of_rows(sapo(t), t),
        theirs=verl("sapo", "seq-mean-token-mean", tau_pos=1.0, tau_neg=1.05)),
    Variant("REINFORCE, GPG", "verl, trinity, OpenRLHF", PPO.format("objective='reinforce'"),
            lambda t: mean(-t.advantages * t.logprobs, t),
        theirs=verl("gpg")),
    Variant(
        "OPMD", "trinity", FOLD.format("advantages / (1 + 0.5)", "objective='reinforce'"),
        lambda t: mean(-t.advantages * t.logprobs / 1.5, t),
    ),
    Variant("importance sampling", "tinker, SkyRL", PPO.format(FREE),
            lambda t: mean(-t.advantages * ratio(t), t)),
    Variant(
        "PPO-penalty", "ours; the PPO paper", PPO.format("objective='penalty', penalty_coef=0.5"),
        lambda t: mean(
            -t.advantages * ratio(t) + 0.5 * (ratio(t) - 1 - (t.logprobs - t.old)), t
        ),
    ),
    Variant(
        "VESPO", "TRL", FOLD.format("advantages * phi", "objective='reinforce'"),
        lambda t: mean(vespo(t), t),
        where=(
            ("w", "((logprobs - old).clamp(-20, 20) * mask).sum(1, keepdim=True).detach()"
                  ".clamp(-18.42068074, 20)"),
            ("k", "torch.where(advantages >= 0, 2.0, 3.0)"),
            ("lam", "torch.where(advantages >= 0, 3.0, 2.0)"),
            ("phi", "torch.exp(lam + k * w - lam * torch.exp(w))"),
        ),
    ),
    Variant(
        "DPPO-TV, detached ratio", "verl (dppo_tv)",
        PPO.format(
            "objective='cispo', clip_low=None, clip_high=20, clip_absolute=True, "
            "gate='tv', gate_low=0.05, gate_high=0.05"
        ),
        lambda t: mean(cispo(t, 0, 20) * tv_keep(t, t.old), t),
        theirs=verl("dppo_tv", clip_ratio_low=0.05, clip_ratio_high=0.05, clip_ratio_c=20.0)),
    Variant(
        "DPPO-TV, differentiated ratio", "SkyRL, prime-rl, NeMo-RL",
        PPO.format(FREE + ", gate='tv', gate_low=0.05, gate_high=0.05"),
        lambda t: mean(-t.advantages * ratio(t) * tv_keep(t, t.old), t),
    ),
    Variant(
        "DPPO-KL", "verl (dppo_kl)",
        PPO.format(
            "objective='cispo', clip_low=None, clip_high=20, clip_absolute=True, "
            "gate='binary_kl', gate_low=0.01, gate_high=0.01"
        ),
        lambda t: mean(cispo(t, 0, 20) * binary_kl_keep(t), t),
        theirs=verl("dppo_kl", clip_ratio_low=0.01, clip_ratio_high=0.01, clip_ratio_c=20.0)),
    Variant(
        "IcePop on the current ratio", "SkyRL (rollout_is), prime-rl",
        ROLLOUT.format(
            FREE + ", gate='ratio', gate_low=0.7, gate_high=1.4, gate_against='rollout'"
        ),
        lambda t: mean(
            -t.advantages * ratio(t)
            * within(torch.exp(t.logprobs - t.rollout).detach(), 0.7, 1.4), t
        ),
    ),
    Variant(
        "off-policy sequence mask", "TRL, slime, miles, unsloth (OPSM)",
        "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=ref, "
        "rollout_logprobs=rollout, config=C(kl_coef=0.04, gate='opsm', gate_low=0.0, "
        "gate_against='rollout'))",
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            * ((t.advantages >= 0) | (row(t.rollout - t.logprobs, t.mask) <= 0.0)).double()
            + 0.04 * k3(t), t
        ),
        note="ms-swift drops the KL of these tokens as well: pass what is kept as `weights`.",
    ),
    Variant(
        "top entropy quantile", "TRL", FOLD.format("advantages * keep", ""),
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            * (t.entropy >= torch.quantile(t.entropy[t.mask], 0.8)).double(), t
        ),
        where=(("keep", "entropy >= torch.quantile(entropy[mask], 0.8)"),),
    ),
    Variant(
        "TIS, token", "all", ROLLOUT.format("correction_level='token', correction_max=1.2"),
        lambda t: mean(clipped(ratio(t), t.advantages) * mismatch(t).clamp(max=1.2), t),
    ),
    Variant(
        "TIS, sequence", "TRL, verl, SkyRL",
        ROLLOUT.format("correction_level='sequence', correction_max=2.0"),
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            * sequence_mismatch(t, average=False).clamp(max=2.0), t
        ),
    ),
    Variant(
        "IcePop, masked importance sampling", "prime-rl, verl, slime, AReaL, OpenRLHF (ratio)",
        ROLLOUT.format(
            "correction_level='token', correction_mode='mask', correction_min=0.8, "
            "correction_max=1.25"
        ),
        lambda t: mean(
            clipped(ratio(t), t.advantages) * mismatch(t) * within(mismatch(t), 0.8, 1.25), t
        ),
    ),
    Variant(
        "sequence mask by the geometric mean, token weights",
        "NeMo-RL (seq-mask-tis), OpenRLHF, verl (geo-rs), MIS",
        FOLD.format("advantages * w", ""),
        lambda t: mean(
            clipped(ratio(t), t.advantages) * mismatch(t)
            * within(sequence_mismatch(t, average=True), 0.98, 1.02), t
        ),
        where=(
            ("w", "rk.mismatch_weights(old, rollout, mask, level='token', "
                  "reject={'seq_mean_ratio': (0.98, 1.02)}).weights"),
        ),
    ),
    Variant(
        "geometric mean as the weight", "SkyRL",
        ROLLOUT.format(
            "correction_level='geometric', correction_mode='mask', correction_min=0.98, "
            "correction_max=1.02"
        ),
        lambda t: mean(
            clipped(ratio(t), t.advantages) * sequence_mismatch(t, average=True)
            * within(sequence_mismatch(t, average=True), 0.98, 1.02), t
        ),
    ),
    Variant(
        "correction that scales the KL too", "ms-swift",
        "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=ref, weights=w, "
        "config=C(kl_coef=0.04))",
        lambda t: mean(
            (clipped(ratio(t), t.advantages) + 0.04 * k3(t)) * mismatch(t).clamp(max=1.2), t
        ),
        where=(("w", "rk.mismatch_weights(old, rollout, mask, level='token', high=1.2).weights"),),
    ),
    Variant(
        "batch-normalised weights", "verl (rollout_is_batch_normalize)",
        FOLD.format("advantages * w", ""),
        lambda t: mean(clipped(ratio(t), t.advantages) * mismatch(t) / mean(mismatch(t), t), t),
        where=(
            ("w", "rk.mismatch_weights(old, rollout, mask, level='token', normalize=True).weights"),
        ),
    ),
    Variant(
        "rejected tokens (k1, k2, k3, ratio; token, sequence)", "verl (11 criteria), AReaL, MIS",
        "rk.policy_loss(logprobs, old, advantages, kept, config=C(normalizer=mask.sum().item()))",
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            * (torch.exp(t.old - t.rollout) - 1 - (t.old - t.rollout) <= 0.02).double(), t
        ),
        where=(
            ("kept", "rk.mismatch_weights(old, rollout, mask, reject={'token_k3': 0.02}).mask"),
        ),
    ),
    Variant(
        "bypass: old is the rollout", "verl (bypass_mode)",
        "rk.policy_loss(logprobs, rollout, advantages, mask)",
        lambda t: mean(clipped(torch.exp(t.logprobs - t.rollout), t.advantages), t),
    ),
    Variant(
        "DRO, Kimi-1.5", "verl, tinker, ROLL, trinity (REC)",
        "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=old, "
        "config=C(objective='reinforce', kl_coef=0.3, kl_estimator='k2'))",
        lambda t: mean(-t.advantages * t.logprobs + 0.15 * (t.logprobs - t.old) ** 2, t),
        theirs=verl("dro", options={"dro_beta": 0.3})),
    Variant(
        "prime-rl's default: DPPO-TV and a pull to old", "prime-rl",
        "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=old, config=C(" + FREE
        + ", gate='tv', gate_low=0.05, gate_high=0.05, kl_coef=2e-3, kl_estimator='k2'))",
        lambda t: mean(
            -t.advantages * ratio(t) * tv_keep(t, t.old) + 1e-3 * (t.logprobs - t.old) ** 2, t
        ),
    ),
    Variant(
        "weights of tokens or sequences", "prime-rl, unsloth (sample_weight), ms-swift, SkyRL",
        "rk.policy_loss(logprobs, old, advantages, mask, ref_logprobs=ref, weights=weights, "
        "config=C(kl_coef=0.04))",
        lambda t: mean((clipped(ratio(t), t.advantages) + 0.04 * k3(t)) * t.weights, t),
    ),
    Variant(
        "GMPO, geo_mean", "verl, TRL",
        "rk.policy_loss(logprobs, old, advantages, mask, config=C.gmpo())",
        lambda t: of_rows(-t.advantages * geometric_mean(t), t),
        note="TRL and verl give the bounds as log-ratios, +-0.4 here.",
        theirs=verl("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4),
    ),
    Variant(
        "Clip-Cov, KL-Cov", "verl, SkyRL", FOLD.format("advantages * keep", ""),
        lambda t: mean(
            clipped(ratio(t), t.advantages) * (covariance(t) <= 0.5).double(), t
        ),
        where=(
            ("a", "advantages - (advantages * mask).sum() / mask.sum()"),
            ("l", "(logprobs - (logprobs * mask).sum() / mask.sum()).detach()"),
            ("keep", "a * l <= 0.5"),
        ),
        note="Clip-Cov draws which of them to drop; KL-Cov adds a second call over those tokens.",
    ),
    Variant(
        "TOPR", "trinity, ROLL", FOLD.format("advantages * w", "objective='reinforce'"),
        lambda t: mean(
            -t.advantages * t.logprobs
            * torch.where(t.advantages <= 0, ratio(t).detach().clamp(0, 1), 1.0), t
        ),
        where=(
            ("w", "torch.where(advantages <= 0, (logprobs - old).exp().detach().clamp(0, 1), 1)"),
        ),
    ),
    Variant(
        "AsymRE", "trinity", FOLD.format("advantages + 0.1", "objective='reinforce'"),
        lambda t: mean(-(t.advantages + 0.1) * t.logprobs, t),
        note="sPPO and REC's forms are weights or masks on the advantages likewise.",
    ),
    Variant(
        "SFT or NLL beside the policy loss", "trinity (CHORD, MIX), VAPO, ms-swift, SDAR",
        "rk.policy_loss(logprobs, old, advantages, mask).loss + 0.1 * rk.policy_loss("
        "logprobs, None, torch.ones_like(advantages), mask, config=C(objective='reinforce')).loss",
        lambda t: mean(clipped(ratio(t), t.advantages) - 0.1 * t.logprobs, t),
    ),
    Variant(
        "FIPO", "ms-swift", FOLD.format("advantages * w", ""),
        lambda t: mean(clipped(ratio(t), t.advantages) * fipo(t), t),
        where=(
            ("future", "rk.discounted_returns((logprobs - old).detach(), mask, gamma=0.9)"),
            ("w", "future.exp().clamp(0.8, 1.2)"),
        ),
    ),
    Variant(
        "REAL", "ms-swift",
        note="no: a log-sum-exp over a group of sequences' mean log-ratios, a few lines of torch.",
    ),
    Variant(
        "M2PO", "AReaL", "rk.policy_loss(logprobs, old, advantages, mask & keep, "
        "config=C(" + FREE + ", normalizer=mask.sum().item()))",
        lambda t: mean(
            -t.advantages * ratio(t) * ((t.logprobs - t.old).detach() ** 2 <= 0.04).double(), t
        ),
        where=(("keep", "((logprobs - old) ** 2 <= 0.04)"),),
        note="With its threshold of the second moment found by sorting.",
    ),
    Variant(
        "A2PO", "TRL",
        note="no: a squared error of the log-ratio against a value, one line of torch.",
    ),
    Variant(
        "on-policy distillation, IW-OPD", "TRL, verl, NeMo-RL, tinker, prime-rl",
        FOLD.format("teacher - rollout", FREE),
        lambda t: mean(-(t.teacher - t.rollout) * ratio(t), t),
    ),
    Variant("stable_reinforce", "tinker", note="no: its formula is not public."),
    Variant(
        "KL weighted by the ratio, differentiated", "TRL (use_bias_correction_kl), DeepSeek-V3.2",
        REF.format("kl_coef=0.04, kl_weight='ratio'"),
        lambda t: mean(clipped(ratio(t), t.advantages) + 0.04 * k3(t) * ratio(t), t),
    ),
    Variant(
        "KL with the on-policy weight of value 1", "NeMo-RL",
        REF.format("kl_coef=0.04, kl_weight='one'"),
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            + 0.04 * k3(t) * torch.exp(t.logprobs - t.logprobs.detach()), t
        ),
        note="Its clamps (`kl_input_clamp=20, kl_value_clamp=10`) end the weight's gradient too, "
        "which ours do not.",
    ),
    Variant(
        "KL weighted by the detached ratio, at most 10", "OpenRLHF",
        REF.format(
            "kl_coef=0.04, kl_estimator='k2', kl_weight='detached-ratio', kl_weight_max=10"
        ),
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            + 0.02 * (t.logprobs - t.ref) ** 2 * ratio(t).detach().clamp(max=10), t
        ),
    ),
    Variant(
        "missing rollout log-probabilities: ratio 1", "TRL",
        "rk.policy_loss(logprobs, old, advantages, mask, rollout_logprobs=some, "
        "config=C(correction_level='token', correction_max=1.2))",
        lambda t: mean(
            clipped(ratio(t), t.advantages)
            * torch.where(t.weights > 1, 1.0, mismatch(t).clamp(max=1.2)), t
        ),
        where=(("some", "rollout.masked_fill(weights > 1, torch.nan)"),),
        note="torchtitan drops these tokens: `mismatch_weights(..., missing='drop').mask`.",
    ),
    Variant(
        "mean of a prompt's answers (prompt_mean)", "SkyRL",
        "rk.policy_loss(logprobs, old, advantages, mask, weights=w, "
        "config=C(aggregation='constant', normalizer=3))",
        lambda t: sum(
            (clipped(ratio(t), t.advantages) * t.mask)[2 * i : 2 * i + 2].sum()
            / t.mask[2 * i : 2 * i + 2].sum()
            for i in range(3)
        ) / 3,
        where=(
            ("tokens", "mask.view(3, 80).sum(1)"),
            ("w", "(1 / tokens).repeat_interleave(2)"),
        ),
        note="Two answers a prompt here.",
    ),
    Variant(
        "entropy bonus", "all",
        "rk.policy_loss(logprobs, old, advantages, mask, entropy=entropy, "
        "config=C(entropy_coef=0.01))",
        lambda t: mean(clipped(ratio(t), t.advantages) - 0.01 * t.entropy, t),
    ),
)  # fmt: skip

FAMILY = Family("Policy losses", tensors, ("logprobs",), VARIANTS)
