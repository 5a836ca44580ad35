"""The networks and the forward passes that training needs."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from .config import ModelConfig, require
from .data import Batch
from .errors import blamed_on
from .forward import Head, causal_lm, hidden_states, lm_head
from .probe import prove, prove_states

T = TypeVar("T")


class Networks(nn.Module):
    """All networks that a stage trains, under one root for the distributed engine.

    `forward(function)` is `function(self)`: whatever reads weights runs inside, while the engine
    has them gathered. So the LM head is applied, and the loss taken, inside.
    """

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        # Where accelerate's FSDP looks for the layers to wrap.
        layers = [getattr(n, "_no_split_modules", None) or () for n in networks.values()]
        self._no_split_modules = sorted({name for names in layers for name in names})

    def forward(self, function: Callable[["Networks"], T]) -> T:
        return function(self)


def values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    """Values `[B, T]` of the states in which the completion's tokens were chosen."""
    hidden = hidden_states(critic, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    return scalar_head(critic)(hidden)[..., 0]


def sequence_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Reward `[B]` of each sequence, read at its last token."""
    hidden = hidden_states(model, batch)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(batch.attention_mask, columns, -1).amax(1)
    rows = torch.arange(len(last), device=last.device)
    return scalar_head(model)(hidden[rows, last])[:, 0]


def scalar_head(model: PreTrainedModel) -> nn.Module:
    """The last layer of a critic or reward model, whose name differs between architectures."""
    return model.score if hasattr(model, "score") else model.classifier


def _settled(model: nn.Module) -> nn.Module:
    """Evaluation mode, and no dropout where checkpointing asks for training mode.

    Only without dropout do two passes over the same tokens agree, and the first ratio equal 1.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def _trained(model: PreTrainedModel, config: ModelConfig) -> nn.Module:
    """Ready to be trained: adapters, checkpointing and mode."""
    wrapped: nn.Module = model
    if config.lora_rank:
        # Only here: an optional package.
        import peft

        settings = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear",
            lora_dropout=0.0,
        )
        wrapped = peft.get_peft_model(model, settings)
        wrapped._no_split_modules = model._no_split_modules
    _settled(wrapped)
    if config.gradient_checkpointing:
        # The second is transformers' older name.
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.recomputes = config.gradient_checkpointing
    return wrapped


def _load(auto: Any, source: str | PretrainedConfig, config: ModelConfig, **more: Any) -> Any:
    """A model from a path, or from a configuration with random weights."""
    more["dtype"] = getattr(torch, config.dtype)
    attention = config.attn_implementation
    if attention is None and config.dtype != "float32" and is_flash_attn_2_available():
        attention = "flash_attention_2"
    if attention is not None:
        more["attn_implementation"] = attention
    make = auto.from_pretrained if isinstance(source, str) else auto.from_config
    where = f"{source} cannot be loaded" if isinstance(source, str) else "cannot be built"
    with blamed_on("model", where):
        model = make(source, **more)
    model.packs = config.packing or attention == "flash_attention_2"
    return model


def build_policy(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A causal LM from a path, or a small Llama with random weights, proved right on its device."""
    source: str | PretrainedConfig | None = config.model
    if source is None:
        source = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=max_length,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    model = _load(AutoModelForCausalLM, source, config)
    rows = model.get_input_embeddings().num_embeddings
    require(len(tokenizer) <= rows, "model", f"embeddings of {len(tokenizer)} tokens", rows)
    policy = _trained(model, config).to(device)
    prove(policy, max_length=max_length, packing=model.packs)
    return policy


def build_critic(policy: nn.Module, config: ModelConfig, path: str | None = None) -> nn.Module:
    """A value model: a reward model from a path, or the policy's backbone under a head of zeros."""
    # Trained whole, even where the policy trains adapters only.
    config, base = dataclasses.replace(config, lora_rank=0), causal_lm(policy)
    if path is not None:
        critic = _trained(load_reward_model(path, config), config).to(policy.device)
        prove_states(critic, max_length=getattr(base, "proved_length", 0), packing=critic.packs)
        return critic
    settings = copy.deepcopy(base.config)
    settings.num_labels = 1
    critic = _load(AutoModelForSequenceClassification, settings, config)
    # LoRA renames the layers that it wraps.
    weights = {k.replace(".base_layer", ""): v for k, v in base.base_model.state_dict().items()}
    critic.base_model.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
    nn.init.zeros_(scalar_head(critic).weight)
    critic = _trained(critic, config).to(policy.device)
    prove_states(critic, max_length=getattr(base, "proved_length", 0), packing=critic.packs)
    return critic


def load_reward_model(path: str, config: ModelConfig) -> PreTrainedModel:
    """A model with one output per sequence; its head is new where the path has none."""
    return _settled(_load(AutoModelForSequenceClassification, path, config, num_labels=1))


def build_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> nn.Module:
    """A reward model to train: from a path, or on a small Llama with random weights."""
    if config.model is not None:
        return _trained(load_reward_model(config.model, config), config)
    critic = build_critic(build_policy(config, tokenizer, max_length=max_length), config)
    nn.init.normal_(scalar_head(critic).weight, std=config.hidden_size**-0.5)
    return critic


class Reference:
    """The frozen policy: a copy, or the policy itself with its adapters switched off."""

    def __init__(self, policy: nn.Module) -> None:
        self.model: nn.Module | None = None
        if not hasattr(policy, "disable_adapter"):
            self.model = _settled(copy.deepcopy(policy).requires_grad_(False))

    def __call__(self, networks: Networks, batch: Batch) -> Head:
        if self.model is not None:
            return lm_head(self.model, batch)
        with networks.policy.disable_adapter():
            return lm_head(networks.policy, batch)
