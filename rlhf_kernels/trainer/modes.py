"""How a network runs: without randomness, and optionally with activation checkpointing."""

import copy
import enum
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UserError

N = TypeVar("N", bound=nn.Module)


class Notes(Protocol):
    """What the trainer notes on a network, as attributes of it: how it runs, and what it can do."""

    form: enum.Enum
    decoding: enum.Enum
    proved_length: int
    packs: bool
    padding: str | None
    positions: int | None
    recomputes: tuple[nn.Module, ...]
    continued: bool
    # transformers', which accelerate reads.
    _no_split_modules: set[str] | list[str] | None


def noted(network: nn.Module) -> Notes:
    """The same object; to type checkers every attribute of a module is a tensor or a module."""
    return cast(Notes, network)


def moved(network: N, device: torch.device | str) -> N:
    """The network on a device; transformers wraps `to` so that it has no type."""
    module: nn.Module = network
    module.to(device)
    return network


def _random(name: str) -> bool:
    """Whether an attribute is a dropout rate: the share that a layer drops in training mode."""
    return "drop" in name


def settled(model: N) -> N:
    """Puts a model in evaluation mode, without dropout in layers that recompute in training mode.

    With dropout two passes over the same tokens would differ, and the first ratio would not be 1.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if _random(name) and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        if isinstance(module, GradientCheckpointingLayer) and config is not None:
            # Some layers read the rate from the configuration in every forward pass. They get a
            # copy, because the model's own configuration is saved and must not change.
            rates = {k for k, v in vars(config).items() if _random(k) and isinstance(v, float)}
            module.config = copy.copy(config)
            for name in rates:
                setattr(module.config, name, 0.0)
    keep_scale(model)
    return model.eval()


def keep_scale(model: nn.Module) -> None:
    """Turns off RWKV's halving of deep layers' weights in evaluation mode.

    RWKV halves them in place against overflow in fp16; training would change and save them halved.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled") and not module.layers_are_rescaled:
            # The model's own configuration is saved and must not change.
            module.config = copy.copy(module.config)
            module.config.rescale_every = 0


def use_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Prepares a model to recompute its activations in the backward pass, if `wanted`.

    Raises:
        UserError: the model cannot recompute activations.
    """
    noted(model).recomputes = ()
    if wanted:
        # gradient_checkpointing_enable is transformers' older name of the method.
        name = "activation_checkpointing_enable"
        try:
            getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"gradient_checkpointing: expected false, found true: {error}"
            ) from error
        layers = (m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        noted(model).recomputes = tuple(layers)


def recompute(model: nn.Module, on: bool) -> None:
    """Turns training mode on or off for the layers that recompute activations, and no others.

    They recompute only in training mode, and keep a KV cache for decoding only in evaluation mode.
    """
    for module in getattr(model, "recomputes", ()):
        module.training = on
