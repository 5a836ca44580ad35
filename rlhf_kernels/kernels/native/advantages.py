"""Launchers of the advantage operations for the native backends."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ...config.enums import BASELINES, PLAIN_KL_ESTIMATORS, SCALES
from ...core import checks
from ...core.layout import MaybeTensor
from .. import scans
from . import boundary as b

# csrc/abi.h: GaeArgs. The workspace holds three doubles a chunk, and three more for a GPU.
_CHUNK_TOKENS = 2048


def _fp32(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def _workspace(size: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)


def _moments(tokens: Tensor) -> Tensor:
    return _workspace(3 * (tokens.numel() // _CHUNK_TOKENS + 2), torch.float64, tokens)


def _flags(t: MaybeTensor) -> MaybeTensor:
    if t is not None and t.dtype not in (torch.bool, torch.int64, torch.int32):
        t = t != 0
    return b.as_grid(t)


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    where, gpu = b.place(extension), extension.gpu

    def scan(
        op: str,
        like: Tensor,
        cu_seqlens: Tensor | None,
        *,
        rewards: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        dones: Tensor | None = None,
        bootstrap_values: Tensor | None = None,
        scores: Tensor | None = None,
        logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k1",
        reward_clip: float | None = None,
        gamma: float,
        lam: float = 1.0,
        masked: str,
        whiten: bool = False,
    ) -> scans.ScanResults:
        results, done = scans.begin(op, like, cu_seqlens, values, scores, gpu)
        if done:
            return results
        advantages, returns, shaped = results
        sequences = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        moments = _moments(like) if whiten else None
        # Every tensor stays bound until the call returns: the extension sees addresses alone.
        rewards, values, mask, dones = (
            *map(b.as_grid, (rewards, values)),
            *map(_flags, (mask, dones)),
        )
        scores, logprobs, ref_logprobs = map(b.as_grid, (scores, logprobs, ref_logprobs))
        bootstrap_values, offsets = b.as_grid(bootstrap_values), b.as_grid(cu_seqlens)
        code, position = extension.gae(
            *b.grid(like.shape), sequences, b.pack(offsets), b.pack(rewards),
            b.pack(values), b.pack(mask), b.pack(dones), b.pack(bootstrap_values), b.pack(scores),
            b.pack(logprobs), b.pack(ref_logprobs), kl_coef,
            PLAIN_KL_ESTIMATORS.index(kl_estimator), 0.0 if reward_clip is None else reward_clip,
            gamma, lam, masked == "carry", whiten, b.pack(advantages), b.pack(returns),
            b.pack(shaped), b.pack(moments), scans.WHITEN_EPS,
            where(like, "gae", sequences, like.shape[-1], cu_seqlens is not None),
        )  # fmt: skip
        if code == b.BAD_OFFSETS:
            assert cu_seqlens is not None  # the kernel has read them
            raise checks.bad_offsets(op, position, cu_seqlens, like.shape[0])
        return results

    def gae(
        rewards: Tensor,
        values: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        dones: Tensor | None,
        bootstrap_values: Tensor | None,
        gamma: float,
        lam: float,
        masked: str,
        whiten: bool,
    ) -> tuple[Tensor, Tensor]:
        return scan(
            "gae", rewards, cu_seqlens, rewards=rewards, values=values, mask=mask, dones=dones,
            bootstrap_values=bootstrap_values, gamma=gamma, lam=lam, masked=masked, whiten=whiten,
        ).of_values()  # fmt: skip

    def discounted_returns(
        rewards: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        dones: Tensor | None,
        bootstrap_values: Tensor | None,
        gamma: float,
        masked: str,
    ) -> Tensor:
        return scan(
            "discounted_returns", rewards, cu_seqlens, rewards=rewards, mask=mask, dones=dones,
            bootstrap_values=bootstrap_values, gamma=gamma, masked=masked,
        ).returns  # fmt: skip

    def ppo_advantages(
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        return scan(
            "ppo_advantages", logprobs, cu_seqlens, scores=scores, logprobs=logprobs,
            ref_logprobs=ref_logprobs, values=values, mask=mask, kl_coef=kl_coef,
            kl_estimator=kl_estimator, reward_clip=reward_clip, gamma=gamma, lam=lam,
            masked=masked, whiten=whiten,
        ).of_scores()  # fmt: skip

    def whiten(
        x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
    ) -> Tensor:
        out = _fp32(x)
        if x.numel() == 0:
            return out
        moments = _moments(x)
        x, mask = b.as_grid(x), _flags(mask)
        extension.whiten(
            *b.grid(x.shape), b.pack(x), b.pack(mask), shift_mean, unbiased, eps, b.pack(moments),
            b.pack(out), where(x),
        )  # fmt: skip
        return out

    def group_advantages(
        rewards: Tensor,
        group_ids: Tensor | None,
        group_size: int,
        baseline: str,
        scale: str,
        greedy_rewards: Tensor | None,
        eps: float,
    ) -> Tensor:
        out = _fp32(rewards)
        if rewards.numel() == 0:
            return out
        sorted_ids = order = None
        if group_ids is not None:
            sorted_ids, order = group_ids.long().sort(stable=True)
        work = _workspace(rewards.numel(), torch.float64, rewards) if gpu else None
        rewards, greedy_rewards = b.as_grid(rewards), b.as_grid(greedy_rewards)
        code, _ = extension.group_advantages(
            rewards.numel(), b.pack(rewards), b.pack(greedy_rewards), b.pack(order),
            b.pack(sorted_ids), group_size, BASELINES.index(baseline), SCALES.index(scale), eps,
            b.pack(work), b.pack(out), where(rewards),
        )  # fmt: skip
        if code == b.OUT_OF_MEMORY:
            raise MemoryError(f"group_advantages: no memory for {rewards.numel()} rewards in fp64")
        return out

    return {
        "gae": gae,
        "discounted_returns": discounted_returns,
        "ppo_advantages": ppo_advantages,
        "group_advantages": group_advantages,
        "whiten": whiten,
    }
