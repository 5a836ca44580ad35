"""Forward passes over a batch: hidden states, and the LM head over them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rlhf_kernels as rk

from .data import Batch, position_ids
from .report import kernel


class Head(NamedTuple):
    """Hidden states `[B, T, H]` that predict the completion's tokens, and the LM head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def _options(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.scale}

    def logprobs(self, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the labels, fp32 [B, T]; 0 where they are -100."""
        return kernel(
            rk.linear_token_logprobs, self.hidden, self.weight, labels,
            temperature=temperature, **self._options(),
        ).logprobs  # fmt: skip

    def policy_loss(self, labels: Tensor, *args: Tensor, **options: Any) -> rk.PolicyLoss:
        """`linear_policy_loss` of this head."""
        return kernel(
            rk.linear_policy_loss, self.hidden, self.weight, labels, *args,
            **self._options(), **options,
        )  # fmt: skip


def causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The causal LM, below LoRA's wrapper if there is one."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def lm_head(policy: nn.Module, batch: Batch) -> Head:
    """The hidden states of the completion's tokens and the head over them."""
    model = causal_lm(policy)
    hidden = hidden_states(model, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    # The same dtype under autocast too, where the weights stay fp32.
    weight, bias = (None if t is None else t.to(hidden.dtype) for t in (head.weight, head.bias))
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(hidden, weight, bias, getattr(config, "final_logit_softcapping", None), scale)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states `[B, P + T, H]`."""
    # Layers recompute in training mode only, and keep a cache for decoding only outside it.
    training = getattr(model, "recomputes", False) and torch.is_grad_enabled()
    if training != model.training:
        model.train(training)
    ids, kept = batch.input_ids, batch.attention_mask
    positions = position_ids(kept)
    if not getattr(model, "packs", False):
        return model.base_model(
            input_ids=ids, attention_mask=kept, position_ids=positions, use_cache=False
        ).last_hidden_state
    # All sequences in one row, without padding: attention finds their bounds in the positions.
    found = model.base_model(
        input_ids=ids[kept][None], position_ids=positions[kept][None], use_cache=False
    ).last_hidden_state[0]
    return found.new_zeros(*ids.shape, found.shape[1]).index_put((kept,), found)
