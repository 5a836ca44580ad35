"""The model class of reward models and critics: transformers' own, or a head on a base model."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from .errors import UserError


class _OfLastToken(GenericForSequenceClassification):
    """A linear head on any base model, also one without positions, cache or padding token.

    transformers' own forward pass asks all models for these, which state-space and recurrent ones
    do not have.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        # What the model's class beside this one has, its configuration among it.
        model: Any = self
        base = getattr(self, self.base_model_prefix)
        known = inspect.signature(base.forward).parameters
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        options |= {k: v for k, v in given.items() if v is not None and k in known}
        logits = self.score(base(input_ids, **options)[0])
        rows = torch.arange(len(input_ids), device=logits.device)
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        if pad is None and len(input_ids) != 1:
            raise ValueError("rows of several lengths need a padding token")
        columns = torch.arange(input_ids.shape[1], device=logits.device)
        last = columns.expand_as(input_ids) if pad is None else columns * (input_ids != pad)
        return SequenceClassifierOutput(logits=logits[rows, last.argmax(-1)])


def scalar_class(
    settings: PretrainedConfig, *, setting: str, ours: bool = False
) -> type[PreTrainedModel]:
    """The model class of reward models and critics for an architecture.

    If transformers has none, or if `ours` is set, it is the base model of the causal LM under a
    linear head without bias, read at the last token as in transformers' decoder classifiers.

    Raises:
        UserError: the architecture has no causal LM either.
    """
    found: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(settings), None)
    if found is not None and not ours:
        own: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        return own
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    kind = settings.model_type
    if causal is None:
        expected = "an architecture for sequence classification or causal language modelling"
        raise UserError(f"{setting}: expected {expected}, found {kind}")
    causal = causal[0] if isinstance(causal, tuple) else causal
    parents = [c for c in causal.__mro__ if issubclass(c, PreTrainedModel)]
    parent = next(c for c in parents[1:] if c.__name__.endswith("PreTrainedModel"))
    name = parent.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    # transformers looks into the source of a class's module for what the architecture supports.
    prefix = {"base_model_prefix": causal.base_model_prefix, "__module__": causal.__module__}
    return type(name, (_OfLastToken, parent), prefix)
