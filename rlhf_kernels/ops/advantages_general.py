"""gae and ppo_advantages with rates as tensors, truncated steps, or a lam of the returns alone.

They have an operator and kernels of their own, so that calls without these options cost what they
always did.
"""

from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .. import reference
from ..core import checks, data_checks, option_checks
from ..core.layout import constant, fp32_like
from ..core.option_checks import shown
from ..kernels import backends
from ..kernels.advantages import GeneralScan
from ..reference.advantages import Cuts
from ._operator import define

#: A rate: a number, one per sequence, or one per step.
Rate: TypeAlias = float | Tensor


@define("general_gae")
def _general_gae(scan: GeneralScan, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    like = scan.tokens
    rest = like.new_empty(0, dtype=torch.float32) if scan.scores is None else fp32_like(like)
    return fp32_like(like), fp32_like(like), rest


class Shaping(NamedTuple):
    """What ppo_advantages makes its rewards of, besides the log-probabilities."""

    scores: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float
    kl_estimator: str
    reward_clip: float | None


_NO_SHAPING = Shaping(None, None, 0.0, "k1", None)


def _is_tensor(rate: object) -> bool:
    """Whether a rate is no number; a 0-d tensor is one."""
    return isinstance(rate, Tensor) and rate.dim() > 0


def _is_plain(t: object) -> TypeGuard[Tensor]:
    """Whether `t` is a tensor that has a shape."""
    return isinstance(t, Tensor) and not t.is_nested


def needed(
    gamma: object,
    lam: object,
    value_lam: object,
    truncated: object,
    bootstrap_values: object,
    like: object,
    cu_seqlens: object,
) -> bool:
    """Whether a call needs the operator of this module."""
    if truncated is not None or value_lam is not None or _is_tensor(gamma) or _is_tensor(lam):
        return True
    if not _is_plain(bootstrap_values) or not _is_plain(like):
        return False
    if bootstrap_values.shape != like.shape:
        return False
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
        return True
    return bootstrap_values.shape[0] != cu_seqlens.shape[0] - 1


def the_ends(
    op: str, dones: Tensor | None, terminated: Tensor | None, truncated: Tensor | None
) -> tuple[str, Tensor | None]:
    """(name, flags) of the terminated steps.

    Raises:
        ValueError: dones together with one of the others.
    """
    if dones is None:
        return "terminated", terminated
    if terminated is not None or truncated is not None:
        raise ValueError(
            f"{op}: dones are the terminated steps; beside terminated or truncated they must be "
            "None, and terminated = done & ~truncated"
        )
    return "dones", dones


class Ends(NamedTuple):
    """How the steps of a call end: checked flags, and bootstrap_values as the caller gave them."""

    terminated: Tensor | None
    truncated: Tensor | None
    bootstrap_values: object


class Tokens(NamedTuple):
    """The tokens of a call, checked.

    name: of the argument `first`: rewards, or with `Shaping` log-probabilities.
    first: [B, T] or packed [N]; values and mask have its shape.
    """

    name: str
    first: Tensor
    values: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    masked: str

    @property
    def sequences(self) -> int:
        if self.cu_seqlens is None:
            return self.first.shape[0]
        return self.cu_seqlens.shape[0] - 1

    def per_sequence(self, x: Tensor) -> bool:
        """Whether a checked tensor has one entry per sequence, not one per token."""
        return x.dim() == 1 and x.shape[0] == self.sequences

    def keep(self) -> Tensor:
        """The mask as bool."""
        if self.mask is None:
            return torch.ones_like(self.first, dtype=torch.bool)
        return self.mask != 0

    def spread(self, x: Tensor) -> Tensor:
        """One entry per sequence as one per token; a tensor per token unchanged."""
        if not self.per_sequence(x):
            return x
        if self.cu_seqlens is None:
            return x.unsqueeze(-1).expand(self.first.shape)
        tokens = torch.arange(self.first.shape[0], device=x.device)
        ids = torch.searchsorted(self.cu_seqlens[1:].contiguous(), tokens, right=True)
        # Without sequences there is no entry to take, and with bad offsets no right one.
        return x[ids.clamp(max=max(self.sequences - 1, 0))] if self.sequences else x.new_zeros(0)

    def last(self, keep: Tensor) -> Tensor:
        """The position of the last kept token of each sequence, -1 if it has none; flat if packed.

        Bad offsets give positions without meaning, but none out of range.
        """
        total = self.first.shape[-1]
        places = torch.where(keep, torch.arange(total, device=keep.device), -1)
        if self.cu_seqlens is None:
            return places.amax(1) if total else places.new_full((self.sequences,), -1)
        if not total:
            return places.new_full((self.sequences,), -1)
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        found = places.cummax(0).values[(ends - 1).clamp(0, total - 1)]
        return torch.where((found >= starts) & (ends > starts), found, -1)


def _shaped(op: str, name: str, value: object, tokens: Tokens) -> Tensor:
    """A tensor of real numbers, one per sequence or one per token."""
    found = constant(checks.real(op, name, value))
    if not tokens.per_sequence(found) and found.shape != tokens.first.shape:
        raise ValueError(
            f"{op}: {name} must have one entry per sequence, ({shown(tokens.sequences)},), or the "
            f"shape of {tokens.name}, {shown(tokens.first.shape)}, got {shown(found.shape)}"
        )
    checks.same_device(op, name, found, tokens.name, tokens.first.device)
    return found


def _rate(op: str, name: str, value: object, tokens: Tokens) -> Rate:
    """A checked rate; the values of a tensor are checked where the host may read them."""
    if not _is_tensor(value):
        return option_checks.rate(op, name, value)
    found = _shaped(op, name, value, tokens)
    if data_checks.can_read_on_host(found):
        bad = ~((found >= 0) & (found <= 1))
        if bad.any():
            used = tokens.keep() if tokens.masked == "carry" else torch.ones_like(tokens.keep())
            bad = tokens.spread(bad) & used
        if bad.any():
            at = int(bad.reshape(-1).nonzero()[0])
            raise ValueError(
                f"{op}: {name} must be in [0, 1], got {tokens.spread(found).reshape(-1)[at].item()}"
                f" at the token of flat position {at}"
            )
    return found


def _split(rate: Rate) -> tuple[Tensor | None, float]:
    """A rate as kernels take it: (tensor, 0), or (None, number)."""
    return (rate, 0.0) if isinstance(rate, Tensor) else (None, rate)


def _ends(op: str, ends: Ends, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """(values after truncated steps in the shape of tokens, value after each sequence's end)."""
    _, truncated, bootstrap_values = ends
    if bootstrap_values is None:
        if truncated is not None:
            raise ValueError(f"{op}: truncated steps need bootstrap_values")
        return None, None
    found = _shaped(op, "bootstrap_values", bootstrap_values, tokens)
    keep = tokens.keep()
    if tokens.per_sequence(found):
        if truncated is None:
            return None, found
        if data_checks.can_read_on_host(truncated):
            place = torch.arange(keep.shape[-1], device=keep.device)
            early = (truncated != 0) & keep & (place < tokens.spread(tokens.last(keep)))
            if early.any():
                raise ValueError(
                    f"{op}: bootstrap_values must have the shape of {tokens.name} where a step "
                    "before the end of its sequence is truncated, flat position "
                    f"{int(early.reshape(-1).nonzero()[0])} here"
                )
        return tokens.spread(found), found
    if not keep.shape[-1]:
        return found, found.new_zeros(tokens.sequences)
    last = tokens.last(keep)
    if tokens.masked == "zero":
        # A masked step at the end has the value 0, and so has what follows it.
        end = tokens.last(torch.ones_like(keep))
        last = torch.where(last == end, last, -1)
    at = last.clamp(min=0)
    after = found[at] if found.dim() == 1 else found.gather(1, at.unsqueeze(-1)).squeeze(-1)
    return (None if truncated is None else found), torch.where(last < 0, 0, after)


def scan(
    op: str,
    tokens: Tokens,
    ends: Ends,
    rates: tuple[object, object, object],
    whiten: bool,
    shaping: Shaping = _NO_SHAPING,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, shaped rewards or a tensor without elements).

    Args:
        op: the operation, for messages.
        tokens: checked.
        ends: of the steps.
        rates: gamma, lam and value_lam as the caller of `op` gave them; value_lam None for lam.
        whiten: checked option.
        shaping: of ppo_advantages.
    """
    _, first, values, mask, cu_seqlens, masked = tokens
    backend = backends.select(op, first.device)
    if backend == backends.REFERENCE or data_checks.can_read_on_host(first):
        # What follows indexes with the offsets; a kernel would find bad ones too late.
        data_checks.offsets_valid(op, cu_seqlens, first.shape[0])
    gamma, lam = _rate(op, "gamma", rates[0], tokens), _rate(op, "lam", rates[1], tokens)
    value_lam = None if rates[2] is None else _rate(op, "value_lam", rates[2], tokens)
    cut_values, end = _ends(op, ends, tokens)
    terminated, truncated, _ = ends
    scores, ref_logprobs, kl_coef, kl_estimator, reward_clip = shaping
    if backend == backends.REFERENCE:
        cuts = None
        if truncated is not None:
            assert cut_values is not None
            cuts = Cuts(truncated, cut_values)
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "dones": terminated,
            "bootstrap_values": end,
            "gamma": gamma,
            "lam": lam,
            "masked": masked,
            "whiten": whiten,
            "cuts": cuts,
            "value_lam": value_lam,
        }
        if scores is None:
            found = reference.gae(first, values, mask=mask, **options)
            return *found, found[0].new_empty(0)
        options |= {"kl_coef": kl_coef, "kl_estimator": kl_estimator, "reward_clip": reward_clip}
        return reference.ppo_advantages(scores, first, ref_logprobs, values, mask, **options)
    of_returns = lam if value_lam is None else value_lam
    (gammas, gamma), (lams, lam), (value_lams, of_returns) = map(_split, (gamma, lam, of_returns))
    checks.not_double(
        op,
        **{tokens.name: first},
        values=values,
        bootstrap_values=end,
        gamma=gammas,
        lam=lams,
        value_lam=value_lams,
        scores=scores,
        ref_logprobs=ref_logprobs,
    )
    wanted = GeneralScan(
        first,
        values,
        mask,
        cu_seqlens,
        terminated,
        truncated,
        cut_values,
        end,
        scores,
        ref_logprobs,
        kl_coef,
        kl_estimator,
        reward_clip,
        gammas,
        gamma,
        lams,
        lam,
        value_lams,
        of_returns,
        value_lam is not None,
        masked,
        whiten,
    )
    return _general_gae(wanted, backend)
