"""Divergences of two models over the whole vocabulary, for distillation and KL terms."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from tools.variants import Family, Variant


def tensors() -> dict[str, Tensor]:
    """Logits [5, 23] of a student and a teacher; hidden states and heads of another width."""
    g = torch.Generator().manual_seed(6)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g)

    return {
        "student": normal(5, 23, scale=2.0),
        "teacher": normal(5, 23, scale=2.0),
        "hidden": normal(5, 8),
        "weight": normal(23, 8, scale=0.5),
        "ref_hidden": normal(5, 6),
        "ref_weight": normal(23, 6, scale=0.5),
        "ids": torch.tensor([[1, 5, 9], [0, 2, 22], [4, 3, 8], [7, 6, 20], [10, 11, 12]]),
    }


def kl(p, q):
    """KL(p || q) of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def pair(t, temperature=1.0):
    return log_softmax(t.student / temperature, -1), log_softmax(t.teacher / temperature, -1)


def heads(t):
    return (
        log_softmax(t.hidden @ t.weight.T, -1),
        log_softmax(t.ref_hidden @ t.ref_weight.T, -1),
    )


def jsd(p, q, beta):
    m = torch.log((1 - beta) * p.exp() + beta * q.exp())
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def at_ids(x, ids):
    """Log-probabilities of some ids, and of none of them."""
    found = log_softmax(x, -1).gather(-1, ids)
    return torch.cat([found, torch.log1p(-found.exp().sum(-1, keepdim=True))], -1)


def capped(x, cap):
    return log_softmax(cap * torch.tanh(x / cap), -1)


VARIANTS = (
    Variant("reverse KL", "TRL, verl, NeMo-RL, tinker", "rk.kl_divergence(student, teacher)",
            lambda t: kl(*pair(t)), note="The exact KL of RLHF, and of on-policy distillation."),
    Variant("forward KL", "TRL, verl, NeMo-RL",
            "rk.kl_divergence(student, teacher, direction='forward')",
            lambda t: kl(*reversed(pair(t)))),
    Variant("generalised JSD", "TRL (GKD, DistillationTrainer), Liger",
            "rk.kl_divergence(student, teacher, direction='jsd', beta=0.3)",
            lambda t: jsd(*pair(t), 0.3)),
    Variant("temperature of both", "TRL, Liger",
            "rk.kl_divergence(student, teacher, temperature=0.7)",
            lambda t: kl(*pair(t, 0.7))),
    Variant("each model's own cap and temperature", "TRL",
            "rk.kl_divergence(student, teacher, softcap=3.0, ref_softcap=None, "
            "ref_temperature=0.5)",
            lambda t: kl(capped(t.student, 3.0), log_softmax(t.teacher / 0.5, -1))),
    Variant("from hidden states, never all logits", "TRL, NeMo-RL, Liger",
            "rk.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight)",
            lambda t: kl(*heads(t))),
    Variant("generalised JSD from hidden states", "TRL (chunked divergence), Liger",
            "rk.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, direction='jsd', "
            "beta=0.3)",
            lambda t: jsd(*heads(t), 0.3)),
    Variant("forward KL over the teacher's top K and the rest", "TRL, verl, unsloth",
            "rk.topk_divergence(rk.token_logprobs(student, ids).logprobs, given)",
            lambda t: kl(at_ids(t.teacher, t.ids), at_ids(t.student, t.ids)),
            where=(("given", "torch.log_softmax(teacher, -1).gather(-1, ids)"),),
            note="`linear_token_logprobs(hidden, weight, ids)` where there are no logits."),
)  # fmt: skip

FAMILY = Family(
    "Divergences", tensors, ("student", "hidden", "weight"), VARIANTS,
)  # fmt: skip
