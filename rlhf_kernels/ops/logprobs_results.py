"""Results of token_logprobs and linear_token_logprobs: those that the options ask for, by name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.layout import any_of_token
from ..core.row_options import RowOptions, RowResults
from ..kernels.rows import LabelResults


def _log_sum_exp(
    labels: Tensor, temperatures: Tensor | None, stats: Tensor, options: RowOptions
) -> Tensor:
    """log sum_j exp(z_j) of rows [...], fp32, from their statistics [..., 3]; 0 where ignored."""
    # m / T may be far above log s, which fp32 would lose beside it.
    m, s, _ = stats.double().unbind(-1)
    scaled = m / (options.temperature if temperatures is None else temperatures.float().double())
    keep = any_of_token(labels != options.ignore_index, scaled.dim())
    return torch.where(keep, scaled + s.log(), 0.0).float()


def asked_for(
    options: RowOptions, labels: Tensor, temperatures: Tensor | None, results: LabelResults
) -> tuple[Tensor | None, ...]:
    """The results that the options ask for, of what an operator returns, in the order of fields."""
    found: tuple[Tensor | None, ...] = (results.logprobs,)
    if options.entropy:
        found = (*found, results.entropy)
    if options.collision:
        found = (*found, results.collision)
    if options.lse:
        found = (*found, _log_sum_exp(labels, temperatures, results.stats, options))
    return (*found, results.argmax) if options.argmax else found


def by_name(options: RowOptions, found: Sequence[Any]) -> RowResults:
    """Results that the options ask for, or their gradients, with None for the others."""
    if not (options.collision or options.lse or options.argmax):
        return RowResults(*found)
    logprobs, *rest = found
    wanted = (options.entropy, options.collision, options.lse, options.argmax)
    named = []
    for given in wanted:
        named.append(rest.pop(0) if given else None)
    return RowResults(logprobs, *named)


class TokenLogprobs(NamedTuple):
    """Result of `token_logprobs` and `linear_token_logprobs` without entropy.

    Any: what is not asked for is None, which a type checker knows of the entropy alone.
    """

    logprobs: Tensor
    entropy: None = None
    collision: Tensor | Any = None
    lse: Tensor | Any = None
    argmax: Tensor | Any = None


class TokenLogprobsEntropy(NamedTuple):
    """Result of `token_logprobs` and `linear_token_logprobs` with `entropy=True`."""

    logprobs: Tensor
    entropy: Tensor
    collision: Tensor | Any = None
    lse: Tensor | Any = None
    argmax: Tensor | Any = None


def named_result(
    logprobs: Tensor, entropy: Tensor | None = None, *further: Tensor | None
) -> TokenLogprobs | TokenLogprobsEntropy:
    """The public result for the tensors that an implementation returns."""
    if entropy is None:
        return TokenLogprobs(logprobs, None, *further)
    return TokenLogprobsEntropy(logprobs, entropy, *further)


def named_results(
    options: RowOptions, found: Sequence[Any]
) -> TokenLogprobs | TokenLogprobsEntropy:
    """The public result for the results that the options ask for."""
    # By far the most frequent; half a microsecond less.
    if len(found) == 1:
        return TokenLogprobs(found[0])
    return named_result(*by_name(options, found))
