"""Loads models, and checks which weights transformers left out or initialised."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.import_utils import is_flash_attn_2_available

from .config import ModelConfig, require
from .errors import UserError, blamed_on, one_line
from .finite import check_weights
from .modes import noted


def names(found: Sequence[str], most: int = 3) -> str:
    """Lists up to `most` names, and how many more there are."""
    shown = sorted(found)[:most]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def load_settings(path: str, *, setting: str) -> PretrainedConfig:
    """The configuration of a model in a folder or on the hub.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(path)
        return settings
    except (OSError, ValueError, KeyError) as error:
        found = one_line(error)
        inside = [e.name for e in os.scandir(path) if e.is_dir()] if os.path.isdir(path) else []
        held = [n for n in inside if os.path.isfile(os.path.join(path, n, "adapter_config.json"))]
        if held:
            found = f"it has adapters in folders of its own ({names(held)}); name one of these"
        raise UserError(f"{setting}: cannot load a model from {path}: {found}") from error


def small_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> LlamaConfig:
    """The configuration of the model that is built if no path is given."""
    return LlamaConfig(
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


def _options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    attention = config.attn_implementation
    if attention is None and config.dtype != "float32" and is_flash_attn_2_available():
        attention = "flash_attention_2"
    if attention is not None:
        options["attn_implementation"] = attention
    return options


def _packs(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    flash = _options(config).get("attn_implementation") == "flash_attention_2"
    noted(model).packs = config.packing or flash
    return model


def build(auto: Any, settings: PretrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """A model with random weights; `auto` is a class or an auto class of transformers."""
    make = getattr(auto, "from_config", None) or auto._from_config
    with blamed_on("model", "cannot be built"):
        return _packs(make(settings, **_options(config)), config)


def _check_generation(setting: str, path: str) -> None:
    """Requires that a folder's generation configuration, where it has one, can be read.

    transformers passes over one that it cannot read, and the tokens that end a completion with it.
    """
    file = Path(path) / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    with blamed_on(setting, f"{file} cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
    require(isinstance(content, dict), setting, f"a JSON object in {file}", content)


def load(
    auto: Any,
    path: str,
    config: ModelConfig,
    *,
    setting: str,
    may_be_new: Callable[[PreTrainedModel, str], bool] = lambda model, key: False,
    may_be_left: Callable[[PreTrainedModel, str], bool] = lambda model, key: False,
    **more: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model with the weights of a path; random weights only where `may_be_new` allows them.

    Args:
        auto: a class or an auto class of transformers.
        path: folder or hub name.
        config: dtype and attention.
        setting: the setting that error messages name.
        may_be_new: whether a weight that the path lacks may be random.
        may_be_left: whether an unused weight of the path causes no warning.
        more: options of `from_pretrained`.

    Returns:
        The model, and the names of its new weights.

    Raises:
        UserError: the path cannot be loaded, lacks weights or has weights of other shapes.
    """
    _check_generation(setting, path)
    with blamed_on(setting, f"{path} cannot be loaded"):
        model, report = auto.from_pretrained(
            path, output_loading_info=True, **_options(config), **more
        )
    cls = type(model).__name__
    new, extra = list(report["missing_keys"]), list(report["unexpected_keys"])
    # An entry is a name, or a name and two shapes.
    other = [k if isinstance(k, str) else k[0] for k in report["mismatched_keys"]]
    expected = f"the weights of a {cls}"
    if other:
        raise UserError(f"{setting}: expected {expected} in {path}, found {names(other)} reshaped")
    unasked = [k for k in new if not may_be_new(model, k)]
    if unasked:
        raise UserError(f"{setting}: expected {expected} in {path}, which lacks {names(unasked)}")
    adapted = [k for k in extra if "lora_" in k or "base_layer" in k]
    if adapted:
        found = f"those of an adapter ({names(adapted)}) without its adapter_config.json"
        raise UserError(f"{setting}: expected {expected} in {path}, found {found}")
    left = [k for k in extra if not may_be_left(model, k)]
    if left:
        warnings.warn(f"{setting}: {cls} has no place for {names(left)} of {path}", stacklevel=2)
    check_weights(setting, model)
    if getattr(model, "is_quantized", False):
        method = getattr(model.config.quantization_config, "quant_method", "quantised")
        adapts = config.lora_rank > 0
        require(adapts, "lora_rank", f"> 0, as {path} is quantised ({method})", config.lora_rank)
    return _packs(model, config), new
