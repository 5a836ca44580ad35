"""The model class of reward models and critics: transformers' own, or a head on a base model."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from .errors import UserError


def scalar_class(
    settings: PretrainedConfig, *, setting: str, ours: bool = False
) -> type[PreTrainedModel]:
    """The model class of reward models and critics for an architecture.

    If transformers has none, or if `ours` is set, it is the base model of the causal LM under a
    linear head without bias, read at the last token as in transformers' decoder classifiers.

    Raises:
        UserError: the architecture has no causal LM either.
    """
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(settings), None)
    if found is not None and not ours:
        return found[0] if isinstance(found, tuple) else found
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
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
    return type(name, (GenericForSequenceClassification, parent), prefix)
