"""Every causal LM that transformers ships, built small from its configuration."""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

VOCABULARY = 99

# What configurations call their sizes; each takes those that it has a number for.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "emb_dim", "word_embed_proj_dim",
         "embedding_size", "lru_width"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff",
         "d_inner", "dim_ff", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "head_dim", "dim_head", "kv_channels", "d_kv", "q_lora_rank", "kv_lora_rank",
         "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "mamba_d_head", "mamba_head_dim"), 16
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "num_decoder_layers", "num_attention_heads", "n_head", "n_heads", "num_heads",
         "decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads",
         "num_encoder_attention_heads", "num_key_value_heads", "n_kv_heads", "moe_topk", "moe_k",
         "num_experts_per_tok", "mamba_expand", "n_mamba_heads", "linear_num_value_heads",
         "linear_num_key_heads", "eos_token_id"), 2
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads",
         "mamba_num_heads", "mamba_dt_rank", "time_step_rank"), 4
    ),
    **dict.fromkeys(
        ("encoder_layers", "num_encoder_layers", "n_group", "topk_group", "n_shared_experts",
         "n_groups", "mamba_n_groups", "bos_token_id"), 1
    ),
    **dict.fromkeys(
        ("qk_rope_head_dim", "mamba_d_state", "state_size", "ssm_state_size",
         "hidden_size_per_layer_input"), 8
    ),
    "qk_head_dim": 24,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("pad_token_id", "num_kv_shared_layers"), 0),
}  # fmt: skip

_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}

# Settings that others depend on, or without which a small model would lack what is telling in the
# large one. None: the configuration's own.
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "kimi_linear", "bailing_hybrid", "granitemoehybrid"), _LINEAR),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _LINEAR),
    **dict.fromkeys(("lfm2", "lfm3"), _CONVOLUTION),
    **{key: {"head_dim": None} for key in ("axk1", "deepseek_v3", "youtu", "falcon")},
    **{key: {"head_dim": 16} for key in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"head_dim": None, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {
        "mm_tokens_per_image": 4,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16),
        "attn_layers": ["local", "local"], "max_position_embeddings": None,
    },
    "xlnet": {"max_position_embeddings": None},
    "zamba2": {
        "num_hidden_layers": 3, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1], "attention_hidden_size": 64, "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

#: Types that are not built here, and why.
LEFT_OUT = {
    **dict.fromkeys(
        ("codegen", "prophetnet", "xlstm", "zamba", "longcat_flash", "dots1", "mimo_v2_flash",
         "dbrx", "cohere_compass_text", "dots3_note", "gemma4_assistant",
         "gemma4_unified_assistant", "qwen4_exp", "qwen4_exp_text"),
        "needs sizes that fit each other in more ways than the table of sizes knows",
    ),
    **dict.fromkeys(
        ("git", "got_ocr2", "moss_transcribe_diarize", "phi4_multimodal", "dots3_note_text", "blt",
         "kimi_linear"), "a tower or table of a fixed size makes it large"
    ),
    **dict.fromkeys(("gemma3n",), "needs the package timm"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "generates sound, conditioned on text"),
    "xmod": "needs a language for its adapters",
}  # fmt: skip


def _sized(settings: PretrainedConfig, kind: str, more: dict[str, Any]) -> dict[str, Any]:
    own = _OWN.get(kind, {}) | more
    plain = (int, float, type(None))

    def current(name: str) -> Any:
        # Where layers differ there is no value for all of them, and they keep their own.
        differs = getattr(settings, "per_layer_attributes", None) or ()
        return "" if name in differs else getattr(settings, name, "")

    found = {
        name: size
        for name, size in _SIZES.items()
        if isinstance(current(name), plain)
        and (current(name) is not None or name.endswith("token_id"))
    }
    found = {name: size for name, size in found.items() if own.get(name, size) is not None}
    return found | {name: value for name, value in own.items() if value is not None}


def settings(kind: str, **more: Any) -> PretrainedConfig:
    """A small configuration of a model type; `more` settings win."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    text = default.get_text_config()
    if getattr(default, "text_config", None) is text:
        whole = {k: v for k, v in _OWN.get(kind, {}).items() if hasattr(default, k)}
        small = type(text)(**_sized(text, text.model_type, more))
        return cls(text_config=small, **(whole if text.model_type != kind else {}))
    found = cls(**_sized(default, kind, more))
    if hasattr(found, "is_decoder"):
        found.is_decoder = True
    return found


def small_model(kind: str, **more: Any) -> nn.Module:
    """A causal LM with weights so strong that positions and neighbours would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings(kind, **more)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                module.weight.mul_(4)
    return model
