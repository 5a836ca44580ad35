"""The networks of a stage and their forward passes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from . import adapters
from .config import ModelConfig
from .data import Batch
from .forward import Head, causal_lm, hidden_states, lm_head, vocabulary
from .loading import build, load, load_settings, small_llama
from .modes import moved, noted, settled, use_checkpointing
from .probe import prove
from .reference import Reference
from .scalar import (
    build_critic,
    build_reward_model,
    load_reward_model,
    scalar_head,
    sequence_rewards,
    values,
)
from .tokenizers import check_vocabulary

__all__ = [
    "Batch",
    "Head",
    "Networks",
    "Reference",
    "build_critic",
    "build_policy",
    "build_reward_model",
    "causal_lm",
    "hidden_states",
    "lm_head",
    "load_reward_model",
    "scalar_head",
    "sequence_rewards",
    "values",
]

T = TypeVar("T")


class Networks(nn.Module):
    """All networks that a stage trains, as one module for the distributed engine.

    `forward(function)` is `function(self)`. FSDP gathers weights during a forward pass only, so
    everything that reads weights runs inside the function, including the LM head and the loss.
    """

    # A stage has some of these.
    policy: "adapters.Network"
    reward: "adapters.Network"
    critic: PreTrainedModel

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        # accelerate's FSDP reads the layers to wrap from this attribute.
        layers = [getattr(n, "_no_split_modules", None) or () for n in networks.values()]
        self._no_split_modules = sorted({name for names in layers for name in names})

    def forward(self, function: Callable[["Networks"], T]) -> T:
        return function(self)


def build_policy(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    device: torch.device | str = "cpu",
    setting: str = "model",
) -> "adapters.Network":
    """A causal LM from a path, or a small Llama with random weights, tested on its device.

    If the path holds an adapter, training continues it and its base model stays frozen. With
    `lora_rank` any other model gets a new adapter, which is trained alone. Errors name `setting`.
    """
    found = None
    if config.model is None:
        settings = small_llama(config, tokenizer, max_length=max_length)
        model = build(AutoModelForCausalLM, settings, config)
    else:
        found = adapters.find_adapter(config.model, setting=setting)
        path = found.base if found else config.model
        with adapters.named_base(found, setting=setting):
            load_settings(path, setting=setting)
            model, _ = load(AutoModelForCausalLM, path, config, setting=setting)
    check_vocabulary(tokenizer, vocabulary(model), setting=setting)
    policy: adapters.Network = model
    if found is not None:
        policy = adapters.load_adapter(model, found, config, setting=setting, task="CAUSAL_LM")
        adapters.check_output(policy, setting=setting)
    elif config.lora_rank:
        policy = adapters.new_adapter(model, config, task="CAUSAL_LM")
    settled(policy)
    use_checkpointing(model, config.gradient_checkpointing)
    moved(policy, device)
    prove(policy, max_length=max_length, packing=noted(model).packs)
    return policy
