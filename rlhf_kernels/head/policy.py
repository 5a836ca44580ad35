"""linear_policy_loss: loss and gradients chunk by chunk, a chunk's logits turned into their own."""

import functools

import torch
from torch import Tensor

from ..config.enums import AGGREGATIONS, CORRECTION_CODES, RATIO_LEVELS
from ..core import checks
from ..core.layout import MaybeTensor
from ..core.sentinels import SHARD_IGNORED
from ..core.sequences import per_token, token_weights
from ..kernels import losses
from ..kernels.rows import Kernels, LabelKernels
from .arguments import Operands, PolicyArguments, Targets
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
        operands: Operands,
        targets: Targets,
        policy: PolicyArguments,
        reference: Operands | None,
        chunk: int,
    ) -> None:
        weight = operands.weight
        self._kernels, self._policy = kernels, policy
        self._labels, self._temperatures = flat(targets.labels), flat(targets.temperatures)
        self._vocab = weight.shape[0]
        # Masked tokens are dropped already.
        self._options = targets.options._replace(entropy=True, ignore_index=SHARD_IGNORED)
        keep = flat(policy.mask) != 0
        # The labels of a shard were found good before.
        if kernels.reduce is None:
            checks.token_data(
                "linear_policy_loss", self._labels, self._temperatures, keep, weight.shape[0]
            )
            # Of the others, where they may not be looked at, none may be SHARD_IGNORED: -1 gives
            # NaN.
            self._labels = self._labels.clamp(min=-1)
        self.tokens = select(keep)
        heads = 1 if reference is None else 2
        self._chunk = Chunk.of(chunk, weight, heads)
        self._backward_chunk = functools.partial(Chunk.backward, chunk, weight)
        # The gradient's sum over chunks costs more than the logits again, in a second sweep.
        self.recomputes = prefer_recompute(chunk, weight, self.tokens.count, heads)
        shared = (self._chunk, self.tokens.count, kernels.empty)
        self.head = Head.of(operands, *shared)
        self._ref = None if reference is None else Head.of(reference, *shared)
        shape = self._labels.shape
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        self.entropy = torch.zeros_like(self.logprobs)
        self.ref_logprobs = None if reference is None else torch.zeros_like(self.logprobs)
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
        self, tokens: Tokens, advantages: Tensor, weights: Tensor, needs: list[bool]
    ) -> Gradients:
        """Log-probabilities and gradients of `tokens`, one product forward and two backward.

        Args:
            tokens: some of the unmasked tokens.
            advantages: per token [N].
            weights: of each token in the loss, [N].
            needs: which gradients are wanted.
        """
        gradients = Gradients(self.head, needs, self._kernels.reduce)
        policy, bonus = self._policy, self._policy.entropy_bonus
        old, given_ref = flat(policy.old_logprobs), flat(policy.ref_logprobs)
        rollout = flat(policy.rollout_logprobs)
        codes = policy.codes._replace(aggregation=AGGREGATIONS.index("constant"))
        for tile in tokens.tiles(self._chunk, self.head.weight.shape[0]):
            part = tile.tokens
            hidden, logits, logprobs, entropy, stats, ref = self._forward(tokens, part)
            if ref is None:
                ref = tokens.take(given_ref, part)

            def row(t: MaybeTensor) -> MaybeTensor:
                return None if t is None else t.unsqueeze(0)

            ones = torch.ones_like(logprobs, dtype=torch.bool)
            own_old = logprobs if old is None else tokens.take(old, part)
            found = self._kernels.rows.policy_loss(
                row(logprobs), row(own_old), row(tokens.take(advantages, part)),
                row(ones), row(ref), row(tokens.take(rollout, part)),
                row(entropy) if bonus else None, None, None, 1.0, codes, policy.params, True, bonus,
            )  # fmt: skip
            g, h = _complete(found, tokens.take(weights, part))
            self._gradient(tokens, tile, logits, stats, g[0], h[0] if bonus else None)
            gradients.add(tokens, tile, hidden, logits)
        return gradients

    def backward(self, g: Tensor, h: Tensor | None, needs: list[bool]) -> Gradients:
        """The second sweep: gradients from those of the log-probabilities and entropies."""
        used = g != 0 if h is None else (g != 0) | (h != 0)
        tokens = select(used)
        chunk = self._backward_chunk(tokens.count)
        operands = self.head.operands
        # Their buffers give way to the next.
        del self.head, self._ref
        head = Head.of(operands, chunk, tokens.count, self._kernels.empty)
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

    def policy_loss(self, grad: bool) -> tuple[Tensor, ...]:
        """(loss, metrics, gradients) of all tokens from the recorded log-probabilities."""
        given = self._policy
        shape, ref = given.mask.shape, given.ref_logprobs
        if self.ref_logprobs is not None:
            ref = self.ref_logprobs.view(shape)
        logprobs = self.logprobs.view(shape)
        old = logprobs if given.old_logprobs is None else given.old_logprobs
        return self._kernels.rows.policy_loss(
            logprobs, old, given.advantages, given.mask, ref, given.rollout_logprobs,
            self.entropy.view(shape), given.cu_seqlens, given.normalizer, given.divisor,
            given.codes, given.params, grad, grad and given.entropy_bonus,
        )  # fmt: skip


def forward(
    kernels: Kernels | LabelKernels,
    operands: Operands,
    targets: Targets,
    policy: PolicyArguments,
    reference: Operands | None,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, gradients of hidden, weight and bias); those empty where not needed.

    `reference`: the head of the reference policy, or None.
    """
    # Where they may not be looked at, the kernel that is given these poisons the loss.
    checks.divisor_positive("linear_policy_loss", policy.normalizer)
    offsets, good = checks.usable_offsets(
        "linear_policy_loss", policy.cu_seqlens, policy.mask.shape[0]
    )
    sweep = _PolicySweep(kernels, operands, targets, policy, reference, chunk)
    if not any(needs):
        sweep.logprobs_of(sweep.tokens)
        gradients = Gradients(sweep.head, needs)
    elif (
        policy.codes.ratio_level == _TOKEN_RATIO
        and policy.codes.correction_level != _SEQUENCE_CORRECTION
        and not sweep.recomputes
    ):
        # Tokens stand alone: their gradient is known as soon as their log-probability is.
        gradients = _fused(sweep, policy, offsets, good, needs)
    else:
        # The gradient of a token needs its whole sequence, or is better left until all the
        # log-probabilities are known: a first sweep for those.
        sweep.logprobs_of(sweep.tokens)
        g, h = _complete(sweep.policy_loss(grad=True))
        gradients = sweep.backward(flat(g), flat(h) if policy.entropy_bonus else None, needs)
    loss, metrics, *_ = sweep.policy_loss(grad=False)
    return loss, metrics, *gradients.results(operands.hidden.shape, late=True)


def _fused(
    sweep: _PolicySweep,
    policy: PolicyArguments,
    offsets: Tensor | None,
    good: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of a loss whose tokens stand alone; offsets and good as from `usable_offsets`."""
    mask, params = policy.mask, policy.params
    count = policy.normalizer if policy.normalizer is not None else policy.divisor or None
    weights = token_weights(
        mask != 0, AGGREGATIONS[policy.codes.aggregation], count, torch.float32, offsets
    ).expand(mask.shape)
    if good is not None:
        weights = torch.where(good, weights, torch.nan)
    advantages = flat(per_token(policy.advantages, mask, offsets))
    idle = torch.zeros((), dtype=torch.bool, device=mask.device)
    if params.kl_coef == 0 and not policy.entropy_bonus and params.penalty_coef == 0:
        # No advantage, no gradient.
        idle = advantages == 0
    kept = flat(mask) != 0
    sweep.logprobs_of(select(kept & idle))
    return sweep.fused(select(kept & ~idle), advantages, flat(weights), needs)
