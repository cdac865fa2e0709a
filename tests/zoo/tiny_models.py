"""Tiny random models of every family that transformers opens as a causal LM.

One shrinker makes the configuration of a family small: it starts from the family's default configuration, and lowers
the sizes whose keys it knows. Of lists with one entry per layer it keeps the entries of a few layers that differ, so
that every kind of layer of the family is in the tiny model. `OVERRIDES` has what some families need beside that, and
`CANNOT_BE_BUILT` the families of which no tiny model can be built, with the reason.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from tests.paths import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PREPARED = ROOT / "tests" / "golden" / "data"
"""Folders `train` and `validation` of prepared text, and a tokenizer of 300 ids."""
TOKENIZER = PREPARED / "train" / "tokenizer"

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types of all families, in the order of transformers."""

VOCABULARY = 320
"""Rows of the embedding; ids from 300 on are never in the text, so that they can stand for images and sounds."""
POSITIONS = 128
WIDTH, HEADS, GROUPS, HEAD_WIDTH = 64, 4, 2, 16
LARGEST_DEPTH = 6
"""Layers of a tiny model, at most."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 320),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim_model"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "lru_width"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "feed_forward_size", "n_inner", "mlp_dim"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "router_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), GROUPS),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "swa_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "global_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), POSITIONS),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 16),
    **dict.fromkeys(("window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("index_topk", "index_n_heads"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_num_heads"), 8),
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "query_pre_attn_scalar": HEAD_WIDTH,
    "first_k_dense_replace": 1,
    "gated_norm_rank": 4,
    "max_window_layers": 1,
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "out_hidden_size": WIDTH,
    "audio_vocab_size": 64,
}
"""Key of a size -> its value in a tiny model; a family's configuration has some of them."""

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks"),
    *("num_encoder_layers", "num_decoder_layers"),
)
"""Keys of a number of layers."""
LAYER_NUMBERS = (
    *("moe_layers", "mlp_only_layers", "hybrid_layer_ids", "cross_attention_layers", "full_attn_idxs"),
    *("ple_layer_ids", "kv_shared_layers"),
)
"""Keys of a list of the numbers of layers."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA3N = {"LAYERS": [3, 4, 33, 34], "num_kv_shared_layers": 2}
GEMMA4 = {"global_head_dim": 32}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
}
DOTS3 = {
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
    "shared_experts_intermediate_size": 32,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "global_config": {"hidden_size": 128, "head_dim": 32},
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
    },
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": DOTS3,
    "falcon": {"DEFAULTS": {"new_decoder_architecture": True}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"q_lora_rank": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD_WIDTH},
    "nemotron": {"num_key_value_heads": GROUPS},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "shape_embed_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> keys that its tiny configuration has beside those of `SIZES`.

A dictionary under the key of a part is for that part. `DEFAULTS` are given already to the default configuration, and
`LAYERS` are the numbers of the layers to keep.
"""

CANNOT_BE_BUILT: dict[str, str] = {
    "emu3": "AutoModelForCausalLM of transformers does not take its text configuration",
    "gemma3n": "its image tower needs the library timm (its text model is `gemma3n_text`)",
    "gemma4_assistant": "a draft model: it computes from the hidden states of another model, not from text",
    "gemma4_unified_assistant": "a draft model: it computes from the hidden states of another model, not from text",
    "mllama": "AutoModelForCausalLM of transformers does not take its text configuration",
    "musicgen": "AutoModelForCausalLM of transformers does not build its decoder; its ids are codes of sound",
    "musicgen_melody": "AutoModelForCausalLM of transformers does not build its decoder; its ids are codes of sound",
}
"""Model type -> the reason why no tiny model of it can be built."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny configuration of a family."""
    overrides = copy.deepcopy(OVERRIDES.get(model_type, {}))
    return _shrunk(CONFIG_MAPPING[model_type], overrides)


def make_tiny_model(model_type: str, folder: Path, *, seed: int = 1) -> Path:
    """Write a tiny random model of a family to `folder`, with a tokenizer; fp32, weights drawn from `seed`.

    Parameters that a new model holds at zero get small random values, so that no path through it is dead.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max() > 0:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _shrunk(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return a small configuration of a class.

    Args:
        overrides: keys with values of their own; a dictionary under the key of a part is for that part.
    """
    defaults = overrides.pop("DEFAULTS", {})
    default = config_class(**defaults)
    tree = {**default.to_dict(), **{key: value for key, value in vars(default).items() if not key.startswith("_")}}
    depth = next((tree[key] for key in DEPTHS if isinstance(tree.get(key), int)), None)
    layers = overrides.pop("LAYERS", None) or _different_layers(tree, depth)
    small: dict[str, Any] = dict(defaults)
    next_id = VOCABULARY - 1
    for key, value in tree.items():
        if isinstance(value, PreTrainedConfig):
            small[key] = _shrunk(type(value), overrides.pop(key, {}))
        elif key in DEPTHS and isinstance(value, int):
            small[key] = len(layers)
        elif key in LAYER_NUMBERS and isinstance(value, list | tuple):
            small[key] = [layers.index(number) for number in value if number in layers]
        elif isinstance(value, list) and depth and len(value) == depth:
            small[key] = [SIZES.get(key, value[number]) for number in layers]
        elif key in SIZES and isinstance(value, int | list) and not isinstance(value, bool):
            small[key] = SIZES[key]
        elif key in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
            small[key] = 0
        elif key == "pad_token_id" and value is not None:
            small[key] = 1
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[key], next_id = next_id, next_id - 1
        elif key == "is_decoder":
            small[key] = True
    if "qk_rope_head_dim" in tree:  # latent attention: head_dim follows from the parts of a head
        small.pop("head_dim", None)
        small["num_key_value_heads"] = HEADS
    small.pop("per_layer_config", None)
    small.update(overrides)
    return config_class(**{key: value for key, value in small.items() if value is not OMITTED})


OMITTED = object()
"""Value of an override that leaves a key to the configuration class."""


def _different_layers(tree: dict[str, Any], depth: int | None) -> list[int]:
    """Choose the numbers of the layers that a tiny model keeps: one of each kind, and two at least.

    Args:
        tree: the default configuration.
        depth: its number of layers.
    """
    depth = depth or 2
    per_layer = [value for value in tree.values() if isinstance(value, list) and len(value) == depth]
    numbers = [value for key, value in tree.items() if key in LAYER_NUMBERS and isinstance(value, list | tuple)]
    kinds: dict[str, int] = {}
    for number in range(depth):
        kind = str([value[number] for value in per_layer] + [number in value for value in numbers])
        kinds.setdefault(kind, number)
    chosen = sorted(kinds.values())[:LARGEST_DEPTH]
    while len(chosen) < min(2, depth):
        chosen.append(next(number for number in range(depth) if number not in chosen))
    return sorted(chosen)
