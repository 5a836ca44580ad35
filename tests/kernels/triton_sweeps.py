"""Calls of many sizes, strides and coefficients, for which nothing may be compiled anew.

Their names are sweep/operation/kind/...: within a kind the kernels are the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.kernels.triton_case import BF16, Case

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig


def row_sweeps() -> Iterator[Case]:
    for n, (rows, vocab, temperature, softcap, ignored) in enumerate(
        (
            (1, 8, 1.0, 30.0, -100),
            (1, 256, 0.7, 50.0, 0),
            # Whole numbers, and those that a JIT likes to build in.
            (2, 256, 1, 1, 1),
            (16, 1024, 2, 16, 16),
            (17, 8 * 1021, 1e-3, 30.5, -1),
            (3, 152064, 3.0, 10.0, 2),
        )
    ):
        options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignored}
        x = torch.zeros(rows, vocab, dtype=BF16, requires_grad=True)
        y = torch.zeros(rows, dtype=torch.int64)
        options["entropy"] = True
        yield Case(f"sweep/token_logprobs/all/{n}", rk.token_logprobs, (x, y), options)
        # Another rank, gaps between rows, labels of one stride or another.
        x = torch.zeros(rows, 5, vocab + 8, dtype=BF16)[:, :-1, :vocab].requires_grad_()
        y = torch.zeros(4, rows, dtype=torch.int64).t()
        yield Case(f"sweep/token_logprobs/all/strided {n}", rk.token_logprobs, (x, y), options)
        options = {"temperature": temperature}
        ref = torch.zeros(rows + 1, 5, vocab + 16, dtype=BF16)[1:, 1:, 8 : vocab + 8]
        yield Case(f"sweep/kl_divergence/all/{n}", rk.kl_divergence, (x, ref), options)
        yield Case(f"sweep/kl_penalty/all/{n}", rk.kl_penalty, (x[..., 1], ref[..., 3]), {})


def support_sweeps() -> Iterator[Case]:
    sizes = ((1, 1, 24), (16, 3, 64), (5, 1001, 4096), (7, 16, 100))
    for n, (tokens, kept, vocab) in enumerate(sizes):
        y = torch.zeros(tokens, dtype=torch.int64)
        words = torch.arange(kept).repeat(tokens) % vocab
        options = {"support": (torch.arange(tokens + 1) * kept, words), "entropy": True}
        options |= {"temperature": (0.7, 1, 16, 2)[n], "softcap": (30.0, 1, 16, 2)[n]}
        x = torch.zeros(tokens, vocab, requires_grad=True)
        yield Case(f"sweep/token_logprobs_support/all/{n}", rk.token_logprobs, (x, y), options)
        hidden, weight = (torch.zeros(r, 64, requires_grad=True) for r in (tokens, vocab))
        yield Case(f"sweep/linear_token_logprobs_support/all/{n}", rk.linear_token_logprobs,
                   (hidden, weight, y), options)  # fmt: skip


def token_sweeps() -> Iterator[Case]:
    # Lengths of one tile and of several: the second kind may need another kernel.
    lengths = {"short": (1, 16, 1000, 1024), "long": (10000, 16384, 40001)}
    coefficients = ((1.0, 0.95), (1, 1), (0.5, 0), (0, 0.25))
    for kind, many in lengths.items():
        for n, (length, (gamma, lam)) in enumerate(zip(many, coefficients, strict=False)):
            rows = (1, 2, 16, 17)[n]

            def x(rows: int = rows, length: int = length, **options: Any) -> Tensor:
                return torch.zeros(rows + 1, length + 3, **options)[1:, 2:-1]

            mask, name = x(dtype=torch.bool), f"{kind}/{n}"
            rates: dict[str, Any] = {"gamma": gamma, "lam": lam}
            yield Case(f"sweep/gae/{name}", rk.gae, (x(), x()), {"mask": mask} | rates)
            yield Case(f"sweep/discounted_returns/{name}", rk.discounted_returns, (x(),),
                       {"mask": mask, "gamma": gamma})  # fmt: skip
            yield Case(f"sweep/ppo_advantages/{name}", rk.ppo_advantages,
                       (x()[:, 0], x(), x(), x()),
                       {"mask": mask, "kl_coef": (0.1, 1, 2, 3.5)[n],
                        "reward_clip": (1, 16, 2.5, 3)[n]} | rates)  # fmt: skip
            yield Case(f"sweep/whiten/{name}", rk.whiten, (x(),),
                       {"mask": mask, "eps": (1e-8, 0, 1, 16)[n], "unbiased": n > 1})  # fmt: skip
            rewards, size = torch.zeros(rows * length), (1, rows, length, 1)[n]
            options = {"eps": (1e-6, 0, 1, 16)[n]}
            yield Case(f"sweep/group_advantages/{name}", rk.group_advantages, (rewards, size),
                       options)  # fmt: skip
            ids = torch.zeros(rows * length, dtype=(torch.int64, torch.int32)[n % 2])
            yield Case(f"sweep/group_advantages/{kind} ids/{n}", rk.group_advantages,
                       (rewards, ids), options)  # fmt: skip
            numbers = (0.2, 1, 0, 0.5)
            config = PolicyLossConfig.ppo(
                clip_low=numbers[n], clip_high=(0.28, 1, 16, 2)[n], dual_clip=(3, 2.0, 16, 4)[n],
                kl_coef=(0.1, 1, 16, 0.5)[n], entropy_coef=(0.01, 1, 2, 16)[n],
            )  # fmt: skip
            inputs = {
                "mask": mask,
                "ref_logprobs": x(),
                "entropy": x().requires_grad_(),
                "config": config,
            }
            args = (x().requires_grad_(), x(), x())
            yield Case(f"sweep/policy_loss/{name}", rk.policy_loss, args, inputs)
            inputs = inputs | {"normalizer": (3.0, 1, 16, 2.5)[n]}
            yield Case(f"sweep/policy_loss/{kind} normalizer/{n}", rk.policy_loss, args, inputs)
            yield Case(f"sweep/value_loss/{name}", rk.value_loss, args,
                       {"mask": mask, "clip_range": (0.2, 1, 16, 2)[n]})  # fmt: skip


def packed_sweeps() -> Iterator[Case]:
    for n, (sequences, tokens) in enumerate(((1, 1), (2, 1000), (16, 40001), (1025, 16384))):
        x = torch.zeros(tokens + 3)[2:-1]
        scores, mask = torch.zeros(sequences), torch.ones(tokens, dtype=torch.bool)
        options = {"cu_seqlens": torch.zeros(sequences + 1, dtype=torch.int64), "mask": mask}
        options |= {"gamma": (1, 0.5, 1.0, 0)[n]}
        name = f"packed/{n}"
        yield Case(f"sweep/gae/{name}", rk.gae, (x, x), options)
        yield Case(f"sweep/discounted_returns/{name}", rk.discounted_returns, (x,), options)
        yield Case(f"sweep/ppo_advantages/{name}", rk.ppo_advantages, (scores, x, x, x),
                   options | {"kl_coef": 0.1})  # fmt: skip


def cases() -> Iterator[Case]:
    yield from row_sweeps()
    yield from support_sweeps()
    yield from token_sweeps()
    yield from packed_sweeps()
