"""linear_policy_loss: loss and gradients chunk by chunk, a chunk's logits turned into their own."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.enums import AGGREGATIONS, CORRECTION_CODES, RATIO_LEVELS
from ..config.policy import PolicyCodes, PolicyParams
from ..core import checks
from ..core.layout import MaybeTensor
from ..core.row_options import RowOptions
from ..core.sentinels import SHARD_IGNORED
from ..core.sequences import per_token, token_weights
from ..kernels import losses
from ..kernels.rows import Kernels, LabelKernels
from .chunks import Chunk, Tile, Tokens, flat, localized, prefer_recompute, select
from .gradients import Gradients
from .products import Head

_TOKEN_RATIO = RATIO_LEVELS.index("token")
_SEQUENCE_CORRECTION = CORRECTION_CODES.index("sequence")


def _complete(found: tuple[Tensor, ...], weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A policy loss's gradients in log-probabilities and entropy, times `weight` and its scale."""
    *_, g, h, scale = found
    for factor in (weight, scale if losses.is_deferred(scale) else None):
        if factor is not None:
            g, h = g * factor, h if h.numel() == 0 else h * factor
    return g, h


class _PolicySweep:
    """The chunks of one `linear_policy_loss`, and the log-probabilities found on the way."""

    def __init__(
        self,
        kernels: Kernels | LabelKernels,
        operands: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        temperatures: Tensor | None,
        mask: Tensor,
        ref_head: list[Tensor],
        options: RowOptions,
        chunk: int,
    ) -> None:
        _, weight, _ = operands
        self._kernels, self._mask = kernels, mask
        self._labels, self._temperatures = flat(labels), flat(temperatures)
        self._vocab = weight.shape[0]
        # Masked tokens are dropped already.
        self._options = options._replace(entropy=True, ignore_index=SHARD_IGNORED)
        keep = flat(mask) != 0
        # The labels of a shard were found good before.
        if kernels.reduce is None:
            checks.token_data(
                "linear_policy_loss", self._labels, self._temperatures, keep, weight.shape[0]
            )
            # Of the others, where they may not be looked at, none may be SHARD_IGNORED: -1 gives
            # NaN.
            self._labels = self._labels.clamp(min=-1)
        self.tokens = select(keep)
        heads = 2 if ref_head else 1
        self._chunk = Chunk.of(chunk, weight, heads)
        self._backward_chunk = functools.partial(Chunk.backward, chunk, weight)
        # The gradient's sum over chunks costs more than the logits again, in a second sweep.
        self.recomputes = prefer_recompute(chunk, weight, self.tokens.count, heads)
        shared = (self._chunk, self.tokens.count, kernels.empty)
        self.head = Head.of(*operands, *shared)
        self._ref = None
        if ref_head:
            ref_hidden, ref_weight, *ref_bias = ref_head
            self._ref = Head.of(ref_hidden, ref_weight, ref_bias[0] if ref_bias else None, *shared)
        shape = self._labels.shape
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        self.entropy = torch.zeros_like(self.logprobs)
        self.ref_logprobs = torch.zeros_like(self.logprobs) if ref_head else None
        self._stats = self.logprobs.new_empty((*shape, 3))

    def _forward(
        self, tokens: Tokens, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """A chunk's (hidden, logits, log-probabilities, entropy, stats, reference's), recorded."""
        own = tokens.take(self._labels, part), tokens.take(self._temperatures, part)
        ref = None
        if self._ref is not None and self.ref_logprobs is not None:
            logits = self._ref.project(self._ref.states(tokens, part))
            plain = self._options._replace(entropy=False)
            ref, _, _ = self._kernels.rows.token_logprobs(logits, *own, plain)
            tokens.put(self.ref_logprobs, part, ref)
        hidden = self.head.states(tokens, part)
        logits = self.head.project(hidden)
        logprobs, entropy, stats = self._kernels.rows.token_logprobs(logits, *own, self._options)
        tokens.put(self.logprobs, part, logprobs)
        tokens.put(self.entropy, part, entropy)
        tokens.put(self._stats, part, stats)
        return hidden, logits, logprobs, entropy, stats, ref

    def logprobs_of(self, tokens: Tokens) -> None:
        """Log-probabilities of `tokens`; no gradient."""
        for part in tokens.chunks(self._chunk.size):
            self._forward(tokens, part)

    def fused(
        self,
        tokens: Tokens,
        old: Tensor | None,
        advantages: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        weights: Tensor,
        codes: PolicyCodes,
        params: PolicyParams,
        entropy_bonus: bool,
        needs: list[bool],
    ) -> Gradients:
        """Log-probabilities and gradients of `tokens`, one product forward and two backward."""
        gradients = Gradients(self.head, needs, self._kernels.reduce)
        codes = codes._replace(aggregation=AGGREGATIONS.index("constant"))
        for tile in tokens.tiles(self._chunk, self.head.weight.shape[0]):
            part = tile.tokens
            hidden, logits, logprobs, entropy, stats, own_ref = self._forward(tokens, part)
            if own_ref is None:
                own_ref = tokens.take(ref, part)

            def row(t: MaybeTensor) -> MaybeTensor:
                return None if t is None else t.unsqueeze(0)

            ones = torch.ones_like(logprobs, dtype=torch.bool)
            own_old = logprobs if old is None else tokens.take(old, part)
            found = self._kernels.rows.policy_loss(
                row(logprobs), row(own_old), row(tokens.take(advantages, part)),
                row(ones), row(own_ref), row(tokens.take(rollout, part)),
                row(entropy) if entropy_bonus else None, None, None, 1.0, codes, params, True,
                entropy_bonus,
            )  # fmt: skip
            g, h = _complete(found, tokens.take(weights, part))
            self._gradient(tokens, tile, logits, stats, g[0], h[0] if entropy_bonus else None)
            gradients.add(tokens, tile, hidden, logits)
        return gradients

    def backward(self, g: Tensor, h: Tensor | None, needs: list[bool]) -> Gradients:
        """The second sweep: gradients from those of the log-probabilities and entropies."""
        used = g != 0 if h is None else (g != 0) | (h != 0)
        tokens = select(used)
        chunk = self._backward_chunk(tokens.count)
        operands = self.head[:3]
        # Their buffers give way to the next.
        del self.head, self._ref
        head = Head.of(*operands, chunk, tokens.count, self._kernels.empty)
        gradients = Gradients(head, needs, self._kernels.reduce)

        def backward(logits: Tensor, tile: Tile) -> None:
            stats, own = tokens.take(self._stats, tile.tokens), tokens.take(g, tile.tokens)
            self._gradient(tokens, tile, logits, stats, own, tokens.take(h, tile.tokens))

        gradients.sweep(tokens, chunk, backward)
        return gradients

    def _gradient(
        self,
        tokens: Tokens,
        tile: Tile,
        logits: Tensor,
        stats: Tensor,
        g: Tensor,
        h: Tensor | None,
    ) -> None:
        labels = tokens.take(self._labels, tile.tokens)
        temperatures = tokens.take(self._temperatures, tile.tokens)
        labels, ignored = localized(labels, tile.columns, self._vocab, SHARD_IGNORED)
        self._kernels.rows.token_logprobs_backward_inplace(
            logits, labels, temperatures, stats, g, h, self._options._replace(ignore_index=ignored)
        )

    def policy_loss(
        self,
        old: Tensor | None,
        advantages: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        whole: tuple[Tensor | None, Tensor | None, float, PolicyCodes, PolicyParams],
        grad: bool,
        entropy_bonus: bool,
    ) -> tuple[Tensor, ...]:
        """(loss, metrics, gradients) of all tokens from the recorded log-probabilities."""
        shape = self._mask.shape
        if self.ref_logprobs is not None:
            ref = self.ref_logprobs.view(shape)
        logprobs = self.logprobs.view(shape)
        return self._kernels.rows.policy_loss(
            logprobs, logprobs if old is None else old, advantages, self._mask, ref, rollout,
            self.entropy.view(shape), *whole, grad, entropy_bonus,
        )  # fmt: skip


def forward(
    kernels: Kernels | LabelKernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    ref_head: list[Tensor],
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    options: RowOptions,
    divisor: float,
    codes: Sequence[int],
    params: Sequence[float],
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, gradients of hidden, weight and bias); those empty where not needed.

    `old`: None for the policy's own log-probabilities, as they are found. `ref_head`: hidden
    states, weight and, if there is one, bias of the reference policy; or [].
    """
    # Where they may not be looked at, the kernel that is given these poisons the loss.
    checks.divisor_positive("linear_policy_loss", normalizer)
    offsets, good = checks.usable_offsets("linear_policy_loss", cu_seqlens, mask.shape[0])
    sweep = _PolicySweep(
        kernels, (hidden, weight, bias), labels, temperatures, mask, ref_head, options, chunk
    )
    codes, params = PolicyCodes(*codes), PolicyParams(*params)
    whole = (cu_seqlens, normalizer, divisor, codes, params)
    entropy_bonus = params.entropy_coef != 0
    if not any(needs):
        sweep.logprobs_of(sweep.tokens)
        gradients = Gradients(sweep.head, needs)
    elif (
        codes.ratio_level == _TOKEN_RATIO
        and codes.correction_level != _SEQUENCE_CORRECTION
        and not sweep.recomputes
    ):
        # Tokens stand alone: their gradient is known as soon as their log-probability is.
        count = normalizer if normalizer is not None else divisor or None
        weights = token_weights(
            mask != 0, AGGREGATIONS[codes.aggregation], count, torch.float32, offsets
        ).expand(mask.shape)
        if good is not None:
            weights = torch.where(good, weights, torch.nan)
        of_tokens = per_token(advantages, mask, offsets)
        idle = torch.zeros((), dtype=torch.bool, device=hidden.device)
        if params.kl_coef == 0 and not entropy_bonus and params.penalty_coef == 0:
            # No advantage, no gradient.
            idle = flat(of_tokens) == 0
        kept = flat(mask) != 0
        sweep.logprobs_of(select(kept & idle))
        gradients = sweep.fused(
            select(kept & ~idle), flat(old), flat(of_tokens), flat(ref), flat(rollout),
            flat(weights), codes, params, entropy_bonus, needs,
        )  # fmt: skip
    else:
        # The gradient of a token needs its whole sequence, or is better left until all the
        # log-probabilities are known: a first sweep for those.
        sweep.logprobs_of(sweep.tokens)
        found = sweep.policy_loss(old, advantages, ref, rollout, whole, True, entropy_bonus)
        g, h = _complete(found)
        gradients = sweep.backward(flat(g), flat(h) if entropy_bonus else None, needs)
    loss, metrics, *_ = sweep.policy_loss(old, advantages, ref, rollout, whole, False, False)
    return loss, metrics, *gradients.results(hidden.shape, late=True)
