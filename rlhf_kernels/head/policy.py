"""linear_policy_loss: loss and gradients chunk by chunk, a chunk's logits turned into their own."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..config.enums import AGGREGATIONS, CORRECTION_CODES, GATE_CODES, RATIO_LEVELS
from ..core import data_checks
from ..core.layout import MaybeTensor
from ..core.sentinels import SHARD_IGNORED
from ..core.sequences import loss_weights, per_token, sequence_sum, token_weights
from ..kernels.rows import Kernels, LabelKernels, LossResults, PolicyTokens, TokenConstants
from . import devices
from .arguments import Batching, Operands, PolicyArguments, Targets
from .chunks import (
    Chunk,
    Tile,
    Tokens,
    chunk_size,
    covered,
    flat,
    localized,
    logits_dtype,
    prefer_recompute,
    select,
    split,
    zeros_or_nan,
)
from .gradients import Gradients
from .logprobs import of_part, of_products
from .products import TiledHead

_TOKEN_RATIO = RATIO_LEVELS.index("token")
_SEQUENCE_CORRECTION = CORRECTION_CODES.index("sequence")
_OPSM_GATE = GATE_CODES.index("opsm")
_NONE = Tokens(0, None)


def _complete(found: LossResults, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A policy loss's gradients in log-probabilities and entropy, times `weight` and its scale."""
    of_logprobs, of_entropy = found.of_logprobs, found.of_entropy
    assert of_logprobs is not None  # it was asked for
    for factor in (weight, found.scale):
        if factor is not None:
            of_logprobs = of_logprobs * factor
            of_entropy = None if of_entropy is None else of_entropy * factor
    return of_logprobs, of_entropy


class _PolicySweep:
    """The chunks of one `linear_policy_loss`, and the log-probabilities found on the way.

    `count` tokens are unmasked, or taken as if they were. `fused`: some of them will be given to
    the method of this name.
    """

    def __init__(
        self,
        kernels: Kernels | LabelKernels,
        operands: Operands,
        targets: Targets,
        policy: PolicyArguments,
        reference: Operands | None,
        batching: Batching,
        count: int,
        fused: bool,
    ) -> None:
        weight = operands.weight
        self._kernels, self._policy = kernels, policy
        self._labels, self._temperatures = flat(targets.labels), flat(targets.temperatures)
        self._vocab = weight.shape[0]
        # Masked tokens are dropped already, or have this label.
        self._options = targets.options._replace(entropy=True, ignore_index=SHARD_IGNORED)
        keep = flat(policy.mask) != 0
        # The labels of a shard were found good before.
        if kernels.reduce is None:
            data_checks.token_data(
                "linear_policy_loss", self._labels, self._temperatures, keep, weight.shape[0]
            )
            # On a GPU labels are not validated, and a bad one could equal SHARD_IGNORED. As -1 it
            # makes its token NaN. In int32 SHARD_IGNORED would be 1.
            self._labels = self._labels.long().clamp(min=-1)
            if batching.kept is not None:
                self._labels = torch.where(keep, self._labels, SHARD_IGNORED)
        heads = 1 if reference is None else 2
        self._chunk = (
            Chunk.of(batching, weight, heads)
            if fused
            else Chunk.forward(batching, weight, count, heads)
        )
        self._one_kernel = None
        if logits_dtype(weight.device, weight.dtype) == torch.float32:
            self._one_kernel = kernels.rows.policy_rows_for(
                weight.device, weight.shape[0], self._options
            )
        self._backward_chunk = functools.partial(Chunk.backward, batching, weight)
        shared = (self._chunk, count, kernels.memory)
        self.head = TiledHead.of(operands, *shared)
        self._ref = None if reference is None else TiledHead.of(reference, *shared)
        self.logprobs = zeros_or_nan(keep, batching.kept)
        self.entropy = torch.zeros_like(self.logprobs)
        self.ref_logprobs = None if reference is None else torch.zeros_like(self.logprobs)
        self._stats = self.logprobs.new_empty((*keep.shape, 3))

    def _labels_of(self, tokens: Tokens, part: slice) -> tuple[Tensor, Tensor | None]:
        """(labels, temperatures) of a chunk."""
        return tokens.take(self._labels, part), tokens.take(self._temperatures, part)

    def _logits(self, tokens: Tokens, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """A chunk's (hidden, logits, the reference's log-probabilities, recorded)."""
        ref = None
        if self._ref is not None and self.ref_logprobs is not None:
            plain = self._options._replace(entropy=False)
            targets = Targets(self._labels, self._temperatures, plain)
            found, _ = of_part(self._kernels.rows, self._ref, tokens, part, self._chunk, targets)
            ref = found.logprobs
            tokens.put(self.ref_logprobs, part, ref)
        hidden = self.head.states(tokens, part)
        return hidden, self.head.project(hidden), ref

    def _forward(
        self, tokens: Tokens, part: slice, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's (log-probabilities, entropy, stats)."""
        targets = Targets(*self._labels_of(tokens, part), self._options)
        shared = (self._chunk, self._vocab, targets, tokens.dropped_of(part))
        found, _ = of_products(self._kernels.rows, [(0, logits)], *shared)
        assert found.entropy is not None  # the options ask for it
        return found.logprobs, found.entropy, found.stats

    def _record(self, tokens: Tokens, part: slice, logprobs: Tensor, entropy: Tensor) -> None:
        tokens.put(self.logprobs, part, logprobs)
        tokens.put(self.entropy, part, entropy)

    def logprobs_of(self, tokens: Tokens) -> None:
        """Log-probabilities of `tokens`, and the statistics of their rows; no gradient."""
        rows = self._kernels.rows
        targets = Targets(self._labels, self._temperatures, self._options)
        plain = targets._replace(options=self._options._replace(entropy=False))
        for part in tokens.chunks(self._chunk.size):
            shared = tokens, part, self._chunk
            if self._ref is not None and self.ref_logprobs is not None:
                found, _ = of_part(rows, self._ref, *shared, plain)
                tokens.put(self.ref_logprobs, part, found.logprobs)
            found, _ = of_part(rows, self.head, *shared, targets)
            assert found.entropy is not None  # the options ask for it
            self._record(tokens, part, found.logprobs, found.entropy)
            tokens.put(self._stats, part, found.stats)

    def fused(
        self, tokens: Tokens, advantages: Tensor, weights: Tensor, needs: list[bool]
    ) -> Gradients:
        """Log-probabilities and gradients of `tokens`, one product forward and two backward.

        Args:
            tokens: unmasked tokens, or taken as if they were.
            advantages: per token [N].
            weights: of each token in the loss, [N].
            needs: which gradients are wanted.
        """
        gradients = Gradients(self.head, needs, self._kernels.reduce)
        policy = self._policy
        old, given_ref = flat(policy.old_logprobs), flat(policy.ref_logprobs)
        rollout = flat(policy.rollout_logprobs)
        for tile in tokens.tiles(self._chunk, self.head.weight.shape[0]):
            part = tile.tokens
            hidden, logits, ref = self._logits(tokens, part)
            constants = TokenConstants(
                tokens.take(old, part),
                tokens.take(advantages, part),
                tokens.take(given_ref, part) if ref is None else ref,
                tokens.take(rollout, part),
                tokens.take(weights, part),
            )
            out = gradients.of_logits(logits)
            if self._one_kernel is None:
                self._in_three_kernels(out, tokens, tile, logits, constants)
            else:
                own = self._labels_of(tokens, part)
                found = self._one_kernel(
                    out, logits, *own, self._options, constants, policy.codes, policy.params
                )
                self._record(tokens, part, *found)
            gradients.add(tokens, tile, hidden, out)
        return gradients

    def _in_three_kernels(
        self, out: Tensor, tokens: Tokens, tile: Tile, logits: Tensor, constants: TokenConstants
    ) -> None:
        """Writes the gradient of a chunk's logits; records log-probabilities and entropies."""
        policy, part, bonus = self._policy, tile.tokens, self._policy.entropy_bonus
        logprobs, entropy, stats = self._forward(tokens, part, logits)
        self._record(tokens, part, logprobs, entropy)
        old, advantages, ref, rollout, factors = constants

        def row(t: MaybeTensor) -> MaybeTensor:
            return None if t is None else t.unsqueeze(0)

        given = PolicyTokens(
            logprobs=logprobs.unsqueeze(0),
            old_logprobs=(logprobs if old is None else old).unsqueeze(0),
            advantages=advantages.unsqueeze(0),
            mask=tokens.kept(part, logprobs.device).unsqueeze(0),
            ref_logprobs=row(ref),
            rollout_logprobs=row(rollout),
            entropy=row(entropy) if bonus else None,
            weights=None,
            cu_seqlens=None,
            normalizer=None,
            divisor=1.0,
            codes=policy.codes._replace(aggregation=AGGREGATIONS.index("constant")),
            params=policy.params,
        )
        found = self._kernels.rows.policy_loss(given, True, bonus)
        of_logprobs, of_entropy = _complete(found, factors)
        of_entropy = None if of_entropy is None else of_entropy[0]
        self._gradient(out, tokens, tile, logits, stats, of_logprobs[0], of_entropy)

    def backward(
        self,
        tokens: Tokens,
        of_logprobs: Tensor,
        of_entropy: Tensor | None,
        needs: list[bool],
    ) -> Gradients:
        """The second sweep: gradients from those of the log-probabilities and entropies, [N]."""
        chunk = self._backward_chunk(tokens)
        operands = self.head.operands
        # Free their buffers before the next head is allocated.
        del self.head, self._ref
        head = TiledHead.of(operands, chunk, tokens.count, self._kernels.memory)
        gradients = Gradients(head, needs, self._kernels.reduce)

        def backward(out: Tensor, logits: Tensor, tile: Tile) -> None:
            part = tile.tokens
            stats, own = tokens.take(self._stats, part), tokens.take(of_logprobs, part)
            self._gradient(out, tokens, tile, logits, stats, own, tokens.take(of_entropy, part))

        gradients.sweep(tokens, chunk, backward)
        return gradients

    def _gradient(
        self,
        out: Tensor,
        tokens: Tokens,
        tile: Tile,
        logits: Tensor,
        stats: Tensor,
        of_logprobs: Tensor,
        of_entropy: Tensor | None,
    ) -> None:
        labels, temperatures = self._labels_of(tokens, tile.tokens)
        dropped = tokens.dropped_of(tile.tokens)
        labels, ignored = localized(labels, tile.columns, self._vocab, SHARD_IGNORED, dropped)
        self._kernels.rows.token_logprobs_backward_into(
            out,
            logits,
            labels,
            temperatures,
            stats,
            of_logprobs,
            of_entropy,
            self._options._replace(ignore_index=ignored),
        )

    def policy_loss(self, grad: bool) -> LossResults:
        """(loss, metrics, gradients, their scale) from the recorded log-probabilities."""
        given = self._policy
        shape, ref = given.mask.shape, given.ref_logprobs
        if self.ref_logprobs is not None:
            ref = self.ref_logprobs.view(shape)
        logprobs = self.logprobs.view(shape)
        own: dict[str, Any] = {
            "logprobs": logprobs,
            "entropy": self.entropy.view(shape),
            "ref_logprobs": ref,
        }
        if given.old_logprobs is None:
            own["old_logprobs"] = logprobs
        tokens = PolicyTokens(**{**given._asdict(), **own})
        return self._kernels.rows.policy_loss(tokens, grad, grad and given.entropy_bonus)


def forward(
    kernels: Kernels | LabelKernels,
    operands: Operands,
    targets: Targets,
    policy: PolicyArguments,
    reference: Operands | None,
    batching: Batching,
    needs: list[bool],
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, gradients of hidden, weight and bias); those empty where not needed.

    Args:
        kernels, operands, targets, policy, batching, needs: as the operator's.
        reference: the head of the reference policy, or None.
        columns: int64 [], the columns of logits per token that the size of a chunk is computed
            from, where `batching` names no size. None: those of the weights.
    """
    # Where the host cannot read these tensors, the kernel of the loss makes it NaN for bad ones.
    data_checks.divisor_positive("linear_policy_loss", policy.normalizer)
    offsets, good = data_checks.usable_offsets(
        "linear_policy_loss", policy.cu_seqlens, policy.mask.shape[0]
    )
    data_checks.loss_weights("linear_policy_loss", policy.weights, policy.mask, offsets)
    keep = flat(policy.mask) != 0
    data_checks.kept_tokens("linear_policy_loss", keep, batching.kept)
    enough = covered(keep, batching.kept)
    # Whether offsets, kept_tokens and normalizer are valid, 0-d; None where the host has seen it.
    good = _both(_both(good, enough), _good_divisor(policy))
    advantages = per_token(policy.advantages, policy.mask, offsets)
    # Whether tokens stand alone: their gradient is known as soon as their log-probability is.
    alone = (
        policy.codes.ratio_level == _TOKEN_RATIO
        and policy.codes.correction_level < _SEQUENCE_CORRECTION
        and policy.codes.gate != _OPSM_GATE
    )
    tokens, idle, widest = _selected(
        policy, advantages, offsets, alone, batching.kept, any(needs), columns
    )
    if columns is not None:
        size = chunk_size(operands.weight.device, widest, operands.weight.dtype)
        batching = batching._replace(chunk_tokens=size)
    count = tokens.count + idle.count
    heads = 1 if reference is None else 2
    # Summing a gradient over chunks costs more than computing the logits in a second sweep.
    recomputes = prefer_recompute(batching, operands.weight, count, heads)
    fused = any(needs) and alone and not recomputes
    sweep = _PolicySweep(kernels, operands, targets, policy, reference, batching, count, fused)
    if not any(needs):
        sweep.logprobs_of(tokens)
        gradients = Gradients(sweep.head, needs)
    elif fused:
        sweep.logprobs_of(idle)
        weights = _weights(policy, offsets, good)
        gradients = sweep.fused(tokens, flat(advantages), flat(weights), needs)
    else:
        # The gradient of a token needs its whole sequence, or is better left until all the
        # log-probabilities are known: a first sweep for those.
        counts = batching.kept is None and devices.is_cpu(keep.device)
        if counts and idle.count > 0:
            tokens, idle = select(keep), _NONE
        sweep.logprobs_of(tokens)
        sweep.logprobs_of(idle)
        g, h = _complete(sweep.policy_loss(grad=True))
        if enough is not None:
            # If kept_tokens was too small, every gradient is NaN, those of complete sequences too.
            g = torch.where(enough, g, torch.nan)
            h = None if h is None else torch.where(enough, h, torch.nan)
        g, h = flat(g), flat(h)
        if counts:
            tokens = select(g != 0 if h is None else (g != 0) | (h != 0))
        gradients = sweep.backward(tokens, g, h, needs)
    loss, metrics, *_ = sweep.policy_loss(grad=False)
    return loss, metrics, *gradients.results(operands.hidden.shape, late=True)


def _selected(
    policy: PolicyArguments,
    advantages: Tensor,
    offsets: Tensor | None,
    alone: bool,
    kept: int | None,
    grad: bool,
    columns: Tensor | None,
) -> tuple[Tokens, Tokens, int]:
    """(tokens that may have a gradient, unmasked tokens that surely have none, columns).

    The second are separated only where that saves time; else they are empty and all unmasked tokens
    are among the first. columns is 0 for None.
    """
    keep, params = policy.mask != 0, policy.params
    if kept is not None:
        return select(flat(keep), kept), _NONE, 0 if columns is None else int(columns)
    # No advantage, no gradient.
    linear = params.kl_coef == 0 and not policy.entropy_bonus and params.penalty_coef == 0
    # A second sweep selects by the true gradients, so that tokens without one stay in the first.
    counts_again = not alone and devices.is_cpu(keep.device)
    if not grad or not linear or counts_again:
        if columns is None:
            return select(flat(keep)), _NONE, 0
        idle = torch.zeros_like(keep)
    elif alone:
        idle = advantages == 0
    else:
        moving = ((advantages != 0) & keep).to(torch.float32)
        idle = (sequence_sum(moving, offsets) == 0).expand(keep.shape)
    return split(flat(keep), flat(idle), columns)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Whether both, where None is true."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _good_divisor(policy: PolicyArguments) -> Tensor | None:
    """Whether a normalizer that the host may not read is one, 0-d bool; None for any other."""
    count = policy.normalizer
    if count is None or data_checks.can_read_on_host(count):
        return None
    return (count > 0) & (count < torch.inf)


def _weights(policy: PolicyArguments, offsets: Tensor | None, good: Tensor | None) -> Tensor:
    """The factor of each token's term in the loss, as the mask; NaN where `good` is false."""
    mask = policy.mask
    count = policy.normalizer if policy.normalizer is not None else policy.divisor or None
    aggregation = AGGREGATIONS[policy.codes.aggregation]
    weights = token_weights(mask != 0, aggregation, count, torch.float32, offsets)
    if policy.weights is not None:
        weights = weights * loss_weights(policy.weights, mask != 0, offsets)
    weights = weights.expand(mask.shape)
    return weights if good is None else torch.where(good, weights, torch.nan)
