"""A plain model folder -> one GGUF file that llama.cpp, and whatever is built on it, opens.

GGUF (ggml's docs/gguf.md) is a header of typed keys, a table of tensors and their data; the package `gguf`, which comes
from llama.cpp, writes it and knows the names. Besides the names, this differs from the folder:

    llama     llama.cpp turns rows 2i and 2i + 1 of a head of q and k by one angle, transformers rows i and i + d/2:
              the rows of every head are interleaved
    gpt_neox  rows [heads, 3, d] of q, k and v -> [3, heads, d]
    gpt2      Conv1D keeps [in, out] -> [out, in]
    qwen2     nothing

Vectors (norms, biases) and learned positions stay fp32. q8_0 is 32 numbers of a row in 8 bits with one fp16 scale, so
half a quantum is at most 1/254 of their largest; rows whose length is no multiple of 32 are stored as fp16.

Tensors are read, cast and written one at a time: the memory it takes is twice that of the largest, in fp32.

The price: on a CPU llama.cpp looks GELU up in a table of fp16, so logits of GPT-2 and GPT-NeoX differ by about 0.001
of their spread; those of the others are the same within the rounding of fp32.
"""

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
from relora.files.untrusted import INDEX_BYTES, inside, read_json
from relora.messages import first_line, short_name, short_repr
from relora.model.load import DTYPES, open_model

if TYPE_CHECKING:
    import gguf

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2", "gpt_neox": "gptneox"}
"""llama.cpp's name of the model types that can be written."""

GGUF_DTYPES = {
    "fp32": ("F32", "ALL_F32"),
    "fp16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""What GGUF calls a tensor of each, and a file."""

_BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""


class _Entry(NamedTuple):
    """A tensor of the file; it is read when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def check_gguf(file: Path, dtype: str) -> None:
    """`UserError` if the package `gguf` is not installed, there is no such `dtype`, or `file` exists."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--format gguf needs gguf, which is not installed; run: pip install 'relora[gguf]'") from None
    if dtype not in GGUF_DTYPES:
        raise UserError(f"dtype: `{dtype}` is none of {', '.join(GGUF_DTYPES)}")
    if file.exists():
        raise UserError(f"{file}: exists and was left as it is; give another file, or remove it first")


def write_gguf(folder: Path, file: Path, tokenizer: PreTrainedTokenizerFast, dtype: str = "fp32") -> Path:
    """Write `file` from a model folder and its tokenizer; it is whole or absent (see `files.atomic`).

    Raises:
        UserError: what `check_gguf`, `open_model` and `vocabulary` refuse; an architecture that is none of
            `ARCHITECTURES` or computes what llama.cpp does not; weights that are not all there, or not finite in
            `dtype`. Nothing was written.
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
    _check_computed_alike(config, folder)
    rows = shapes.get_input_embeddings().num_embeddings
    keys = {**_shape_keys(config, rows), **vocabulary(tokenizer, rows)}
    try:
        with ExitStack() as opened:
            entries = _entries(shapes, folder, dtype, opened)
            with atomic_file(file, replace=False, parents=True) as partial:
                _write(partial, ARCHITECTURES[config.model_type], keys, entries, dtype)
    except OSError as error:
        raise RunStopped(f"{file}: could not be written: {error.strerror or first_line(str(error))}") from error
    return file


def _check_computed_alike(config: PreTrainedConfig, folder: Path) -> None:
    """`UserError` for what a configuration can say and llama.cpp's architecture of the same name does not compute."""
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    activation = config.activation_function if kind == "gpt2" else config.hidden_act
    activations = ("silu", "swish") if kind in ("llama", "qwen2") else ("gelu", "gelu_new", "gelu_pytorch_tanh")
    scaling = rope.get("rope_type", "default")
    scalings = ("default", "linear", "llama3") if kind == "llama" else ("default",)
    attention = config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights if kind == "gpt2" else False
    otherwise = {
        f"the activation {short_repr(activation)}": activation not in activations,
        f"rotary positions of type {short_repr(scaling)}": scaling not in scalings,
        "sliding-window attention": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "attention without biases": kind == "gpt_neox" and not config.attention_bias,
        "a scale of attention of its own": attention,
        "cross-attention": getattr(config, "add_cross_attention", False),
    }
    for what, is_so in otherwise.items():
        if is_so:
            raise UserError(f"{folder}: has {what}, which llama.cpp does not compute for {kind}; GGUF cannot say it")


def _shape_keys(config: PreTrainedConfig, rows: int) -> dict[str, Value]:
    """The keys that tell llama.cpp what to build, under the name of its architecture."""
    kind, heads = config.model_type, config.num_attention_heads
    intermediate = (config.n_inner or 4 * config.hidden_size) if kind == "gpt2" else config.intermediate_size
    keys: dict[str, Value] = {
        "vocab_size": rows,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": intermediate,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
    }
    if kind in ("llama", "qwen2"):
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        keys["attention.layer_norm_epsilon"] = float(
            config.layer_norm_epsilon if kind == "gpt2" else config.layer_norm_eps
        )
    if kind == "gpt_neox":
        keys["use_parallel_residual"] = config.use_parallel_residual
    if kind != "gpt2":
        rope, size = config.rope_parameters, _head_size(config)
        keys["rope.freq_base"] = float(rope["rope_theta"])
        keys["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
        keys |= {"attention.key_length": size, "attention.value_length": size}
    return {f"{ARCHITECTURES[kind]}.{key}": value for key, value in keys.items()}


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _entries(shapes: PreTrainedModel, folder: Path, dtype: str, opened: ExitStack) -> list[_Entry]:
    """All tensors of the file, in the model's order; `shapes` is the model without its weights."""
    import gguf

    config = shapes.config
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    stored = _stored(folder, opened)
    entries = []

    def add(name: str, key: str, parameter: Tensor) -> None:
        shape = tuple(_arranged(config, name, parameter).shape)
        kept = len(shape) == 1 or name == "position_embd.weight"
        chosen = "fp32" if kept else "fp16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype
        entries.append(_Entry(name, shape, chosen, partial(_read, stored[key], key, config, name)))

    for path, parameter in shapes.named_parameters():  # one of two that are tied
        key = _stored_key(path, shapes.base_model_prefix, stored, folder)
        if (there := stored[key].get_slice(key).get_shape()) != list(parameter.shape):
            raise UserError(f"{folder}: `{key}` is {short_repr(there)} where config.json wants {list(parameter.shape)}")
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{folder}: `{path}` has no place in a GGUF file of {architecture}")
        add(name, key, parameter)
        if architecture == "gptneox" and name == "token_embd.weight" and config.tie_word_embeddings:
            add("output.weight", key, parameter)  # llama.cpp ties the head of the others, if it is not there
    if getattr(config, "rope_parameters", {}).get("rope_type", "default") != "default":
        factors = _rope_factors(config)
        entries.append(_Entry("rope_freqs.weight", tuple(factors.shape), "fp32", lambda: factors))
    return entries


def _stored(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """Where each tensor of a checked model folder is: the open file that holds it, by its key."""
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


def _stored_key(path: str, prefix: str, stored: Mapping[str, Any], folder: Path) -> str:
    """The key under which a parameter is stored: some files are of a model without its head, some name it otherwise."""
    for key in (path, path.removeprefix(f"{prefix}."), path.replace("lm_head.", "embed_out.")):
        if key in stored:
            return key
    raise UserError(f"{folder}: its weights lack `{path}`; they are incomplete or of another architecture")


def _read(file: Any, key: str, config: PreTrainedConfig, name: str) -> Tensor:
    return _arranged(config, name, file.get_tensor(key))


def _arranged(config: PreTrainedConfig, name: str, weight: Tensor) -> Tensor:
    """A weight or bias in llama.cpp's order; `name` is the file's, as in blk.0.attn_q.weight."""
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
    """What llama.cpp divides the angle of each pair of rows by: [d/2]."""
    rope, size = config.rope_parameters, _head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    factors: Tensor = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size) / scaled
    return factors


def _write(file: Path, architecture: str, keys: Mapping[str, Value], entries: list[_Entry], dtype: str) -> None:
    import gguf

    with closing(gguf.GGUFWriter(file, architecture)) as writer:
        writer.add_file_type(gguf.LlamaFileType[GGUF_DTYPES[dtype][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in keys.items():
            _add(writer, key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[GGUF_DTYPES[entry.dtype][0]]
            numbers, size = gguf.GGML_QUANT_SIZES[kind]
            # the dtype of the array is asked for only where the kind is not given
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), prod(entry.shape) // numbers * size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_encoded(entry))


def _add(writer: "gguf.GGUFWriter", key: str, value: Value) -> None:
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
    """The tensor's bytes, as an array; `UserError` if a number of it is not finite there."""
    import gguf

    weight = entry.read().float().contiguous()
    q8_0 = entry.dtype == "q8_0"
    cast = (weight.abs().amax() / 127).half() if q8_0 else weight.to(DTYPES[entry.dtype])  # of q8_0 the largest scale
    if not cast.isfinite().all():
        raise UserError(f"{entry.name}: not all of its numbers are finite in {entry.dtype}; try another dtype")
    if q8_0:
        blocks: np.ndarray[Any, np.dtype[Any]] = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return blocks
    return (cast.view(torch.int16) if entry.dtype == "bf16" else cast).numpy()
