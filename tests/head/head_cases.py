"""Operands and configurations of the fused heads, and their bounds."""

import torch

from tests.head.bounds import HeadBounds, policy_bounds

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import generator

B, T, H, V = 3, 13, 24, 131
CONFIGS = {
    "ppo, every term": rk.PolicyLossConfig.ppo(kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0),
    "grpo": rk.PolicyLossConfig.grpo(),
    "rloo": rk.PolicyLossConfig.rloo(),
    "cispo": rk.PolicyLossConfig.cispo(),
    "sapo": rk.PolicyLossConfig.sapo(),
    "penalty": rk.PolicyLossConfig.ppo_penalty(),
    "token correction": rk.PolicyLossConfig.ppo(correction_level="token", correction_max=2.0),
    "constant": rk.PolicyLossConfig.dr_grpo(normalizer=50.0),
    "gspo": rk.PolicyLossConfig.gspo(clip_low=0.2, clip_high=0.3),
    "gspo-token": rk.PolicyLossConfig.gspo(
        ratio_level="sequence-token", clip_low=0.2, clip_high=0.3
    ),
    "sequence correction": rk.PolicyLossConfig.ppo(correction_level="sequence", correction_max=2.0),
}
OPTIONS = [
    {},
    {"temperature": 0.7, "softcap": 9.0, "logit_scale": 0.5},
    {"temperature": torch.linspace(0.5, 2.0, B * T).view(B, T)},
]


def operands(dtype=torch.float32, width=H, bias=True, seed=0):
    random = generator(seed)

    def draw(*shape, scale=1.0):
        values = torch.randn(shape, generator=random) * scale
        return values.to(dtype).requires_grad_()

    hidden, weight = draw(B, T, width), draw(V, width, scale=0.4)
    labels = torch.randint(0, V, (B, T), generator=random)
    return hidden, weight, draw(V) if bias else None, labels


def policy_problem(dtype=torch.float32):
    hidden, weight, bias, labels = operands(dtype)
    mask = torch.rand(B, T) < 0.8
    mask[2, 6:] = False
    # What stands under the mask is not looked at.
    labels[~mask] = -7
    with torch.no_grad():
        start = reference.linear_token_logprobs(
            hidden, weight, labels.masked_fill(~mask, -100), bias=bias, temperature=0.8
        )[0]
    old = start + 0.3 * torch.randn(B, T)
    advantages = torch.randn(B, T)
    advantages[:, 4:6] = 0
    constants = {
        "ref_logprobs": start + 0.3 * torch.randn(B, T),
        "rollout_logprobs": old + 0.2 * torch.randn(B, T),
    }
    return (hidden, weight, bias), (labels, old, advantages, mask), constants


def run_policy(function, operands, tokens, **options):
    hidden, weight, bias = operands
    *tokens, mask = tokens
    options |= {"bias": bias, "mask": mask, "temperature": 0.8}
    loss, metrics = function(hidden, weight, *tokens, **options)
    values = getattr(metrics, "tensor", metrics)
    return (loss, values, *torch.autograd.grad(loss, operands))


def policy_bounds_of(leaves, tokens, constants, **options):
    return policy_bounds(HeadBounds(*leaves, temperature=0.8), tokens, constants, **options)


def drawn(tokens, width, vocab, dtype=torch.float32, *, peak=1.0):
    hidden = (torch.randn(tokens, width) * peak).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,))
