"""Reward models and critics: networks with one number per text, or per token."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import adapters
from .classes import scalar_class
from .config import ModelConfig, require
from .data import Batch
from .errors import UserError, blamed_on, named_by
from .forward import causal_lm, hidden_states, vocabulary
from .loading import build, load, load_settings, names, small_llama
from .modes import N, moved, noted, recompute, settled, use_checkpointing
from .pooling import own_logits, padding_side
from .probe import prove_states
from .tokenizers import check_vocabulary


def values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    """Values `[B, T]` of the states before each token of the completion."""
    hidden = hidden_states(critic, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    found: Tensor = _known_head(critic)(hidden)[..., 0]
    return found


def sequence_rewards(model: nn.Module, batch: Batch) -> Tensor:
    """Reward `[B]` of each sequence, equal to the model's own output for that sequence alone.

    Raises:
        UserError: a sequence is longer than the model's maximum length.
    """
    base = causal_lm(model)
    recompute(base, torch.is_grad_enabled())
    return own_logits(base, batch.input_ids, batch.attention_mask, noted(base).padding)


def scalar_head(model: PreTrainedModel) -> nn.Linear | None:
    """The linear layer from hidden states to the number, if the model ends with one."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    return None


def _known_head(model: PreTrainedModel) -> nn.Linear:
    """The scalar head of a model that has been found to have one."""
    head = scalar_head(model)
    assert head is not None
    return head


def _is_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the head, or to a pooler in the base model."""
    return not key.startswith(f"{model.base_model_prefix}.") or "pooler" in key


def _is_lm_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the head of a language model."""
    return not key.startswith(f"{model.base_model_prefix}.")


def _one_output(settings: PretrainedConfig, path: str, setting: str) -> None:
    """Requires that a classifier has one output; other models do not have a scalar head yet."""
    named = settings.architectures or []
    classifies = any(n.endswith("ForSequenceClassification") for n in named)
    if classifies and settings.num_labels != 1:
        expected = "a reward model with one output for a text (num_labels 1)"
        raise UserError(f"{setting}: expected {expected}, found {settings.num_labels} in {path}")


def _open(
    path: str, config: ModelConfig, *, setting: str, trains: bool
) -> tuple["adapters.Network", list[str]]:
    """A reward model, with the adapter if its path holds one, and the names of new weights."""
    found = adapters.find_adapter(path, setting=setting)
    base = found.base if found else path
    with adapters.named_base(found, setting=setting):
        settings = load_settings(base, setting=setting)
        _one_output(settings, base, setting)
        cls = scalar_class(settings, setting=setting)
        model, new = load(
            cls,
            base,
            config,
            setting=setting,
            num_labels=1,
            may_be_new=_is_head,
            may_be_left=_is_lm_head,
        )
    wrapped: adapters.Network = model
    heads = _head_modules(model, new)
    if found is not None:
        kept = found.config.task_type == "SEQ_CLS"
        wrapped = adapters.load_adapter(
            model, found, config, setting=setting, task="SEQ_CLS", heads=() if kept else heads
        )
        # A weight that the adapter stores is not new.
        new = [k for k in new if not kept or not _trained_by(wrapped, k)]
    elif config.lora_rank and trains:
        wrapped = adapters.new_adapter(model, config, task="SEQ_CLS", heads=heads)
    if new and not trains:
        lacks = f"its {type(model).__name__} has no trained {names(new)}"
        raise UserError(f"{setting}: expected a trained reward model in {path}, but {lacks}")
    return wrapped, new


def _head_modules(model: PreTrainedModel, new: Sequence[str]) -> list[str]:
    """The names of the head's modules, and of new modules in the base model."""
    prefix = model.base_model_prefix
    above = [n for n, m in model.named_children() if n != prefix and len(list(m.parameters()))]
    pooled = {k.rpartition(".")[0] for k in new if k.startswith(f"{prefix}.")}
    return [*above, *sorted(pooled)]


def _trained_by(wrapped: "adapters.Network", key: str) -> bool:
    """Whether an adapter stores a weight of its base model."""
    module = key.rpartition(".")[0]
    config: Any = wrapped.peft_config[adapters.TRAINED]
    saved = config.modules_to_save or ()
    return any(f".{module}.".endswith(f".{s}.") or f".{s}." in f".{module}." for s in saved)


def _ready(model: N, config: ModelConfig) -> N:
    """Turns dropout off, enables checkpointing and finds the padding that the class supports."""
    settled(model)
    base = causal_lm(model)
    use_checkpointing(base, config.gradient_checkpointing)
    noted(base).padding = padding_side(base)
    return model


def load_reward_model(
    path: str, config: ModelConfig, *, setting: str = "reward_funcs"
) -> "adapters.Network":
    """A trained reward model for scoring.

    Raises:
        UserError: it has more than one output, or no trained scoring head.
    """
    config = dataclasses.replace(config, lora_rank=0, lora_alpha=None, gradient_checkpointing=False)
    return _ready(_open(path, config, setting=setting, trains=False)[0], config)


def build_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> "adapters.Network":
    """A reward model to train, from a path or as a small Llama with random weights."""
    if config.model is None:
        settings = small_llama(config, tokenizer, max_length=max_length)
        plain = _on_policy(build(AutoModelForCausalLM, settings, config), config)
        nn.init.normal_(_known_head(plain).weight, std=config.hidden_size**-0.5)
        model: adapters.Network = plain
        if config.lora_rank:
            model = adapters.new_adapter(plain, config, task="SEQ_CLS", heads=["score"])
        return _ready(model, config)
    model, new = _open(config.model, config, setting="model", trains=True)
    if new:
        warnings.warn(f"model: {names(new)} of {config.model} are new: untrained", stacklevel=2)
    base = causal_lm(model)
    check_vocabulary(tokenizer, vocabulary(base), setting="model")
    text = base.config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    if padding is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        # Scoring more than one row needs a padding token. If the end token were the padding token,
        # the class would no longer read the score at the end token.
        base.config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    _check_gradients(_ready(model, config))
    return model


def _check_gradients(model: nn.Module) -> None:
    """Requires that the score, as `sequence_rewards` computes it, is differentiable."""
    base = causal_lm(model)
    end = getattr(base.config.get_text_config(), "eos_token_id", None) or 1
    end = end[0] if isinstance(end, list) else end
    # An end token beyond the vocabulary is a common default of configurations.
    ids = torch.full((1, 4), end if 0 <= end < vocabulary(base) else 1, device=base.device)
    weight = next(p for p in model.parameters() if p.requires_grad)
    with blamed_on("model", f"{type(base).__name__} cannot be trained"):
        score = sequence_rewards(model, Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids))
        torch.autograd.grad(score.sum(), weight, allow_unused=True)


def build_critic(
    policy: "adapters.Network", config: ModelConfig, path: str | None = None
) -> PreTrainedModel:
    """A value model: a reward model from a path, or the policy's base model with a zero head.

    All its weights are trained, even if the policy trains an adapter; adapters are merged first.

    Raises:
        UserError: the path holds no decoder with a trained linear scoring head.
    """
    config = dataclasses.replace(config, lora_rank=0, lora_alpha=None)
    if path is None:
        critic = moved(_ready(_on_policy(policy, config), config), policy.device)
        _prove(critic, policy)
        return critic
    reward = load_reward_model(path, config, setting="critic_model")
    sizes = [vocabulary(causal_lm(network)) for network in (policy, reward)]
    expected = f"embeddings of the policy's {sizes[0]} tokens in {path}"
    require(sizes[0] <= sizes[1], "critic_model", expected, sizes[1])
    critic = moved(_ready(adapters.merged(reward), config), policy.device).requires_grad_(True)
    noted(critic).packs = noted(causal_lm(reward)).packs
    _check_critic(critic, path)
    with named_by("critic_model"):
        _prove(critic, policy)
    return critic


def _prove(critic: PreTrainedModel, policy: nn.Module) -> None:
    length = getattr(causal_lm(policy), "proved_length", 0)
    prove_states(critic, max_length=length, packing=noted(critic).packs)


def _on_policy(policy: nn.Module, config: ModelConfig) -> PreTrainedModel:
    """The policy's base model, with its adapter merged, and a linear head of zeros."""
    base = adapters.merged(policy)
    settings = copy.deepcopy(base.config)
    settings.num_labels = 1
    weights = base.base_model.state_dict()
    for ours in (False, True):
        critic = build(scalar_class(settings, setting="model", ours=ours), settings, config)
        plain = scalar_head(critic) is not None and type(critic.base_model) is type(base.base_model)
        if plain and critic.base_model.state_dict().keys() == weights.keys():
            break
    critic.base_model.load_state_dict(weights)
    for weight in _known_head(critic).parameters():
        nn.init.zeros_(weight)
    return critic


def _check_critic(critic: PreTrainedModel, path: str) -> None:
    """Requires causal values per token that agree with the model's own score of a text."""
    name = type(critic).__name__
    expected = f"critic_model: expected a decoder with a linear score in {path}, found {name}"
    head = scalar_head(critic)
    if head is None:
        raise UserError(f"{expected}, which has no linear head over its hidden states")
    size = vocabulary(critic)
    ids = 1 + torch.arange(6, device=critic.device)[None] % (size - 1)
    every = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        try:
            found = head(hidden_states(critic, Batch(ids, every, every)))[0, :, 0]
            parts = [own_logits(critic, ids[:, : n + 1], every[:, : n + 1], None) for n in (2, 5)]
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise UserError(f"{expected}, which does not run as one") from error
    alone = torch.cat(parts).float()
    tolerance = 1e-4 if critic.dtype is torch.float32 else 0.05
    if not torch.allclose(found[[2, 5]].float(), alone, atol=tolerance, rtol=tolerance):
        raise UserError(f"{expected}, which sees later tokens or scores otherwise")
