"""Shared by the native and Triton launchers of the advantage operations."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..core import data_checks, env
from ..core.layout import fp32_like
from .rows import Maybe

#: eps that `whiten=True` adds to the variance; the default of `whiten`, and of verl.
WHITEN_EPS = 1e-8


class ScanResults(NamedTuple):
    """Results of a scan, fp32 in the shape of its tokens.

    advantages: only for a scan with values.
    shaped: the shaped rewards, only for a scan with scores.
    """

    advantages: Tensor | None
    returns: Tensor
    shaped: Tensor | None

    def of_values(self) -> tuple[Tensor, Tensor]:
        """(advantages, returns) of a scan with values."""
        assert self.advantages is not None
        return self.advantages, self.returns

    def of_scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """(advantages, returns, shaped rewards) of a scan with values and scores."""
        assert self.shaped is not None
        return *self.of_values(), self.shaped


class Scan(NamedTuple):
    """The arguments of gae, discounted_returns or ppo_advantages.

    op: the operation, for messages.
    tokens: [B, T], or packed [N] with cu_seqlens: rewards; with scores log-probabilities.
    values: None for discounted_returns.
    scores to reward_clip: of ppo_advantages; scores are None for the others.
    """

    op: str
    tokens: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    masked: str
    gamma: float
    lam: float = 1.0
    values: Tensor | None = None
    dones: Tensor | None = None
    bootstrap_values: Tensor | None = None
    whiten: bool = False
    scores: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k1"
    reward_clip: float | None = None


class GeneralScan(NamedTuple):
    """The arguments of general_gae, for tokens [B, T], or packed [N] with cu_seqlens.

    tokens: rewards; with scores the policy's log-probabilities.
    cut_values: the values after truncated steps, in the shape of tokens.
    bootstrap_values: the value after the end of each sequence.
    scores to reward_clip: of ppo_advantages; scores are None for gae.
    gammas to value_lam: each rate is a number, or a tensor with one per sequence or one per token.
    decoupled: whether the returns have a lam of their own.
    """

    tokens: Tensor
    values: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    terminated: Tensor | None
    truncated: Tensor | None
    cut_values: Tensor | None
    bootstrap_values: Tensor | None
    scores: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float
    kl_estimator: str
    reward_clip: float | None
    gammas: Tensor | None
    gamma: float
    lams: Tensor | None
    lam: float
    value_lams: Tensor | None
    value_lam: float
    decoupled: bool
    masked: str
    whiten: bool

    def rates_per_step(self, sequences: int) -> tuple[bool, bool, bool]:
        """Whether gammas, lams and value_lams have one rate per token."""
        gammas, lams, value_lams = self.gammas, self.lams, self.value_lams
        return (
            gammas is not None and gammas.shape != (sequences,),
            lams is not None and lams.shape != (sequences,),
            value_lams is not None and value_lams.shape != (sequences,),
        )


class Groups(NamedTuple):
    """The arguments of group_advantages for rewards [B].

    sorted_ids, order: the group ids, and the indices of the rewards in their order; None where
        groups are runs of `size` rewards.
    size: 0 with sorted_ids. It need not divide B if rewards stand alone.
    """

    rewards: Tensor
    greedy_rewards: Tensor | None
    sorted_ids: Tensor | None
    order: Tensor | None
    size: int
    baseline: str
    scale: str
    eps: float


class Whitening(NamedTuple):
    """The arguments of whiten."""

    x: Tensor
    mask: Tensor | None
    shift_mean: bool
    unbiased: bool
    eps: float


class Kernels(NamedTuple):
    """The functions of a backend that launch its kernels, and write results that are allocated.

    general takes the number of sequences beside the arguments.
    alone: the size of groups where rewards stand alone.
    on_device: whether the kernels run on a GPU. Those on the host validate offsets themselves, so
        they must run even without tokens.
    """

    scan: Callable[[Scan, ScanResults], None]
    general: Callable[[str, GeneralScan, int, ScanResults], None]
    groups: Callable[[Groups, Tensor], None]
    whiten: Callable[[Whitening, Tensor], None]
    alone: int
    on_device: bool


def _begin(op: str, scan: Scan | GeneralScan, on_device: bool) -> tuple[ScanResults, bool]:
    """(uninitialised results of a scan, whether the kernel can be skipped).

    Raises:
        ValueError: bad offsets on a GPU with RLHF_KERNELS_CHECK=1.
    """
    cu_seqlens, returns = scan.cu_seqlens, fp32_like(scan.tokens)
    advantages = None if scan.values is None else torch.empty_like(returns)
    shaped = None if scan.scores is None else torch.empty_like(returns)
    results = ScanResults(advantages, returns, shaped)
    if on_device and env.CHECK:
        data_checks.offsets_valid(op, cu_seqlens, returns.shape[0])
    if returns.numel() == 0:
        return results, on_device or cu_seqlens is None
    if on_device and cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        # Without sequences, the offsets cannot end at the number of tokens. The host knows this.
        for t in results:
            if t is not None:
                t.fill_(float("nan"))
        return results, True
    return results, False


_General = Callable[[GeneralScan], tuple[Tensor, Tensor, Tensor]]


class Launchers(TypedDict, total=False):
    """By operator name, of all operations on advantages."""

    gae: Callable[
        [Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, float, float, str, bool], tuple[Tensor, Tensor]
    ]
    discounted_returns: Callable[[Tensor, Maybe, Maybe, Maybe, Maybe, float, str], Tensor]
    ppo_advantages: Callable[
        [Tensor, Tensor, Maybe, Tensor, Maybe, Maybe, float, str, float, float, str, bool,
         float | None], tuple[Tensor, Tensor, Tensor],
    ]  # fmt: skip
    general_gae: _General
    group_advantages: Callable[[Tensor, Maybe, int, str, str, Maybe, float], Tensor]
    whiten: Callable[[Tensor, Maybe, bool, bool, float], Tensor]


def launchers(kernels: Kernels) -> Launchers:
    """The launchers of all operations on advantages, from a backend's kernels."""
    on_device = kernels.on_device

    def scan(given: Scan) -> ScanResults:
        results, done = _begin(given.op, given, on_device)
        if not done:
            kernels.scan(given, results)
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
        tokens = ("gae", rewards, mask, cu_seqlens, masked, gamma, lam, values)
        return scan(Scan(*tokens, dones, bootstrap_values, whiten)).of_values()

    def discounted_returns(
        rewards: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        dones: Tensor | None,
        bootstrap_values: Tensor | None,
        gamma: float,
        masked: str,
    ) -> Tensor:
        tokens = ("discounted_returns", rewards, mask, cu_seqlens, masked, gamma)
        return scan(Scan(*tokens, dones=dones, bootstrap_values=bootstrap_values)).returns

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
        tokens = ("ppo_advantages", logprobs, mask, cu_seqlens, masked, gamma, lam, values)
        shaping = (scores, ref_logprobs, kl_coef, kl_estimator, reward_clip)
        return scan(Scan(*tokens, None, None, whiten, *shaping)).of_scores()

    def general_gae(given: GeneralScan) -> tuple[Tensor, Tensor, Tensor]:
        tokens, cu_seqlens = given.tokens, given.cu_seqlens
        op = "gae" if given.scores is None else "ppo_advantages"
        results, done = _begin(op, given, on_device)
        if not done:
            sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            kernels.general(op, given, sequences, results)
        advantages, returns = results.of_values()
        shaped = results.shaped
        return advantages, returns, returns.new_empty(0) if shaped is None else shaped

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
        if baseline in ("none", "greedy") and scale != "group":
            # Every reward stands alone: any grouping gives the same.
            group_ids, group_size = None, kernels.alone
        if group_ids is not None:
            sorted_ids, order = group_ids.long().sort(stable=True)
        of_groups = (sorted_ids, order, group_size, baseline, scale, float(eps))
        kernels.groups(Groups(rewards, greedy_rewards, *of_groups), out)
        return out

    def whiten(
        x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
    ) -> Tensor:
        out = fp32_like(x)
        if x.numel() > 0:
            kernels.whiten(Whitening(x, mask, shift_mean, unbiased, float(eps)), out)
        return out

    return {
        "gae": gae,
        "discounted_returns": discounted_returns,
        "ppo_advantages": ppo_advantages,
        "general_gae": general_gae,
        "group_advantages": group_advantages,
        "whiten": whiten,
    }
