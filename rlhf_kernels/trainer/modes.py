"""How a network runs: without anything random, and recomputing activations where that is asked."""

import copy

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UserError


def _random(name: str) -> bool:
    """Whether an attribute says how much a layer leaves out by chance in training mode."""
    return "drop" in name


def settled(model: nn.Module) -> nn.Module:
    """Evaluation mode, and nothing random in the layers that checkpointing puts in training mode.

    Only without dropout do two passes over the same tokens agree, and the first ratio equal 1.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if _random(name) and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        if isinstance(module, GradientCheckpointingLayer) and config is not None:
            # Some layers read the rate when they run. The model's own configuration is what is
            # saved, so it stays.
            rates = {k for k, v in vars(config).items() if _random(k) and isinstance(v, float)}
            module.config = copy.copy(config)
            for name in rates:
                setattr(module.config, name, 0.0)
    keep_scale(model)
    return model.eval()


def keep_scale(model: nn.Module) -> None:
    """Keeps RWKV from halving weights of deep layers in evaluation, in place.

    It does so against overflow in fp16; they would be trained and saved halved.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled") and not module.layers_are_rescaled:
            # A copy: the model's own configuration is what is saved.
            module.config = copy.copy(module.config)
            module.config.rescale_every = 0


def use_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Prepares a model to recompute its activations in the backward pass, if `wanted`.

    Raises:
        UserError: the model cannot.
    """
    model.recomputes = ()
    if wanted:
        # The second is transformers' older name.
        name = "activation_checkpointing_enable"
        try:
            getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"gradient_checkpointing: expected false, found true: {error}"
            ) from error
        model.recomputes = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def recompute(model: nn.Module, on: bool) -> None:
    """Training mode of the layers that recompute, and of nothing else in the model.

    They recompute in training mode only, and keep a cache for decoding only outside it.
    """
    for module in getattr(model, "recomputes", ()):
        module.training = on
