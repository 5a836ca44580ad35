"""Shared by the native and Triton launchers of gae, discounted_returns and ppo_advantages."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypedDict

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


def begin(
    op: str,
    like: Tensor,
    cu_seqlens: Tensor | None,
    values: Tensor | None,
    scores: Tensor | None,
    on_device: bool,
) -> tuple[ScanResults, bool]:
    """(uninitialised results of a scan over tokens `like`, whether the kernel can be skipped).

    Args:
        op: the operation, for messages.
        like: [B, T], or packed [N] with cu_seqlens.
        cu_seqlens: offsets.
        values: given if the scan has advantages.
        scores: given if the scan has shaped rewards.
        on_device: whether the kernel runs on a GPU. A kernel on the host validates the offsets
            itself, so it must run even without tokens.

    Raises:
        ValueError: bad offsets on a GPU with RLHF_KERNELS_CHECK=1.
    """
    returns = fp32_like(like)
    advantages = None if values is None else torch.empty_like(returns)
    results = ScanResults(
        advantages, returns, None if scores is None else torch.empty_like(returns)
    )
    if on_device and env.CHECK:
        data_checks.offsets_valid(op, cu_seqlens, like.shape[0])
    if like.numel() == 0:
        return results, on_device or cu_seqlens is None
    if on_device and cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        # Without sequences, the offsets cannot end at the number of tokens. The host knows this.
        for t in results:
            if t is not None:
                t.fill_(float("nan"))
        return results, True
    return results, False


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


class Scan(Protocol):
    """The scan function of a backend, of tokens: rewards; with scores log-probabilities."""

    def __call__(
        self, op: str, tokens: Tensor, cu_seqlens: Maybe, mask: Maybe, masked: str, gamma: float,
        lam: float = ..., values: Maybe = ..., dones: Maybe = ..., bootstrap_values: Maybe = ...,
        whiten: bool = ..., scores: Maybe = ..., ref_logprobs: Maybe = ..., kl_coef: float = ...,
        kl_estimator: str = ..., reward_clip: float | None = ...,
    ) -> ScanResults: ...  # fmt: skip


def general_launcher(
    run: Callable[[str, GeneralScan, int, ScanResults], None], on_device: bool
) -> _General:
    """The launcher of general_gae, from the function of a backend that launches its kernel.

    `run` takes the operation's name, a `GeneralScan`, the number of sequences, and the results that
    it writes. `on_device` is as in `begin`.
    """

    def general_gae(scan: GeneralScan) -> tuple[Tensor, Tensor, Tensor]:
        tokens, cu_seqlens, scores = scan.tokens, scan.cu_seqlens, scan.scores
        op = "gae" if scores is None else "ppo_advantages"
        results, done = begin(op, tokens, cu_seqlens, scan.values, scores, on_device)
        if not done:
            sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            run(op, scan, sequences, results)
        advantages, returns, shaped = results
        assert advantages is not None  # a scan with values
        return advantages, returns, returns.new_empty(0) if shaped is None else shaped

    return general_gae


def launchers(scan: Scan) -> Launchers:
    """Launchers of gae, discounted_returns and ppo_advantages from a backend's scan function."""

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
            "gae", rewards, cu_seqlens, mask, masked, gamma, lam, values, dones, bootstrap_values,
            whiten,
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
        tokens = ("discounted_returns", rewards, cu_seqlens, mask, masked, gamma)
        return scan(*tokens, dones=dones, bootstrap_values=bootstrap_values).returns

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
            "ppo_advantages", logprobs, cu_seqlens, mask, masked, gamma, lam, values, None, None,
            whiten, scores, ref_logprobs, kl_coef, kl_estimator, reward_clip,
        ).of_scores()  # fmt: skip

    return {"gae": gae, "discounted_returns": discounted_returns, "ppo_advantages": ppo_advantages}
