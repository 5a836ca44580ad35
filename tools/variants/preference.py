"""Preference losses, on sums of log-probabilities over answers."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tools.variants import Family, Variant

BETA = 0.3


def tensors() -> dict[str, Tensor]:
    """Sums [6] of chosen and rejected answers and of the reference, lengths, rewards."""
    g = torch.Generator().manual_seed(5)
    chosen, rejected, ref_chosen, ref_rejected = (-8 - 4 * torch.rand(4, 6, generator=g)).unbind(0)
    return {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
        "n": torch.tensor([3, 9, 1, 20, 7, 5]),
        "m": torch.tensor([5, 2, 8, 1, 1, 4]),
        "score": torch.randn(6, generator=g),
        "other": torch.randn(6, generator=g),
        "margin": torch.rand(6, generator=g),
        "wpo": torch.rand(6, generator=g),
        "wanted": torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool),
    }


def w(t):
    return t.chosen - t.ref_chosen


def r(t):
    return t.rejected - t.ref_rejected


def z(t):
    return BETA * (w(t) - r(t))


def means(t):
    return t.chosen / t.n, t.rejected / t.m


def smooth(x, s=0.1):
    return -(1 - s) * logsigmoid(x) - s * logsigmoid(-x)


def exo(t, s=0.1):
    q = torch.stack([torch.sigmoid(z(t)), torch.sigmoid(-z(t))])
    p = torch.tensor([1 - s, s], dtype=torch.float64)[:, None]
    return (q * (q.log() - p.log())).sum(0).mean()


def discopop(t, tau=0.05):
    m = torch.sigmoid(z(t) / tau)
    return (m * torch.exp(-z(t)) - (1 - m) * logsigmoid(z(t))).mean()


def odds(x):
    return x - torch.log1p(-torch.exp(x))


def orpo(t):
    c, d = means(t)
    return -(BETA * logsigmoid(odds(c) - odds(d))).mean()


def alphapo(t, alpha=0.25, gamma=0.5):
    c, d = ((1 - torch.exp(-alpha * x)) / alpha for x in means(t))
    return -logsigmoid(BETA * (c - d) - gamma).mean()


def f_dpo(t, slope):
    return -logsigmoid(BETA * (slope(w(t)) - slope(r(t)))).mean()


def kto(t, kl=0.4):
    x = BETA * (w(t) - kl)
    return torch.where(t.wanted, 1.0 - torch.sigmoid(x), 1.5 * (1 - torch.sigmoid(-x))).mean()


def call(loss: str, more: str = "", *, free: bool = False) -> str:
    pair = "chosen, rejected" + ("" if free else ", ref_chosen, ref_rejected")
    return f"rk.preference_loss({pair}, loss='{loss}', beta=0.3{more})"


LENGTHS = ", chosen_lengths=n, rejected_lengths=m"
SMOOTH = ", label_smoothing=0.1"

VARIANTS = (
    Variant("DPO, sigmoid", "all", call("sigmoid"), lambda t: -logsigmoid(z(t)).mean(),
            note="TRL's sigmoid ignores its label_smoothing."),
    Variant("cDPO", "TRL before 1.0, OpenRLHF, NeMo-RL", call("sigmoid", SMOOTH),
            lambda t: smooth(z(t)).mean()),
    Variant("hinge (SLiC)", "TRL", call("hinge"), lambda t: relu(1 - z(t)).mean()),
    Variant("IPO", "TRL, OpenRLHF", call("ipo", LENGTHS),
            lambda t: ((w(t) / t.n - r(t) / t.m - 1 / (2 * BETA)) ** 2).mean(),
            note="Without lengths OpenRLHF's form, of sums."),
    Variant("robust DPO", "TRL", call("robust", SMOOTH),
            lambda t: ((-0.9 * logsigmoid(z(t)) + 0.1 * logsigmoid(-z(t))) / 0.8).mean()),
    Variant("EXO", "TRL (exo_pair)", call("exo_pair", SMOOTH), exo),
    Variant("NCA", "TRL (nca_pair)", call("nca_pair"),
            lambda t: (-logsigmoid(BETA * w(t)) - 0.5 * logsigmoid(-BETA * w(t))
                       - 0.5 * logsigmoid(-BETA * r(t))).mean()),
    Variant("BCO on pairs", "TRL (bco_pair)", call("bco_pair"),
            lambda t: (-logsigmoid(BETA * w(t)) - logsigmoid(-BETA * r(t))).mean(),
            note="Without the running mean of rewards."),
    Variant("SPPO, hard", "TRL", call("sppo_hard"),
            lambda t: ((w(t) - 0.5 / BETA) ** 2 + (r(t) + 0.5 / BETA) ** 2).mean()),
    Variant("AOT", "TRL", call("aot"),
            lambda t: -logsigmoid(BETA * ((t.chosen - t.rejected).sort()[0]
                                          - (t.ref_chosen - t.ref_rejected).sort()[0])).mean()),
    Variant("AOT, unpaired", "TRL", call("aot_unpaired"),
            lambda t: -logsigmoid(BETA * (w(t).sort()[0] - r(t).sort()[0])).mean()),
    Variant("APO-zero", "TRL", call("apo_zero"),
            lambda t: (1 - torch.sigmoid(BETA * w(t)) + torch.sigmoid(BETA * r(t))).mean()),
    Variant("APO-down", "TRL", call("apo_down"),
            lambda t: (torch.sigmoid(BETA * w(t)) + 1 - torch.sigmoid(z(t))).mean()),
    Variant("DiscoPOP", "TRL", call("discopop", ", discopop_tau=0.05"), discopop),
    Variant("length-normalised DPO", "TRL (sigmoid_norm), Tulu 3", call("sigmoid_norm", LENGTHS),
            lambda t: -logsigmoid(BETA * (w(t) / t.n - r(t) / t.m)).mean()),
    Variant("SFT on the chosen", "TRL, NeMo-RL", call("sft", LENGTHS, free=True),
            lambda t: -t.chosen.sum() / t.n.sum()),
    Variant("several losses with weights", "TRL (MPO), NeMo-RL",
            "rk.preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, "
            "loss=('sigmoid', 'sft'), loss_weights=(0.8, 0.2), chosen_lengths=n, "
            "rejected_lengths=m)",
            lambda t: -0.8 * logsigmoid(z(t)).mean() - 0.2 * t.chosen.sum() / t.n.sum()),
    Variant("f-DPO, forward KL", "TRL", call("sigmoid", ", f_divergence='forward_kl'"),
            lambda t: f_dpo(t, lambda x: 1 - torch.exp(-x))),
    Variant("f-DPO, Jensen-Shannon", "TRL", call("sigmoid", ", f_divergence='js_divergence'"),
            lambda t: f_dpo(t, lambda x: torch.log(2 * torch.exp(x) / (1 + torch.exp(x))))),
    Variant("f-DPO, alpha", "TRL",
            call("sigmoid", ", f_divergence='alpha_divergence', f_alpha=0.6"),
            lambda t: f_dpo(t, lambda x: (torch.exp(-0.4 * x) - 1) / -0.4)),
    Variant("WPO", "TRL (use_weighting)", call("sigmoid", ", weights=wpo"),
            lambda t: -(t.wpo * logsigmoid(z(t))).mean(),
            note="The weight from `token_logprobs(..., collision=True)`: exp of the mean over both "
                 "answers of logprob - log collision."),
    Variant("LD-DPO", "TRL (ld_alpha)",
            note="`sequence_logprobs(..., shared_lengths=, ld_alpha=)` makes the sums of any row."),
    Variant("CPO", "TRL", call("cpo", free=True),
            lambda t: -logsigmoid(BETA * (t.chosen - t.rejected)).mean(),
            note="With its NLL: `loss=('cpo', 'sft')`."),
    Variant("SimPO", "TRL, Liger", call("simpo", ", gamma=0.5" + LENGTHS, free=True),
            lambda t: -logsigmoid(BETA * (means(t)[0] - means(t)[1]) - 0.5).mean()),
    Variant("AlphaPO", "TRL", call("alphapo", ", gamma=0.5, alpha=0.25" + LENGTHS, free=True),
            alphapo),
    Variant("ORPO", "TRL, Liger", call("orpo", LENGTHS, free=True), orpo,
            note="With its NLL: `loss=('sft', 'orpo')`."),
    Variant("KTO", "TRL, LlamaFactory",
            "rk.kto_loss(chosen, ref_chosen, wanted, kl=0.4, beta=0.3, undesirable_weight=1.5)",
            kto, note="apo_zero_unpaired is `kl=0`."),
    Variant("reward model, Bradley-Terry with margin and centring", "TRL, NeMo-RL, OpenRLHF",
            "rk.reward_model_loss(score, other, margin=margin, center_coef=0.01)",
            lambda t: (-logsigmoid(t.score - t.other - t.margin)
                       + 0.01 * (t.score + t.other) ** 2).mean()),
    Variant("reward model, LogExp", "OpenRLHF", "rk.reward_model_loss(score, other)",
            lambda t: torch.log(1 + torch.exp(t.other - t.score)).mean(),
            note="The same function as Bradley-Terry's."),
    Variant("TPO", "TRL (experimental)",
            note="no: three answers a prompt. Two calls of `preference_loss` and one of 'sft'."),
)  # fmt: skip

FAMILY = Family(
    "Preference losses", tensors,
    ("chosen", "rejected", "score", "other"), VARIANTS,
)  # fmt: skip
