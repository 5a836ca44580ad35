"""Policy, critic and reference, and the two forward passes that training needs."""

import copy

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .config import ModelConfig
from .data import Batch, position_ids


def build_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> PreTrainedModel:
    """A causal LM from a path, or a small Llama with random weights."""
    if config.model is not None:
        policy = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    else:
        policy = AutoModelForCausalLM.from_config(
            LlamaConfig(
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
        )
    # Never in training mode: only without dropout do two passes over the same tokens agree, and the
    # first ratio equal 1.
    return policy.eval()


def build_critic(policy: PreTrainedModel) -> PreTrainedModel:
    """A value model: a copy of the policy's backbone under a scalar head that starts at zero."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForTokenClassification.from_config(config, dtype=policy.dtype)
    getattr(critic, critic.base_model_prefix).load_state_dict(policy.base_model.state_dict())
    for parameter in value_head(critic).parameters():
        torch.nn.init.zeros_(parameter)
    return critic.to(policy.device).eval()


def value_head(critic: PreTrainedModel) -> torch.nn.Module:
    """The critic's last layer, whose name differs between architectures."""
    return critic.score if hasattr(critic, "score") else critic.classifier


def build_reference(policy: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of the policy."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def completion_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits `[B, T, V]` that predict the completion's tokens; a strided view, not a copy."""
    width = batch.completion_mask.shape[1]
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits[:, :-1]


def completion_values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    """Values `[B, T]` of the states in which the completion's tokens were chosen."""
    width = batch.completion_mask.shape[1]
    return critic(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
    ).logits[:, -width - 1 : -1, 0]


def completion_labels(batch: Batch) -> Tensor:
    """The completion's tokens `[B, T]`, -100 on padding."""
    return torch.where(batch.completion_mask, batch.completion_ids, -100)
