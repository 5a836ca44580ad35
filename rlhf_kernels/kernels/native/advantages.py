"""Launchers of the advantage operations for the native backends."""

from types import ModuleType

from torch import Tensor

from ...config.enums import BASELINES, PLAIN_KL_ESTIMATORS, SCALES
from .. import advantages
from ..advantages import GeneralScan, Groups, Scan, ScanResults, Whitening
from . import boundary as b
from ._tokens import flags, raise_status


def _scratch_of(scan: Scan | GeneralScan) -> tuple[int, int, bool, bool]:
    """Sequences, the last dimension, whether they are packed, whether to whiten."""
    tokens, cu_seqlens = scan.tokens, scan.cu_seqlens
    if cu_seqlens is None:
        return tokens.shape[0], tokens.shape[1], False, scan.whiten
    return cu_seqlens.shape[0] - 1, tokens.shape[0], True, scan.whiten


class _Launch:
    """The kernels of an extension module."""

    def __init__(self, extension: ModuleType) -> None:
        self._extension, self._make_exec = extension, b.exec_builder(extension)

    def scan(self, scan: Scan, results: ScanResults) -> None:
        tokens = scan.tokens
        rewards, logprobs = (tokens, None) if scan.scores is None else (None, tokens)
        status = self._extension.gae(
            scan.cu_seqlens,
            rewards,
            scan.values,
            flags(scan.mask),
            flags(scan.dones),
            scan.bootstrap_values,
            scan.scores,
            logprobs,
            scan.ref_logprobs,
            scan.kl_coef,
            PLAIN_KL_ESTIMATORS.index(scan.kl_estimator),
            scan.reward_clip or 0.0,
            scan.gamma,
            scan.lam,
            scan.masked == "carry",
            scan.whiten,
            *results,
            advantages.WHITEN_EPS,
            self._make_exec(tokens, "gae", lambda: _scratch_of(scan)),
        )
        if status[0] != b.OK:
            raise_status(scan.op, status, scan.cu_seqlens, tokens)

    def general(self, op: str, scan: GeneralScan, sequences: int, results: ScanResults) -> None:
        tokens = scan.tokens
        rewards, logprobs = (tokens, None) if scan.scores is None else (None, tokens)
        of_gamma, of_lam, of_value_lam = scan.rates_per_step(sequences)
        status = self._extension.general_gae(
            scan.cu_seqlens,
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
            scan.reward_clip or 0.0,
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
            advantages.WHITEN_EPS,
            self._make_exec(tokens, "general_gae", lambda: _scratch_of(scan)),
        )
        if status[0] != b.OK:
            raise_status(op, status, scan.cu_seqlens, tokens)

    def groups(self, groups: Groups, out: Tensor) -> None:
        rewards = groups.rewards
        status = self._extension.group_advantages(
            rewards.numel(),
            rewards,
            groups.greedy_rewards,
            groups.order,
            groups.sorted_ids,
            groups.size,
            BASELINES.index(groups.baseline),
            SCALES.index(groups.scale),
            groups.eps,
            out,
            self._make_exec(
                rewards, "group_advantages", lambda: (rewards.numel(), groups.scale == "batch")
            ),
        )
        if status[0] == b.OUT_OF_MEMORY:
            raise MemoryError(f"group_advantages: no memory for {rewards.numel()} rewards in fp64")

    def whiten(self, whitening: Whitening, out: Tensor) -> None:
        x, mask, *rules = whitening
        make_exec = self._make_exec(x, "whiten", lambda: (x.numel(),))
        raise_status(
            "whiten", self._extension.whiten(x, flags(mask), *rules, out, make_exec), None, x
        )


def launchers(extension: ModuleType) -> advantages.Launchers:
    """Launchers bound to an extension module."""
    launch = _Launch(extension)
    kernels = (launch.scan, launch.general, launch.groups, launch.whiten)
    # Where rewards stand alone, a warp takes 32.
    alone = 32 if extension.gpu else 1
    return advantages.launchers(advantages.Kernels(*kernels, alone, extension.gpu))
