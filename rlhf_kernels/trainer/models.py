"""The networks and the forward passes that training needs."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import rlhf_kernels as rk

from .config import ModelConfig
from .data import Batch, position_ids
from .recorder import kernel

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


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The causal LM, below LoRA's wrapper if there is one."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def lm_head(policy: nn.Module, batch: Batch) -> Head:
    """The hidden states of the completion's tokens and the head over them."""
    model = causal_lm(policy)
    hidden = _hidden(model, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    # The same dtype under autocast too, where the weights stay fp32.
    weight, bias = (None if t is None else t.to(hidden.dtype) for t in (head.weight, head.bias))
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(hidden, weight, bias, getattr(config, "final_logit_softcapping", None), scale)


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    # Layers recompute in training mode only, and keep a cache for decoding only outside it.
    training = getattr(model, "recomputes", False) and torch.is_grad_enabled()
    if training != model.training:
        model.train(training)
    return model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        use_cache=False,
    ).last_hidden_state


def values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    """Values `[B, T]` of the states in which the completion's tokens were chosen."""
    hidden = _hidden(critic, batch)[:, -batch.completion_mask.shape[1] - 1 : -1]
    return scalar_head(critic)(hidden)[..., 0]


def sequence_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Reward `[B]` of each sequence, read at its last token."""
    hidden = _hidden(model, batch)
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


def _loading(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def build_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> nn.Module:
    """A causal LM from a path, or a small Llama with random weights."""
    if config.model is not None:
        model = AutoModelForCausalLM.from_pretrained(config.model, **_loading(config))
    else:
        sizes = LlamaConfig(
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
        model = AutoModelForCausalLM.from_config(sizes, **_loading(config))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"model: expected embeddings of {len(tokenizer)} tokens in {config.model}")
    policy = _trained(model, config)
    _check_head(policy)
    return policy


def _check_head(policy: nn.Module) -> None:
    """Requires that `lm_head` gives the model's own logits, whatever its architecture does."""
    ids = torch.arange(4, device=policy.device)[None] % policy.config.get_text_config().vocab_size
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 1:] >= 0)
    with torch.no_grad():
        head = lm_head(policy, batch)
        logits = nn.functional.linear(head.hidden, head.weight, head.bias).float() * head.scale
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        theirs = causal_lm(policy)(input_ids=ids).logits[:, :-1].float()
    tolerance = 1e-3 if head.hidden.dtype is torch.float32 else 0.1
    if not torch.allclose(logits, theirs, atol=tolerance, rtol=tolerance):
        name = type(causal_lm(policy)).__name__
        raise ValueError(f"model: {name} does more between hidden states and logits than its head")


def build_critic(policy: nn.Module, config: ModelConfig, path: str | None = None) -> nn.Module:
    """A value model: a reward model from a path, or the policy's backbone under a head of zeros."""
    if path is not None:
        return _trained(load_reward_model(path, config), config).to(policy.device)
    base = causal_lm(policy)
    settings = copy.deepcopy(base.config)
    settings.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(settings, dtype=base.dtype)
    if not config.lora_rank:
        critic.base_model.load_state_dict(base.base_model.state_dict())
    else:
        # LoRA has renamed the wrapped layers.
        source = {k.replace(".base_layer", ""): v for k, v in base.base_model.state_dict().items()}
        critic.base_model.load_state_dict({k: v for k, v in source.items() if "lora_" not in k})
    nn.init.zeros_(scalar_head(critic).weight)
    return _trained(critic, ModelConfig(gradient_checkpointing=config.gradient_checkpointing)).to(
        policy.device
    )


def load_reward_model(path: str, config: ModelConfig) -> PreTrainedModel:
    """A model with one output per sequence; its head is new where the path has none."""
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, **_loading(config)
    )
    return _settled(model)


def build_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> nn.Module:
    """A reward model to train: from a path, or on a small Llama with random weights."""
    if config.model is not None:
        return _trained(load_reward_model(config.model, config), config)
    policy = build_policy(config, tokenizer, max_length=max_length)
    critic = build_critic(policy, config)
    nn.init.normal_(scalar_head(critic).weight, std=1.0 / math.sqrt(config.hidden_size))
    return critic


class Reference(NamedTuple):
    """The frozen policy: a copy, or the policy itself with its adapters switched off."""

    model: nn.Module | None

    @classmethod
    def of(cls, policy: nn.Module) -> "Reference":
        if hasattr(policy, "disable_adapter"):
            return cls(None)
        return cls(_settled(copy.deepcopy(policy).requires_grad_(False)))

    def __call__(self, networks: Networks, batch: Batch) -> Head:
        if self.model is not None:
            return lm_head(self.model, batch)
        with adapters_off(networks.policy):
            return lm_head(networks.policy, batch)


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    manager: AbstractContextManager[Any] = nullcontext()
    if hasattr(policy, "disable_adapter"):
        manager = policy.disable_adapter()
    with manager:
        yield
