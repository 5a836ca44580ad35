"""linear_policy_loss: the policy loss from hidden states, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config.enums import EmptySupport
from ..config.metrics import POLICY_METRICS
from ..config.policy import PolicyLossConfig
from ..core import checks, data_checks, groups, row_options, tracing
from ..head import devices, shard
from ..head import policy as head
from ..head.arguments import Batching, Operands, PolicyArguments, Targets
from ..kernels import backends, losses
from ._autograd import InputGradients, apply, gathered, graph_is_kept, once_differentiable, remember
from ._heads import check_batching, check_head, check_ref_head
from ._operator import define, head_gradients_fake, select
from .linear_logprobs import over_support
from .logprobs_results import TokenLogprobsEntropy
from .policy import (
    PPO,
    PolicyLoss,
    PolicyMetrics,
    check_config,
    check_spread,
    config_numbers,
    policy_loss,
    times,
)
from .support import SamplingMask, check_empty_support


def _check_ref_head(
    hidden: Tensor,
    weight: Tensor,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    sharded: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The reference policy's head as (hidden, weight, bias), or None."""
    op = "linear_policy_loss"
    if ref_hidden is None and ref_weight is None and ref_bias is None:
        return None
    if ref_hidden is None or ref_weight is None:
        raise ValueError(f"{op}: ref_hidden and ref_weight must be given together")
    if ref_logprobs is not None:
        raise ValueError(f"{op}: ref_logprobs must be None where ref_hidden is given")
    return check_ref_head(op, hidden, weight, ref_hidden, ref_weight, ref_bias, sharded=sharded)


def _over_support(
    head_of: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    keep: Tensor,
    support: SamplingMask,
    empty_support: EmptySupport,
    arguments: row_options.RowArguments,
    batching: Batching,
    backend: str,
) -> TokenLogprobsEntropy:
    """Log-probabilities and entropies of the kept tokens over their support."""
    op = "linear_policy_loss"
    data_checks.token_data(op, labels, arguments.effective_temperature(), keep, head_of[1].shape[0])
    data_checks.kept_tokens(op, keep, batching.kept)
    checks.support(op, support, labels.numel(), labels.device)
    # On a GPU labels are not validated, and a bad one could be the label to skip. As -1 it makes
    # its token NaN.
    labels = torch.where(keep, labels.clamp(min=-1), arguments.ignore_index)
    found = over_support(head_of, labels, support, empty_support, arguments, batching, backend)
    assert isinstance(found, TokenLogprobsEntropy)  # the arguments ask for it
    return found


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _results(operands: Operands, needs: list[bool]) -> _Results:
    """Loss, metrics and the gradients of hidden states, weight and bias."""
    scalar = operands.hidden.new_empty((), dtype=torch.float32)
    of_hidden, of_weight, of_bias = (
        g.new_empty(g.shape, dtype=losses.waiting_dtype(g.dtype)) if need else g
        for g, need in zip(head_gradients_fake(operands, needs), needs, strict=True)
    )
    return scalar, scalar.new_empty((len(POLICY_METRICS),)), of_hidden, of_weight, of_bias


@define("linear_policy_loss", head.forward)
def _forward(
    operands: Operands,
    targets: Targets,
    policy: PolicyArguments,
    ref_: Operands | None,
    batching: Batching,
    needs: list[bool],
    backend: str,
) -> _Results:
    return _results(operands, needs)


@define("sharded_linear_policy_loss", shard.linear_policy_loss)
def _sharded_forward(
    operands: Operands,
    targets: Targets,
    policy: PolicyArguments,
    ref_: Operands | None,
    batching: Batching,
    needs: list[bool],
    group: str,
    backend: str,
) -> _Results:
    return _results(operands, needs)


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """gradient * upstream in `dtype`; in the gradient's own memory where nobody needs it again.

    A second gradient of the weight would double the memory of the largest tensor in the call.
    """
    if tracing.active(upstream) or tracing.transform() is not None:
        # torch on a GPU would round a 0-d factor to the dtype of the gradient.
        return (gradient * upstream.unsqueeze(0)).to(dtype)
    if devices.is_cpu(upstream.device):
        return times(gradient, upstream, dtype)
    memory = gradient.clone() if graph_is_kept() else gradient
    return backends.get(backend).kernels.rows.scale_inplace(memory, upstream).to(dtype)


class _LinearPolicyLoss(torch.autograd.Function):
    """The forward pass computes the gradient too; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """`args`: the fields of Operands, Targets and PolicyArguments and of the reference's
        Operands, or None for each; batching, group, backend.
        """
        operands, targets, policy, ref, batching, group, backend = gathered(
            args, Operands, Targets, PolicyArguments, Operands
        )
        ctx.needs, ctx.backend = list(ctx.needs_input_grad[: len(operands)]), backend
        ctx.nothing = (None,) * (len(args) - len(operands))
        reference = None if ref.hidden is None else ref
        inputs = (operands, targets, policy, reference, batching, ctx.needs)
        if group:
            loss, metrics, *gradients = _sharded_forward(*inputs, group, backend)
        else:
            loss, metrics, *gradients = _forward(*inputs, backend)
        ctx.dtypes = [None if t is None else t.dtype for t in operands]
        remember(ctx, *operands)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable("linear_policy_loss")
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> InputGradients:
        if upstream is None:
            return (None, None, None, *ctx.nothing)
        gradients = (
            _scaled(g, upstream, dtype, ctx.backend) if need else None
            for g, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        )
        return (*gradients, *ctx.nothing)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_tokens: int | None = None,
    kept_tokens: int | None = None,
    batch_invariant: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
    support: SamplingMask | None = None,
    empty_support: EmptySupport = "nan",
    config: PolicyLossConfig = PPO,
) -> PolicyLoss:
    """`policy_loss` from hidden states; the forward pass computes the gradient too.

    The value, metrics and gradients are those of
    `policy_loss(*token_logprobs(hidden @ weight.T, labels, entropy=True), ...)`. A chunk's logits
    are overwritten by their gradient in the forward pass, so that three matrix products suffice
    where recomputing the logits in the backward pass takes four (for cross-entropy: Hsu et al.,
    2410.10989). Masked tokens are never multiplied. Tokens without a gradient (zero advantage, no
    KL or entropy term) are multiplied only forward.

    Four products are still needed where a token's gradient depends on its whole sequence
    (ratio_level "sequence" or "sequence-token", correction_level "sequence" or "geometric", gate
    "opsm"): a first sweep then computes the log-probabilities. Four are also used on CPU with
    bfloat16 operands and more logits than two chunks hold: summing the weight's gradient over
    chunks would take more memory than recomputing the logits by blocks of the vocabulary.

    With `group` the vocabulary is sharded over the ranks of the group as in
    `linear_token_logprobs`, that of the reference policy too. Loss and metrics have the same bits
    on every rank. In the forward pass the ranks exchange four floats per token chunk by chunk, and
    the gradient of hidden once. The same operands must require a gradient on every rank.

    Args:
        hidden: [B, T, H], or packed [N, H] with cu_seqlens; float32, bfloat16 or float16.
        weight: [V, H], its dtype as in `linear_token_logprobs`.
        labels: [B, T] or [N], int64 or int32; any values at masked tokens.
        old_logprobs: as in `policy_loss`. None costs no further product, and the ratio is exactly 1
            for any chunk size.
        advantages: as in `policy_loss`.
        mask: as in `policy_loss`.
        bias: [V], or None.
        temperature: as in `token_logprobs`.
        softcap: as in `token_logprobs`, applied after logit_scale.
        logit_scale: a number between 2^-60 and 2^60 that multiplies the logits.
        ref_logprobs: as in `policy_loss`.
        ref_hidden: hidden states [..., H'] of the reference policy instead of ref_logprobs, which
            are then computed in the same sweep. Constant.
        ref_weight: head [V, H'] of the reference policy; required with ref_hidden.
        ref_bias: bias [V] of the reference head, or None.
        rollout_logprobs: as in `policy_loss`.
        weights: as in `policy_loss`.
        cu_seqlens: as in `policy_loss`.
        normalizer: as in `policy_loss`.
        chunk_tokens: tokens of a chunk, the same on every rank of group. None: as many as fit 128
            MiB of logits on a CPU, 4096 or 4 GiB on a GPU; with a group as many
            as fit for the largest shard.
        kept_tokens: as in `linear_token_logprobs`, by the mask. Tokens without a gradient are then
            multiplied like any other. None: counted, with one synchronisation of a GPU; two with
            group and without chunk_tokens.
        batch_invariant: as in `linear_token_logprobs`; with group, chunk_tokens must be given.
        group: process group over which V is sharded; None for none.
        support: the token ids that the sampler kept for each token, as in `linear_token_logprobs`:
            log-probabilities, those of ref_hidden too, are over these alone, and only their rows of
            the weight are multiplied. Not with group.
        empty_support: as in `token_logprobs`.
        config: options; by default those of `PolicyLossConfig.ppo()`.

    Returns:
        PolicyLoss(loss, metrics), float32; differentiable in hidden, weight and bias. The gradients
        of weight and bias are accumulated in fp32 and rounded once to their dtype. Gradients of
        float16 operands stay in fp32, at twice the memory, until they are multiplied by the
        upstream gradient, so that a loss scale protects them as usual.

    Raises:
        TypeError, ValueError, IndexError: as in `policy_loss` and `linear_token_logprobs`.
    """
    op = "linear_policy_loss"
    shards = groups.name(op, group)
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = check_head(op, hidden, weight, bias, names, sharded=bool(shards))
    arguments = row_options.checked(
        op,
        labels,
        "hidden",
        hidden,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=True,
    )
    tokens = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    like = "labels", labels
    if old_logprobs is not None:
        checks.floating(op, "old_logprobs", old_logprobs, double=True)
        checks.same_device(op, "old_logprobs", old_logprobs, "hidden", hidden.device)
        like = "old_logprobs", old_logprobs
    mask = checks.token_inputs(op, tokens, mask, cu_seqlens, like)
    checks.same_shape(op, "labels", labels, like[0], like[1].shape)
    advantages = check_spread(op, "advantages", advantages, like[1], cu_seqlens, like[0])
    if weights is not None:
        weights = check_spread(op, "weights", weights, like[1], cu_seqlens, like[0])
    ref_head = _check_ref_head(
        hidden, weight, ref_logprobs, ref_hidden, ref_weight, ref_bias, bool(shards)
    )
    check_config(op, config, ref_hidden if ref_head else ref_logprobs, rollout_logprobs, normalizer)
    effective_normalizer = config.normalizer if normalizer is None else normalizer
    count, divisor = checks.divisor(op, effective_normalizer, "hidden", hidden.device)

    if type(empty_support) is not str or empty_support != "nan":
        check_empty_support(op, empty_support, support)
    if support is not None and shards:
        raise ValueError(f"{op}: support and group do not go together")

    backend = select(op, hidden.device)
    columns = (2 if ref_head else 1) * weight.shape[0]
    if shards and batch_invariant and chunk_tokens is None:
        # The ranks communicate once per chunk, so they must agree on its size.
        raise ValueError(f"{op}: chunk_tokens must be given with group and batch_invariant")
    # A bound from the columns of this rank's shard would differ between ranks.
    columns = 0 if shards else columns
    batching = check_batching(
        op, chunk_tokens, kept_tokens, batch_invariant, weight, columns, backend
    )
    if support is not None:
        keep, over = mask != 0, (support, empty_support, arguments, batching, backend)
        if cu_seqlens is not None and data_checks.can_read_on_host(cu_seqlens):
            data_checks.offsets_valid(op, cu_seqlens, labels.shape[0])
        data_checks.divisor_positive(op, count)
        data_checks.loss_weights(op, weights, keep, cu_seqlens)
        ref_of = None if ref_head is None else _over_support(ref_head, labels, keep, *over)
        own = _over_support((hidden, weight, bias), labels, keep, *over)
        return policy_loss(
            own.logprobs,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs if ref_of is None else ref_of.logprobs.detach(),
            rollout_logprobs=rollout_logprobs,
            entropy=own.entropy if config.entropy_coef else own.entropy.detach(),
            weights=weights,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            config=config,
        )
    if backend == backends.REFERENCE:
        keep, effective = mask != 0, arguments.effective_temperature()
        shard.check_tokens(op, weight.shape[0], labels, effective, keep, shards)
        data_checks.kept_tokens(op, keep, batching.kept)
        data_checks.offsets_valid(op, cu_seqlens, labels.shape[0])
        data_checks.divisor_positive(op, count)
        data_checks.loss_weights(op, weights, keep, cu_seqlens)
        of_rows = arguments.of_policy_loss()
        if ref_head is not None:
            states, head_weight, head_bias = ref_head
            ref_logprobs = reference.linear_token_logprobs(
                states,
                head_weight,
                labels.masked_fill(mask == 0, -100),
                bias=head_bias,
                **of_rows,
                group=shards,
            ).logprobs
        loss, metrics = reference.linear_policy_loss(
            hidden,
            weight,
            labels,
            old_logprobs,
            advantages,
            mask,
            bias=bias,
            **of_rows,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            weights=weights,
            cu_seqlens=cu_seqlens,
            normalizer=divisor or count,
            config=config,
            group=shards,
        )
        return PolicyLoss(loss, PolicyMetrics(metrics))
    for name, t in {
        "hidden": hidden,
        "advantages": advantages,
        "weights": weights,
        **tokens,
    }.items():
        if t is not None:
            checks.floating(op, name, t)
    temperatures, options = arguments.split()
    constants = (old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs, weights)
    loss, metrics = apply(
        op,
        _LinearPolicyLoss,
        hidden,
        weight,
        bias,
        labels,
        temperatures,
        options,
        *(None if t is None else t.detach() for t in constants),
        cu_seqlens,
        count,
        divisor,
        *config_numbers(config),
        *(ref_head or (None, None, None)),
        batching,
        shards,
        backend,
    )
    return PolicyLoss(loss, PolicyMetrics(metrics))
