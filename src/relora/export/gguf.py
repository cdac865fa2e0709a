"""Conversion of a plain model folder into one GGUF file, the format of llama.cpp and of the programs built on it.

GGUF (ggml's docs/gguf.md) consists of a header of typed keys, a table of tensors, and their data. The package `gguf`,
which is part of llama.cpp, writes the format and maps the names of tensors. Some weights are also arranged in another
way than in the model folder:

    llama     rotary positions rotate pairs of rows of a head of q and k: rows i and i + d/2 in transformers, rows 2i
              and 2i + 1 in llama.cpp; so the two halves of the rows of each head are interleaved
    gpt_neox  the rows of q, k and v have the order [heads, 3, d] -> [3, heads, d]
    gpt2      the weights of Conv1D are [in, out] -> [out, in]
    qwen2     no difference

Vectors (norms, biases) and learned positions stay fp32. q8_0 stores 32 entries of a row in 8 bits each with one fp16
scale, so the rounding error is at most 1/254 of the largest of the 32. Matrices whose row length is not a multiple of
32 are stored as fp16.

Tensors are read, cast and written one at a time, so memory holds at most twice the largest tensor in fp32.

The price: on a CPU, llama.cpp takes GELU from a table in fp16, so the logits of GPT-2 and GPT-NeoX differ by about
0.001 of their spread. Those of the other architectures agree within the rounding of fp32.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from relora.errors import RunStopped, UserError
from relora.export.gguf_vocabulary import Value, vocabulary
from relora.files.atomic import atomic_file
from relora.files.untrusted import CONFIG_BYTES, INDEX_BYTES, inside, read_json
from relora.messages import first_line, short_name, short_repr
from relora.model.load import DTYPES, open_model

if TYPE_CHECKING:
    import gguf

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2", "gpt_neox": "gptneox"}
"""llama.cpp's names of the supported architectures, by transformers' `model_type`."""

GGUF_DTYPES = {
    "fp32": ("F32", "ALL_F32"),
    "fp16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""GGUF's names of the type of a tensor and of a file, by dtype."""

_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Constants that older versions of transformers stored among the weights."""
_BLOCK = 32
"""Number of entries of a row that share a scale in q8_0."""


class _Entry(NamedTuple):
    """One tensor of the GGUF file; its data is read only when it is written."""

    name: str
    """Name in the GGUF file, such as `blk.0.attn_q.weight`."""
    shape: tuple[int, ...]
    dtype: str
    """One of `GGUF_DTYPES`."""
    read: Callable[[], Tensor]
    """Reads the tensor, in llama.cpp's arrangement."""


def check_gguf(file: Path, dtype: str) -> None:
    """Raise `UserError` if the package `gguf` is not installed, there is no such `dtype`, or `file` exists."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--format gguf needs gguf, which is not installed; run: pip install 'relora[gguf]'") from None
    if dtype not in GGUF_DTYPES:
        raise UserError(f"dtype: `{dtype}` is none of {', '.join(GGUF_DTYPES)}")
    if file.exists():
        raise UserError(f"{file}: exists and was left as it is; give another file, or remove it first")


def write_gguf(folder: Path, file: Path, tokenizer: PreTrainedTokenizerFast, dtype: str = "fp32") -> Path:
    """Write a GGUF file from a model folder and its tokenizer; it is whole or absent (see `files.atomic`).

    Args:
        dtype: one of `GGUF_DTYPES`.

    Returns:
        The file.

    Raises:
        UserError: `check_gguf`, `open_model` or `vocabulary` raise it; the architecture is not one of `ARCHITECTURES`
            or has a setting that llama.cpp does not support; weights are missing, or not finite in `dtype`. Nothing has
            been written.
        RunStopped: the disk is full or refuses the write.
    """
    check_gguf(file, dtype)
    with torch.device("meta"):
        shapes = open_model(folder)
    config = shapes.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{folder}: {short_repr(config.model_type)} cannot be written as GGUF; what can: {', '.join(ARCHITECTURES)}"
        )
    _check_supported(config, folder)
    rows = shapes.get_input_embeddings().num_embeddings
    keys = {**_shape_keys(config, rows), **vocabulary(tokenizer, rows, _ends(folder, config))}
    try:
        with ExitStack() as opened:
            entries = _entries(shapes, folder, dtype, opened)
            with atomic_file(file, replace=False, parents=True) as partial:
                _write(partial, ARCHITECTURES[config.model_type], keys, entries, dtype)
    except OSError as error:
        raise RunStopped(f"{file}: could not be written: {error.strerror or first_line(str(error))}") from error
    return file


def _ends(folder: Path, config: PreTrainedConfig) -> list[int]:
    """Return the ids at which a model's generation settings, or else its configuration, end a text."""
    file, ends = folder / "generation_config.json", config.eos_token_id
    if file.is_file():
        ends = read_json(file, CONFIG_BYTES[file.name]).get("eos_token_id", ends)
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _check_supported(config: PreTrainedConfig, folder: Path) -> None:
    """Raise `UserError` for a setting that llama.cpp's implementation of the architecture does not support."""
    model_type, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    activation = config.activation_function if model_type == "gpt2" else config.hidden_act
    activations = ("silu", "swish") if model_type in ("llama", "qwen2") else ("gelu", "gelu_new", "gelu_pytorch_tanh")
    scaling = rope.get("rope_type", "default")
    scalings = ("default", "linear", "llama3") if model_type == "llama" else ("default",)
    scales_attention = model_type == "gpt2" and (
        config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
    )
    unsupported = {
        f"the activation {short_repr(activation)}": activation not in activations,
        f"rotary positions of type {short_repr(scaling)}": scaling not in scalings,
        "sliding-window attention": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "attention without biases": model_type == "gpt_neox" and not config.attention_bias,
        "a scale of attention of its own": scales_attention,
        "cross-attention": getattr(config, "add_cross_attention", False),
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise UserError(
                f"{folder}: has {feature}, which llama.cpp does not compute for {model_type}; GGUF cannot say it"
            )


def _shape_keys(config: PreTrainedConfig, rows: int) -> dict[str, Value]:
    """Return the keys that describe the model's shape, prefixed with llama.cpp's name of the architecture.

    Args:
        rows: number of rows of the embedding.
    """
    model_type, heads = config.model_type, config.num_attention_heads
    intermediate = (config.n_inner or 4 * config.hidden_size) if model_type == "gpt2" else config.intermediate_size
    keys: dict[str, Value] = {
        "vocab_size": rows,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": intermediate,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
    }
    if model_type in ("llama", "qwen2"):
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        keys["attention.layer_norm_epsilon"] = float(
            config.layer_norm_epsilon if model_type == "gpt2" else config.layer_norm_eps
        )
    if model_type == "gpt_neox":
        keys["use_parallel_residual"] = config.use_parallel_residual
    if model_type != "gpt2":
        rope, size = config.rope_parameters, _head_size(config)
        keys["rope.freq_base"] = float(rope["rope_theta"])
        keys["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
        keys |= {"attention.key_length": size, "attention.value_length": size}
    return {f"{ARCHITECTURES[model_type]}.{key}": value for key, value in keys.items()}


def _head_size(config: PreTrainedConfig) -> int:
    """Return the size d of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _entries(shapes: PreTrainedModel, folder: Path, dtype: str, opened: ExitStack) -> list[_Entry]:
    """List all tensors of the GGUF file, in the model's order.

    Args:
        shapes: the model on the meta device.
        opened: keeps the model's files open until the tensors are written.

    Raises:
        UserError: a weight is missing, has another shape than config.json wants, or has no name in GGUF.
    """
    import gguf

    config = shapes.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    stored = _open_weights(folder, opened)
    entries = []

    def add(name: str, key: str, parameter: Tensor) -> None:
        shape = tuple(_arranged(config, name, parameter).shape)
        read = partial(_read_arranged, stored[key], key, config, name)
        entries.append(_Entry(name, shape, _tensor_dtype(name, shape, dtype), read))

    keys = _stored_keys(shapes, stored, folder)
    for path, key in keys.items():
        parameter = shapes.get_parameter(path)
        stored_shape = stored[key].get_slice(key).get_shape()
        if stored_shape != list(parameter.shape):
            sides = f"{short_repr(stored_shape)} where config.json wants {list(parameter.shape)}"
            raise UserError(f"{folder}: `{key}` is {sides}")
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{folder}: `{path}` has no place in a GGUF file of {architecture}")
        add(name, key, parameter)
        has_head = any(one.startswith("lm_head.") for one in keys)
        if architecture == "gptneox" and name == "token_embd.weight" and not has_head:
            # the other architectures of llama.cpp use the embedding if there is no head
            add("output.weight", key, parameter)
    if getattr(config, "rope_parameters", {}).get("rope_type", "default") != "default":
        factors = _rope_factors(config)
        entries.append(_Entry("rope_freqs.weight", tuple(factors.shape), "fp32", lambda: factors))
    return entries


def _tensor_dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return the dtype in which a tensor is stored in a file of `dtype`."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "fp32"
    if dtype == "q8_0" and shape[-1] % _BLOCK:
        return "fp16"
    return dtype


def _open_weights(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """Open the weight files of a model folder that `open_model` has accepted.

    Returns:
        The open file that holds each tensor, by the tensor's key.

    Raises:
        UserError: a file is missing or damaged, or holds low-rank factors.
    """
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(read_json(index, INDEX_BYTES)["weight_map"].values()))
    stored: dict[str, Any] = {}
    for name in names:
        try:
            handle = opened.enter_context(safe_open(inside(folder, name), framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{folder}: has no {name}, which holds its weights") from None
        except SafetensorError as error:
            raise UserError(f"{folder / name}: damaged, or not a safetensors file: {first_line(str(error))}") from None
        stored |= dict.fromkeys(handle.keys(), handle)
    for key in sorted(stored):
        if "lora_" in key:
            raise UserError(f"{folder}: holds low-rank factors (`{short_name(key)}`); merge them and save it again")
    return stored


def _stored_keys(shapes: PreTrainedModel, stored: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the key of every parameter in the files, by its path.

    A tied parameter appears once, unless the files hold it with two values, by which transformers unties it. Some files
    were written from the model without its head, so their keys lack the prefix; others name the head `embed_out`.

    Raises:
        UserError: a parameter has no key, or a weight in the files belongs to no parameter.
    """
    keys: dict[str, str] = {}
    key_of: dict[int, str] = {}
    duplicates: set[str] = set()
    prefix = f"{shapes.base_model_prefix}."
    for path, parameter in shapes.named_parameters(remove_duplicate=False):
        names = (path, path.removeprefix(prefix), path.replace("lm_head.", "embed_out."))
        key, tied = next((name for name in names if name in stored), None), key_of.get(id(parameter))
        if tied is not None and (key is None or torch.equal(*(stored[one].get_tensor(one) for one in (key, tied)))):
            duplicates.add(key or tied)
        elif key is None:
            raise UserError(f"{folder}: its weights lack `{path}`; they are incomplete or of another architecture")
        else:
            keys[path] = key_of[id(parameter)] = key
    known = {*keys.values(), *duplicates, *(name for name, _ in shapes.named_buffers())}
    for key in sorted(stored):
        if key not in known and not _OLD_BUFFERS.search(key):
            raise UserError(
                f"{folder}: holds `{short_name(key, 160)}`, which is no part of a {shapes.config.model_type} language "
                "model; write it without (`save_pretrained`) if it is not needed"
            )
    return keys


def _read_arranged(file: Any, key: str, config: PreTrainedConfig, name: str) -> Tensor:
    """Read a tensor from an open safetensors file, in llama.cpp's arrangement."""
    return _arranged(config, name, file.get_tensor(key))


def _arranged(config: PreTrainedConfig, name: str, weight: Tensor) -> Tensor:
    """Arrange a weight or bias as llama.cpp has it (see the module).

    Args:
        name: name in the GGUF file, such as `blk.0.attn_q.weight`.
    """
    part = name.split(".")[-2]
    if config.model_type == "llama" and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    if config.model_type == "gpt_neox" and part == "attn_qkv":
        parts = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        return parts.transpose(0, 1).reshape(weight.shape)
    if config.model_type == "gpt2" and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and weight.dim() == 2:
        return weight.T
    return weight


def _rope_factors(config: PreTrainedConfig) -> Tensor:
    """Return the divisors [d/2] by which llama.cpp divides the rotary angle of each pair of rows."""
    rope, size = config.rope_parameters, _head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    factors: Tensor = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size) / scaled
    return factors


def _write(file: Path, architecture: str, keys: Mapping[str, Value], entries: list[_Entry], dtype: str) -> None:
    """Write keys and tensors with the package `gguf`, one tensor at a time."""
    import gguf

    with closing(gguf.GGUFWriter(file, architecture)) as writer:
        writer.add_file_type(gguf.LlamaFileType[GGUF_DTYPES[dtype][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in keys.items():
            _add_key(writer, key, value)
        for entry in entries:
            tensor_type = gguf.GGMLQuantizationType[GGUF_DTYPES[entry.dtype][0]]
            block_entries, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
            size = prod(entry.shape) // block_entries * block_bytes
            # the writer ignores the array's dtype where raw_dtype is given
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_encoded(entry))


def _add_key(writer: "gguf.GGUFWriter", key: str, value: Value) -> None:
    """Add a key with the GGUF type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _encoded(entry: _Entry) -> np.ndarray[Any, np.dtype[Any]]:
    """Read a tensor and return it as an array in its dtype; `UserError` if an entry is not finite in this dtype."""
    import gguf

    weight = entry.read().float().contiguous()
    is_q8_0 = entry.dtype == "q8_0"
    # of q8_0 it is enough that the largest scale is finite
    cast = (weight.abs().amax() / 127).half() if is_q8_0 else weight.to(DTYPES[entry.dtype])
    if not cast.isfinite().all():
        largest = weight.abs().where(weight.isfinite(), 0).max().item()
        raise UserError(
            f"{entry.name}: not all of its numbers are finite in {entry.dtype} (the largest is {largest:.6g}); "
            "nothing was written; try bf16 or fp32"
        )
    if is_q8_0:
        blocks: np.ndarray[Any, np.dtype[Any]] = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return blocks
    return (cast.view(torch.int16) if entry.dtype == "bf16" else cast).numpy()  # numpy has no bf16
