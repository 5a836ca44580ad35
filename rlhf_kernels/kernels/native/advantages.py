"""Launchers of the advantage operations for the native backends."""

from types import ModuleType

import torch
from torch import Tensor

from ...config.enums import BASELINES, PLAIN_KL_ESTIMATORS, SCALES
from ...core.layout import fp32_like
from .. import advantages
from . import boundary as b
from ._tokens import flags, raise_status

# csrc/abi_advantages.h: GaeArgs. The workspace holds three doubles per chunk, and three more on a
# GPU.
_CHUNK_TOKENS = 2048


def _workspace(size: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)


def _moments(tokens: Tensor) -> Tensor:
    return _workspace(3 * (tokens.numel() // _CHUNK_TOKENS + 2), torch.float64, tokens)


def _scratch_of(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, bool]:
    """Arguments of gae_scratch: sequences, the last dimension, whether they are packed."""
    if cu_seqlens is None:
        return tokens.shape[0], tokens.shape[1], False
    return cu_seqlens.shape[0] - 1, tokens.shape[0], True


def launchers(extension: ModuleType) -> advantages.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def scan(
        op: str,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        masked: str,
        gamma: float,
        lam: float = 1.0,
        values: Tensor | None = None,
        dones: Tensor | None = None,
        bootstrap_values: Tensor | None = None,
        whiten: bool = False,
        scores: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k1",
        reward_clip: float | None = None,
    ) -> advantages.ScanResults:
        results, done = advantages.begin(op, tokens, cu_seqlens, values, scores, gpu)
        if done:
            return results
        moments = _moments(tokens) if whiten else None
        rewards, logprobs = (tokens, None) if scores is None else (None, tokens)
        status = extension.gae(
            cu_seqlens,
            rewards,
            values,
            flags(mask),
            flags(dones),
            bootstrap_values,
            scores,
            logprobs,
            ref_logprobs,
            kl_coef,
            PLAIN_KL_ESTIMATORS.index(kl_estimator),
            0.0 if reward_clip is None else reward_clip,
            gamma,
            lam,
            masked == "carry",
            whiten,
            *results,
            moments,
            advantages.WHITEN_EPS,
            make_exec(tokens, "gae", lambda: _scratch_of(tokens, cu_seqlens)),
        )
        if status[0] != b.OK:
            raise_status(op, status, cu_seqlens, tokens)
        return results

    def general(
        op: str, scan: advantages.GeneralScan, sequences: int, results: advantages.ScanResults
    ) -> None:
        tokens, cu_seqlens = scan.tokens, scan.cu_seqlens
        rewards, logprobs = (tokens, None) if scan.scores is None else (None, tokens)
        of_gamma, of_lam, of_value_lam = scan.rates_per_step(sequences)
        status = extension.general_gae(
            cu_seqlens,
            rewards,
            scan.values,
            flags(scan.mask),
            flags(scan.terminated),
            flags(scan.truncated),
            scan.cut_values,
            scan.bootstrap_values,
            scan.scores,
            logprobs,
            scan.ref_logprobs,
            scan.kl_coef,
            PLAIN_KL_ESTIMATORS.index(scan.kl_estimator),
            0.0 if scan.reward_clip is None else scan.reward_clip,
            scan.gammas,
            scan.gamma,
            of_gamma,
            scan.lams,
            scan.lam,
            of_lam,
            scan.value_lams,
            scan.value_lam,
            of_value_lam,
            scan.decoupled,
            scan.masked == "carry",
            scan.whiten,
            *results,
            _moments(tokens) if scan.whiten else None,
            advantages.WHITEN_EPS,
            make_exec(tokens, "general_gae", lambda: (cu_seqlens is not None,)),
        )
        if status[0] != b.OK:
            raise_status(op, status, cu_seqlens, tokens)

    def whiten(
        x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
    ) -> Tensor:
        out = fp32_like(x)
        if x.numel() == 0:
            return out
        moments = _moments(x)
        extension.whiten(x, flags(mask), shift_mean, unbiased, eps, moments, out, make_exec(x))
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
        out = fp32_like(rewards)
        if rewards.numel() == 0:
            return out
        sorted_ids = order = None
        if group_ids is not None:
            sorted_ids, order = group_ids.long().sort(stable=True)
        work = _workspace(rewards.numel(), torch.float64, rewards) if gpu else None
        code, _ = extension.group_advantages(
            rewards.numel(),
            rewards,
            greedy_rewards,
            order,
            sorted_ids,
            group_size,
            BASELINES.index(baseline),
            SCALES.index(scale),
            eps,
            work,
            out,
            make_exec(rewards),
        )
        if code == b.OUT_OF_MEMORY:
            raise MemoryError(f"group_advantages: no memory for {rewards.numel()} rewards in fp64")
        return out

    return {
        **advantages.launchers(scan),
        "general_gae": advantages.general_launcher(general, gpu),
        "group_advantages": group_advantages,
        "whiten": whiten,
    }
