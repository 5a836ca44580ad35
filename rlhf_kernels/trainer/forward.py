"""Forward passes over a batch: hidden states, and the LM head applied to them."""

import enum
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rlhf_kernels as rk

from .data import Batch, position_ids
from .modes import recompute
from .timing import timed


class Form(enum.Enum):
    """How a batch is passed to a model, from the most efficient to the most widely supported."""

    #: All sequences in one row; attention finds their boundaries from the positions.
    PACKED = "packed"
    #: Unchanged: padding on both sides, a mask, and positions that count only kept tokens.
    PADDED = "padded"
    #: Every row shifted to column 0. Padding follows all tokens, so causal attention ignores it.
    ALIGNED = "aligned"
    #: One sequence at a time, without padding.
    ALONE = "alone"


class Head(NamedTuple):
    """The hidden states `[B, T, H]` that predict the completion's tokens, and the LM head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @property
    def _alone(self) -> rk.Head:
        return rk.Head(self.weight, self.bias, self.softcap, self.logit_scale)

    def logprobs(self, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the labels, fp32 [B, T]; 0 where a label is -100."""
        return timed(
            rk.linear_token_logprobs,
            self.hidden,
            labels=labels,
            temperature=temperature,
            **self._alone.arguments(),
        ).logprobs

    def policy_loss(self, labels: Tensor, *args: Tensor | None, **options: Any) -> rk.PolicyLoss:
        """`linear_policy_loss` with this head."""
        options |= self._alone.arguments()
        weight = options.pop("weight")
        return timed(rk.linear_policy_loss, self.hidden, weight, labels, *args, **options)

    def logits(self) -> Tensor:
        """The logits, fp32 [B, T, V]."""
        return self._alone.logits(self.hidden)


def causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The causal LM, without the wrapper of an adapter."""
    found: Any = policy
    model: PreTrainedModel = found.get_base_model() if hasattr(found, "get_base_model") else found
    return model


def vocabulary(model: PreTrainedModel) -> int:
    """The number of tokens that the model has embeddings for."""
    table = model.get_input_embeddings()
    # An adapter may wrap the table, and some models have another module in its place.
    found = getattr(getattr(table, "base_layer", table), "num_embeddings", None)
    size: int = model.config.get_text_config().vocab_size if found is None else found
    return size


def lm_head(policy: nn.Module, batch: Batch) -> Head:
    """The hidden states that predict the completion's tokens, with the LM head."""
    model = causal_lm(policy)
    hidden = hidden_states(model, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    return head_over(model, hidden)


def head_over(model: PreTrainedModel, hidden: Tensor) -> Head:
    """The model's LM head with hidden states `[B, T, H]`; `check_head` has tested it."""
    head = rk.Head.from_model(model, check=False)
    # Autocast leaves the weights fp32, but the head needs the dtype of the hidden states.
    weight, bias = head.weight.to(hidden.dtype), head.bias
    bias = None if bias is None else bias.to(hidden.dtype)
    return Head(hidden, weight, bias, head.softcap, head.logit_scale)


def accepted(model: nn.Module, **inputs: Any) -> dict[str, Any]:
    """The inputs that the model's `forward` has parameters for; all if it accepts any."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head; `base_model` of some classes is the whole model instead."""
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if parts and model.base_model is model else model.base_model


def _base(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    base = backbone(model)
    hidden: Tensor = base(**accepted(base, use_cache=False, **inputs)).last_hidden_state
    return hidden


def hidden_states(model: PreTrainedModel, batch: Batch, form: Form | None = None) -> Tensor:
    """Hidden states `[B, P + T, H]`; those of padding are meaningless.

    `form` defaults to `model.form`.
    """
    recompute(model, torch.is_grad_enabled())
    form = form or getattr(model, "form", Form.PADDED)
    ids, kept = batch.input_ids, batch.attention_mask
    if form is Form.ALIGNED:
        return _aligned(model, ids, kept)
    positions = position_ids(kept)
    if form is Form.PADDED:
        return _base(model, input_ids=ids, attention_mask=kept, position_ids=positions)
    if form is Form.PACKED:
        inputs = {"input_ids": ids[kept][None], "position_ids": positions[kept][None]}
        found = _base(model, **inputs)[0]
    else:
        rows = zip(ids, kept, strict=True)
        found = torch.cat([_base(model, input_ids=row[own][None])[0] for row, own in rows])
    return found.new_zeros(*ids.shape, found.shape[1]).index_put((kept,), found)


def _aligned(model: PreTrainedModel, ids: Tensor, kept: Tensor) -> Tensor:
    # Sort the kept columns to the front, in their order.
    columns = torch.argsort((~kept).byte(), dim=1, stable=True)[:, : int(kept.sum(1).max())]
    found = _base(
        model, input_ids=ids.gather(1, columns), attention_mask=kept.gather(1, columns).long()
    )
    whole = found.new_zeros(*ids.shape, found.shape[2])
    return whole.scatter(1, columns[..., None].expand_as(found), found)
