"""Small sequence classifiers of every architecture of transformers that has one."""

import inspect
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig

# All names under which configurations take their sizes; each gets those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}
for _value, _names in {
    1: "encoder_layers decoder_layers n_group topk_group n_shared_experts",
    2: "num_hidden_layers num_layers n_layer n_layers num_decoder_layers num_experts_per_tok "
    "num_key_value_heads encoder_attention_heads decoder_attention_heads",
    4: "num_attention_heads num_heads n_head n_heads num_experts n_routed_experts "
    "num_local_experts",
    8: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim",
    16: "embedding_size moe_intermediate_size q_lora_rank kv_lora_rank "
    "shared_expert_intermediate_size",
    32: "hidden_size d_model encoder_ffn_dim decoder_ffn_dim d_ff n_embd dim dff emb_dim "
    "embedding_dim pooler_hidden_size d_embed word_embed_proj_dim input_embedding_size "
    "output_embedding_size",
    64: "intermediate_size hidden_dim d_inner ffn_dim max_2d_position_embeddings",
}.items():
    _SIZES |= dict.fromkeys(_names.split(), _value)

_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_dt_rank": 4, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
_GROUPS = "q_groups k_groups v_groups post_attention_groups intermediate_groups output_groups"
_OWN: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "convbert": {"conv_kernel_size": 3, "num_groups": 1, "head_ratio": 2},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False},
    "esm": {"mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 4},
    "jamba": _MAMBA | {"use_mamba_kernels": False},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    "mobilebert": {"intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "modernbert": {"local_attention": 8},
    "modernbert-decoder": {"local_attention": 8},
    "mpt": {"max_seq_len": 128},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1},
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "attention_head_size": 8,
        "feed_forward_size": 32,
        "local_attn_chunk_length": 8,
        "is_decoder": False,
    },
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "squeezebert": dict.fromkeys(_GROUPS.split(), 1) | {"embedding_size": 32},
    "stablelm": {"partial_rotary_factor": 0.5},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {"use_expectation": True},
    "zamba": _MAMBA
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 1,
        "attention_head_dim": 8,
    },
    "zamba2": {
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "attention_head_dim": 8,
        "mamba_d_state": 8,
        "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid"],
    },
}

#: Why an architecture is not built here.
SKIPPED = {
    "canine": "characters, hashed and pooled to at least 128",
    "cohere_compass_text": "sizes that go together",
    "esmc": "proteins",
    "funnel": "sizes that go together",
    "gemma3": "images",
    "layoutlmv2": "images",
    "layoutlmv3": "images",
    "lilt": "layouts",
    "modernvbert": "images",
    "qwen3_5": "images",
    "t5gemma": "sizes of two models",
    "t5gemma2": "images",
    "ultravbert": "images",
}

KINDS = {config.model_type: config for config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}


def small_config(made: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    """A configuration of small sizes, under whatever names it has them."""
    own = _OWN.get(made.model_type, {})
    known = set(inspect.signature(made.__init__).parameters) | set(made.attribute_map)
    known |= {name for parent in made.__mro__ for name in getattr(parent, "__annotations__", {})}
    known |= {"num_labels", "pad_token_id", "bos_token_id", "eos_token_id"}
    sizes = {k: v for k, v in _SIZES.items() if k in known}
    if "qk_rope_head_dim" in sizes:
        # Latent attention: its heads have sizes of their own.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return made(**sizes | own | more)


def small_classifier(kind: str, **more: Any) -> torch.nn.Module:
    """A classifier with one output, with weights so large that texts differ."""
    config = small_config(KINDS[kind], **more)
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    torch.manual_seed(0)
    model = (found[0] if isinstance(found, tuple) else found)(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model
