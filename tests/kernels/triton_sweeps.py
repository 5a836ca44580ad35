"""Calls of many sizes, strides and coefficients, for which nothing may be compiled anew.

Their names are sweep/operation/kind/...: within a kind the kernels are the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.kernels.triton_case import BF16, Case, case, inputs

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.ops._calls import GIVEN, Inputs


def sweep(
    name: str, function: Callable[..., Any], x: Inputs, layout: str = "inner", **options: Any
) -> Case:
    return case(f"sweep/{function.__name__}/{name}", function, x, layout, **options)


def row_sweeps() -> Iterator[Case]:
    for n, (count, vocab, temperature, softcap, ignored) in enumerate(
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
        options["entropy"] = True
        x = inputs(count, 1, BF16, packed=True, vocabulary=vocab)
        yield sweep(f"all/{n}", rk.token_logprobs, x, "even", **options)
        # Another rank, gaps between rows, labels of one stride or another.
        logits = torch.zeros(count, 5, vocab + 8, dtype=BF16)[:, :-1, :vocab]
        labels = torch.zeros(4, count, dtype=torch.int64).t()
        options |= {"logits": logits, "labels": labels}
        yield sweep(f"all/strided {n}", rk.token_logprobs, x, "even", **options)
        ref = torch.zeros(count + 1, 5, vocab + 16, dtype=BF16)[1:, 1:, 8 : vocab + 8]
        options = {"logits": logits, "ref_logits": ref, "temperature": temperature}
        yield sweep(f"all/{n}", rk.kl_divergence, x, "even", **options)
        options = {"logprobs": logits[..., 1], "ref_logprobs": ref[..., 3]}
        yield sweep(f"all/{n}", rk.kl_penalty, x, "even", **options)


def support_sweeps() -> Iterator[Case]:
    sizes = ((1, 1, 24), (16, 3, 64), (5, 1001, 4096), (7, 16, 100))
    for n, (count, kept, vocab) in enumerate(sizes):
        words = torch.arange(kept).repeat(count) % vocab
        options = {"support": (torch.arange(count + 1) * kept, words), "entropy": True}
        options |= {"temperature": (0.7, 1, 16, 2)[n], "softcap": (30.0, 1, 16, 2)[n]}
        x = inputs(count, 1, packed=True, vocabulary=vocab, width=64)
        for function in (rk.token_logprobs, rk.linear_token_logprobs):
            yield case(f"sweep/{function.__name__}_support/all/{n}", function, x, **options)


def token_sweeps() -> Iterator[Case]:
    # Lengths of one tile and of several: the second kind may need another kernel.
    lengths = {"short": (1, 16, 1000, 1024), "long": (10000, 16384, 40001)}
    coefficients = ((1.0, 0.95), (1, 1), (0.5, 0), (0, 0.25))
    for kind, many in lengths.items():
        for n, (length, (gamma, lam)) in enumerate(zip(many, coefficients, strict=False)):
            count, name = (1, 2, 16, 17)[n], f"{kind}/{n}"
            x = inputs(count, length)
            steps: dict[str, Any] = {"mask": GIVEN, "gamma": gamma}
            yield sweep(name, rk.gae, x, **steps, lam=lam)
            general = {"lam": GIVEN, "value_lam": lam, "bootstrap_values": GIVEN}
            yield case(f"sweep/general_gae/{name}", rk.gae, x, **steps, **general)
            yield sweep(name, rk.discounted_returns, x, **steps)
            yield sweep(name, rk.ppo_advantages, x, **steps, lam=lam, scores=x.tokens()[:, 0],
                        kl_coef=(0.1, 1, 2, 3.5)[n], reward_clip=(1, 16, 2.5, 3)[n])  # fmt: skip
            yield sweep(name, rk.whiten, x, mask=GIVEN, eps=(1e-8, 0, 1, 16)[n], unbiased=n > 1)
            options = {"rewards": torch.zeros(count * length), "eps": (1e-6, 0, 1, 16)[n]}
            size = (1, count, length, 1)[n]
            yield sweep(name, rk.group_advantages, x, groups=size, **options)
            ids = torch.zeros(count * length, dtype=(torch.int64, torch.int32)[n % 2])
            yield sweep(f"{kind} ids/{n}", rk.group_advantages, x, groups=ids, **options)
            config = PolicyLossConfig.ppo(
                clip_low=(0.2, 1, 0, 0.5)[n], clip_high=(0.28, 1, 16, 2)[n],
                dual_clip=(3, 2.0, 16, 4)[n], kl_coef=(0.1, 1, 16, 0.5)[n],
                entropy_coef=(0.01, 1, 2, 16)[n],
            )  # fmt: skip
            options = {"config": config, "ref_logprobs": GIVEN, "entropy": GIVEN}
            yield sweep(name, rk.policy_loss, x, **options)
            options["normalizer"] = (3.0, 1, 16, 2.5)[n]
            yield sweep(f"{kind} normalizer/{n}", rk.policy_loss, x, **options)
            yield sweep(name, rk.value_loss, x, clip_range=(0.2, 1, 16, 2)[n])
            bounds = {"low": (0.5, 0, 0.25, 1)[n], "high": (2.0, 1, 16, 2.5)[n]}
            options = {"level": "sequence", "veto": (1e-4, 1e-3, 0.5, 1)[n], "missing": "one"}
            yield sweep(name, rk.mismatch_weights, x, **bounds, **options)


def packed_sweeps() -> Iterator[Case]:
    for n, (sequences, length) in enumerate(((1, 1), (2, 500), (17, 2353), (1024, 16))):
        x = inputs(sequences, length, packed=True)
        options = {"mask": GIVEN, "gamma": (1, 0.5, 1.0, 0)[n]}
        yield sweep(f"packed/{n}", rk.gae, x, **options)
        yield sweep(f"packed/{n}", rk.discounted_returns, x, **options)
        yield sweep(f"packed/{n}", rk.ppo_advantages, x, **options, kl_coef=0.1)


def cases() -> Iterator[Case]:
    yield from row_sweeps()
    yield from support_sweeps()
    yield from token_sweeps()
    yield from packed_sweeps()
