"""Launchers of the fused head's operators over any backend's row kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core import checks
from . import policy
from .chunks import (
    Chunk,
    Empty,
    Gradients,
    Head,
    Launchers,
    Reduce,
    Tile,
    flat,
    localized,
    plain_empty,
    select,
)


def launchers(
    rows: Launchers, empty: Empty = plain_empty, reduce: Reduce | None = None
) -> dict[str, Callable[..., object]]:
    """Launchers of the head's operators over a backend's row kernels.

    Args:
        rows: the row kernels.
        empty: makes large buffers.
        reduce: see `Gradients`.
    """
    if "token_logprobs" not in rows:
        return {}

    def linear_token_logprobs(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = labels.shape
        labels, temperatures = flat(labels), flat(temperatures)
        keep = labels != ignore_index
        # The labels of a shard were found good before.
        if reduce is None:
            checks.token_data("linear_token_logprobs", labels, temperatures, keep, weight.shape[0])
        logprobs = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs) if entropy else logprobs.new_empty(0)
        stats = logprobs.new_empty((*labels.shape, 3))
        tokens = select(keep)
        of_chunk = Chunk.of(chunk, weight)
        head = Head.of(hidden, weight, bias, of_chunk, tokens.count, empty)
        for part in tokens.chunks(of_chunk.size):
            logits = head.project(head.states(tokens, part))
            own = tokens.take(labels, part), tokens.take(temperatures, part)
            lp, h, s = rows["token_logprobs"](
                logits, *own, temperature, softcap, entropy, ignore_index
            )
            tokens.put(logprobs, part, lp)
            tokens.put(stats, part, s)
            if entropy:
                tokens.put(entropies, part, h)
        return (
            logprobs.view(shape),
            entropies.view(shape) if entropy else entropies,
            stats.view(*shape, 3),
        )

    def linear_token_logprobs_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        temperature: float,
        softcap: float,
        ignore_index: int,
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, temperatures = flat(labels), flat(temperatures)
        g, h, stats = flat(grad_logprobs), flat(grad_entropy), stats.view(-1, 3)
        # A token without an upstream gradient adds nothing: clipped, no advantage, prompt, tool.
        used = torch.zeros_like(labels, dtype=torch.bool)
        for upstream in (g, h):
            if upstream is not None:
                used |= upstream != 0
        tokens = select(used & (labels != ignore_index))
        of_chunk = Chunk.backward(chunk, weight, tokens.count)
        head = Head.of(hidden, weight, bias, of_chunk, tokens.count, empty)
        gradients = Gradients(head, *needs, reduce)

        def backward(logits: Tensor, tile: Tile) -> None:
            own, *rest = (tokens.take(t, tile.tokens) for t in (labels, temperatures, stats, g, h))
            own, ignored = localized(own, tile.words, weight.shape[0], ignore_index)
            rows["token_logprobs_backward_inplace"](
                logits, own, *rest, temperature, softcap, ignored
            )

        gradients.sweep(tokens, of_chunk, backward)
        return gradients.results(hidden.shape)

    def linear_kl_divergence(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        reverse: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        shape = hidden.shape[:-1]
        kl = torch.zeros(shape, dtype=torch.float32, device=hidden.device).view(-1)
        stats = kl.new_empty((*kl.shape, 5))
        tokens = select(torch.ones_like(kl, dtype=torch.bool) if mask is None else flat(mask) != 0)
        of_chunk = Chunk.of(chunk, weight, heads=2)
        head = Head.of(hidden, weight, bias, of_chunk, tokens.count, empty)
        ref = Head.of(ref_hidden, ref_weight, ref_bias, of_chunk, tokens.count, empty)
        for part in tokens.chunks(of_chunk.size):
            logits = head.project(head.states(tokens, part))
            ref_logits = ref.project(ref.states(tokens, part))
            divergence, s = rows["kl_divergence"](logits, ref_logits, temperature, reverse)
            tokens.put(kl, part, divergence)
            tokens.put(stats, part, s)
        return kl.view(shape), stats.view(*shape, 5)

    def linear_kl_divergence_backward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        stats: Tensor,
        grad: Tensor,
        temperature: float,
        reverse: bool,
        chunk: int,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, stats = flat(grad), stats.view(-1, 5)
        used = grad != 0
        if mask is not None:
            used &= flat(mask) != 0
        tokens = select(used)
        of_chunk = Chunk.backward(chunk, weight, tokens.count, heads=2)
        head = Head.of(hidden, weight, bias, of_chunk, tokens.count, empty)
        ref = Head.of(ref_hidden, ref_weight, ref_bias, of_chunk, tokens.count, empty)
        gradients = Gradients(head, *needs)

        def backward(logits: Tensor, tile: Tile) -> None:
            ref_states = ref.states(tokens, tile.tokens)
            own, g = (tokens.take(t, tile.tokens) for t in (stats, grad))
            rows["kl_divergence_backward_inplace"](
                logits, ref.project(ref_states, tile.words), own, g, temperature, reverse
            )

        gradients.sweep(tokens, of_chunk, backward)
        return gradients.results(hidden.shape)

    return {
        "linear_policy_loss": policy.launcher(rows, empty, reduce),
        "linear_token_logprobs": linear_token_logprobs,
        "linear_token_logprobs_backward": linear_token_logprobs_backward,
        "linear_kl_divergence": linear_kl_divergence,
        "linear_kl_divergence_backward": linear_kl_divergence_backward,
    }
