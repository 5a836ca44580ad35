"""Options of rows of logits, shared by every operation that reads a vocabulary.

A new option is added here, in the public functions, and once per backend where it changes a logit:
reference/_common.py, csrc/cpu/rows.h, csrc/cuda/rows.cuh, kernels/triton/_rows.py. Its C++ field is
in csrc/abi_rows.h and is filled in csrc/bind/tensor.h. All other code passes the options on as one
object.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, option_checks, sentinels, temperature_rules
from .option_checks import shown


class RowOptions(NamedTuple):
    """Options as operators, the head and launchers take them.

    `ops._operator` flattens the fields into a schema in this order.

    temperature: of all tokens; 1 where each token has its own.
    softcap: c of c tanh(x / c), 0 for none.
    entropy: whether to compute entropies.
    ignore_index: label of tokens to skip.
    lse: whether the log-sum-exp is wanted. It is computed from the statistics, not by kernels.
    collision: whether the sum of the squared probabilities is wanted.
    argmax: whether the most likely token is wanted.
    """

    temperature: float
    softcap: float
    entropy: bool
    ignore_index: int
    lse: bool = False
    collision: bool = False
    argmax: bool = False


class RowResults(NamedTuple):
    """Results of `token_logprobs` per token [...]; None where the options do not ask for one.

    The log-probabilities have the shape of the labels, which may be [..., K].
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    collision: Tensor | None = None
    lse: Tensor | None = None
    argmax: Tensor | None = None


class RowArguments(NamedTuple):
    """Options as a caller passes them, checked. The temperature may be a tensor, one per token.

    `for_kernels` is what `split` gives kernels; `checked` fills it in where no option is a tensor,
    and remembers it with the rest.
    """

    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    entropy: bool
    ignore_index: int
    lse: bool = False
    collision: bool = False
    argmax: bool = False
    for_kernels: RowOptions | None = None

    def of_head(self) -> dict[str, Any]:
        """Keyword arguments for a reference over a head."""
        return self._without("for_kernels")

    def of_logits(self) -> dict[str, Any]:
        """Keyword arguments for a reference over logits, which takes no logit_scale."""
        return self._without("for_kernels", "logit_scale")

    def of_policy_loss(self) -> dict[str, Any]:
        """Keyword arguments for the reference of a loss, which skips tokens by its mask."""
        results = ("entropy", "lse", "collision", "argmax")
        return self._without("for_kernels", "ignore_index", *results)

    def _without(self, *others: str) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if k not in others}

    def effective_temperature(self) -> float | Tensor:
        """The temperature to apply to unscaled logits, temperature / logit_scale."""
        if isinstance(self.temperature, Tensor):
            return temperature_rules.scaled(self.temperature, self.logit_scale)
        return self.temperature / self.logit_scale

    def split(self) -> tuple[Tensor | None, RowOptions]:
        """(temperatures per token or None, options of all tokens).

        scale * x under a cap c and a temperature T is x under c / scale and T / scale.
        """
        if self.for_kernels is not None:
            return None, self.for_kernels
        temperature = self.effective_temperature()
        of_tokens = temperature if isinstance(temperature, Tensor) else None
        return of_tokens, RowOptions(
            temperature=1.0 if isinstance(temperature, Tensor) else temperature,
            softcap=0.0 if self.softcap is None else self.softcap / self.logit_scale,
            entropy=self.entropy,
            ignore_index=self.ignore_index,
            lse=self.lse,
            collision=self.collision,
            argmax=self.argmax,
        )


def checked(
    op: str,
    labels: Any,
    name: str,
    rows: Tensor,
    *,
    temperature: object,
    softcap: object,
    logit_scale: object = 1.0,
    entropy: object = False,
    ignore_index: object = -100,
    lse: object = False,
    collision: object = False,
    argmax: object = False,
    fit: bool = False,
    several: bool = False,
) -> RowArguments:
    """Requires one label for each row of the argument `name` [..., H], and valid options.

    `fit`: whether `checks.plain` has found that rows and labels fit. `several`: labels with a
    dimension more, [..., K], are right too.

    Returns:
        The arguments. A temperature per token is expanded to the shape of the labels and detached.
    """
    if not fit:
        labels = checks.labels(op, "labels", labels)
        column = "V" if name == "logits" else "H"
        if several and labels.dim() == rows.dim():
            _check_several(op, labels, f"{name} [..., {column}]", rows)
        else:
            checks.same_shape(op, "labels", labels, f"{name} without {column}", rows.shape[:-1])
        checks.same_device(op, "labels", labels, name, rows.device)
    if isinstance(temperature, Tensor):
        temperature = _per_token(op, temperature, rows.shape[:-1], labels)
    results = (lse, collision, argmax)
    return _of_options(op, temperature, softcap, logit_scale, entropy, ignore_index, *results)


def _check_several(op: str, labels: Tensor, like: str, rows: Tensor) -> None:
    """Requires K labels [..., K] for each row of `rows`, the argument `like`, with K >= 1."""
    if labels.shape[:-1] != rows.shape[:-1] or labels.shape[-1] == 0:
        raise ValueError(
            f"{op}: labels must be [...] or [..., K], K >= 1 labels per token, for {like} of shape "
            f"{shown(rows.shape)}, got {shown(labels.shape)}"
        )


@option_checks.remembered
def _of_options(
    op: str,
    temperature: float | Tensor,
    softcap: object,
    logit_scale: object,
    entropy: object,
    ignore_index: object,
    lse: object,
    collision: object,
    argmax: object,
) -> RowArguments:
    if softcap is not None:
        softcap = option_checks.positive(op, "softcap", softcap)
    if not isinstance(temperature, Tensor):
        temperature = option_checks.positive(op, "temperature", temperature)
    arguments = RowArguments(
        temperature=temperature,
        softcap=softcap,
        logit_scale=option_checks.positive(op, "logit_scale", logit_scale),
        entropy=option_checks.flag(op, "entropy", entropy),
        ignore_index=option_checks.integer(op, "ignore_index", ignore_index),
        lse=option_checks.flag(op, "lse", lse),
        collision=option_checks.flag(op, "collision", collision),
        argmax=option_checks.flag(op, "argmax", argmax),
    )
    # Fields by name: torch.compile of torch 2.6 cannot slice a named tuple.
    rules = (arguments.temperature, arguments.softcap, arguments.logit_scale)
    temperature_rules.check(op, *rules)
    if arguments.ignore_index in (sentinels.ELSEWHERE, sentinels.SHARD_IGNORED):
        raise ValueError(
            f"{op}: ignore_index must not be {arguments.ignore_index}, which kernels reserve for "
            "sharded vocabularies"
        )
    temperatures, options = arguments.split()
    return arguments if temperatures is not None else arguments._replace(for_kernels=options)


def without_masked(
    op: str, labels: Tensor, mask: object, ignore_index: int, several: bool = False
) -> Tensor:
    """The labels [...] with `ignore_index` where the argument `mask` is zero; None keeps all.

    They are int64 if they could not be compared with `ignore_index` in their own dtype.
    `several`: the labels are [..., K], and the mask [...] is of tokens.
    """
    if not -(2**31) <= ignore_index < 2**31:  # int32 would truncate it to a valid label
        labels = labels.long()
    like, shape = "labels", labels.shape
    if several:
        like, shape = "labels without K", labels.shape[:-1]
    kept = checks.row_mask(op, mask, like, shape, labels.device)
    if kept is None:
        return labels
    kept = kept.unsqueeze(-1) if several else kept
    return labels.masked_fill(kept == 0, ignore_index)


def _per_token(op: str, value: Tensor, shape: torch.Size, labels: Tensor) -> Tensor:
    checks.floating(op, "temperature", value, double=True)
    checks.same_device(op, "temperature", value, "labels", labels.device)
    try:
        return value.detach().expand(shape)
    except RuntimeError:
        like = "labels" if labels.dim() == len(shape) else "labels without K"
        raise ValueError(
            f"{op}: temperature must broadcast to the shape of {like}, {shown(shape)}, "
            f"got {shown(value.shape)}"
        ) from None
