"""LLaMA-Adapter: trained prompts in the attention of the upper layers, scaled by a gate that is initialised with zero.

    attention(x) = o_proj(softmax(q kᵀ/√d) v  +  g · softmax(q k_Pᵀ/√d) v_P)        k_P, v_P = k_proj(P), v_proj(P)

Only the prompts P [1, length, hidden] and the gates g [1] train; they are the parameters `adaption_prompt` and
`adaption_gate` of a layer's attention module. With g = 0 the model computes exactly what the base computes. The method
is that of Zhang et al. 2023 (arXiv 2303.16199, section 3) in the form of PEFT, whose files are read and written: q is
the layer's own query (with rotary positions if the model has them), k_P has no position, and there is one g for each
layer, used as it is (the authors' code has one for each head and applies tanh to it).

The layer's own forward pass runs. transformers lets a layer name the function that computes its attention, and the
function here adds the second term to the result of sdpa. Cache, positions, packing and padding concern the keys and
values of tokens only, so the model handles them as before, and no weight changes its name. The price: k_P and v_P are
computed in every forward pass, which reads the weights of k_proj and v_proj once more for each generated token.

The gradient of P has the factor g, so it is zero in the first step; the gradient of g is not.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder, write_json
from relora.files.untrusted import MB, check_folder, check_header, read_json
from relora.messages import first_line, short_name, short_repr
from relora.seeding import keyed_generator

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KIND = "ADAPTION_PROMPT"
"""PEFT's name (`peft_type`) of the method."""
_PREFIX = "base_model.model."
"""Beginning of every key in PEFT's tensor file, before the name of the tensor in the model."""
_IMPLEMENTATION = "sdpa-with-prompts"
"""Name under which the attention function is registered with transformers."""


@dataclass(frozen=True)
class PromptReport:
    """Report on prompts that were put into a model."""

    layers: tuple[str, ...]
    """Paths of the attention modules that have prompts, from the lowest layer to the highest."""
    asked_layers: int
    """Number of layers that were asked for; if the model has fewer, all of them have prompts."""
    length: int
    """Number of prompts of each layer."""
    trainable: int
    """Number of parameters that train."""
    frozen: int
    """Number of frozen parameters."""

    def __str__(self) -> str:
        count = len(self.layers)
        cut = f", which is all ({self.asked_layers} were asked for)" if count < self.asked_layers else ""
        return (
            f"{self.length} prompts in the attention of the upper {count} layers{cut}; "
            f"{self.trainable:,} parameters train, {self.frozen:,} are frozen"
        )


def add_prompts(model: PreTrainedModel, *, length: int = 10, layers: int = 30, seed: int) -> PromptReport:
    """Put new prompts into the attention of the upper layers, and freeze everything else.

    The gates are zero, so the model's outputs do not change by a single bit. Prompts are drawn from the standard normal
    distribution, keyed by seed and layer, and kept in fp32 or better. Create the optimizer afterwards, because other
    parameters train than before.

    Args:
        length: number of prompts of each layer.
        layers: number of layers, counted from the highest; all layers if the model has fewer.
        seed: keys the draw of the prompts.

    Raises:
        UserError: the model's architecture is not supported, its attention is not sdpa, it has prompts already, or
            `length` or `layers` is less than 1. The model has not changed.
    """
    for key, number in (("length", length), ("layers", layers)):
        if number < 1:
            raise UserError(f"prompts.{key} ({number}) must be at least 1")
    values = {}
    for name in _free_attentions(model)[-layers:]:
        prompt = torch.empty(1, length, model.config.hidden_size, device="cpu")
        values[name] = prompt.normal_(generator=keyed_generator(seed, "prompt", name)), torch.zeros(1)
    _insert(model, values)
    return _report(model, layers)


def prompt_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all prompts and gates of a model by their name in it; empty if it has none."""
    return {
        f"{name}.{kind}": attention.get_parameter(kind)
        for name, attention in _prompted(model).items()
        for kind in ("adaption_prompt", "adaption_gate")
    }


def remove_prompts(model: PreTrainedModel) -> None:
    """Remove the prompts and gates, in place; afterwards all floating-point parameters of the model train.

    Raises:
        UserError: the model has no prompts.
    """
    attentions = _prompted(model)
    if not attentions:
        raise UserError("the model has no prompts of LLaMA-Adapter to remove")
    for attention in attentions.values():
        attention.config = attention.config.unprompted
        del attention.adaption_prompt, attention.adaption_gate
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def save_prompts(model: PreTrainedModel, folder: str | Path, *, base: str | None, overwrite: bool = False) -> Path:
    """Write the prompts and gates of a model to a new folder, which PEFT's `PeftModel.from_pretrained` can read, too.

    The folder is whole or absent (see `files.atomic`).

    Args:
        base: path or hub id of the base model, to be named in the adapter's configuration.
        overwrite: replace an adapter that is in `folder`.

    Returns:
        The folder.

    Raises:
        UserError: the model has no prompts, or `folder` exists; with `overwrite`, if it holds anything but an adapter.
        RunStopped: the disk is full or refuses the write.
    """
    folder = Path(folder)
    attentions = _prompted(model)
    if not attentions:
        raise UserError(f"{folder}: the model has no prompts of LLaMA-Adapter to save")
    if (folder.exists() or folder.is_symlink()) and not (overwrite and (folder / CONFIG).is_file()):
        raise UserError(f"{folder}: exists, and was left as it is; give a new folder")
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu() for name, tensor in prompt_tensors(model).items()}
    settings = {
        "adapter_layers": len(attentions),
        "adapter_len": next(iter(attentions.values())).adaption_prompt.shape[1],
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": KIND,
        "revision": None,
        "target_modules": _family(model).attention,
        "task_type": "CAUSAL_LM",
    }
    try:
        with atomic_folder(folder, replace=overwrite, parents=True) as partial:
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
            write_json(partial / CONFIG, settings, indent=2, sort_keys=True)
    except (OSError, SafetensorError) as error:
        raise RunStopped(f"{folder}: the prompts could not be written: {first_line(str(error))}") from error
    return folder


def load_prompts(model: PreTrainedModel, folder: str | Path) -> PromptReport:
    """Put the prompts in a folder, written by `save_prompts` or PEFT, into a model, and freeze everything else.

    Raises:
        UserError: the folder holds no prompts of LLaMA-Adapter, or prompts of another model, or numbers that are not
            finite; or the model cannot take prompts (see `add_prompts`). The model has not changed.
    """
    folder = Path(folder)
    check_folder(folder)
    length, layers = _read_settings(folder / CONFIG, _family(model))
    attentions = _free_attentions(model)
    if layers > len(attentions):
        raise UserError(f"{folder}: holds prompts for {layers} layers, the model has {len(attentions)}; another base?")
    shapes = {}
    for name in attentions[-layers:]:
        shapes[f"{_PREFIX}{name}.adaption_prompt"] = [1, length, model.config.hidden_size]
        shapes[f"{_PREFIX}{name}.adaption_gate"] = [1]
    tensors = _read_tensors(folder / WEIGHTS, shapes)
    values = {}
    for name in attentions[-layers:]:
        path = f"{_PREFIX}{name}"
        values[name] = tensors[f"{path}.adaption_prompt"], tensors[f"{path}.adaption_gate"]
    _insert(model, values)
    return _report(model, layers)


# Architectures


@dataclass(frozen=True)
class _Family:
    """The attention modules of an architecture."""

    attention: str
    """Name of the attention module in a block."""
    keys_values: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """Function from (attention module, prompt [1, length, hidden]) to k_P and v_P, each [1, heads, length, size]."""


def _keys_values_separate(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Compute k_P and v_P with `k_proj` and `v_proj`; Qwen3 also normalises the keys of each head."""
    heads = (1, prompt.shape[1], -1, attention.head_dim)
    keys, values = attention.k_proj(prompt).view(heads), attention.v_proj(prompt).view(heads)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _keys_values_concatenated(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Compute k_P and v_P with `qkv_proj`, whose outputs are the queries of all heads, then keys, then values."""
    count = attention.num_key_value_heads
    heads = attention.qkv_proj(prompt).view(1, prompt.shape[1], -1, attention.head_dim).transpose(1, 2)
    return heads[:, -2 * count : -count], heads[:, -count:]


def _keys_values_interleaved(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Compute k_P and v_P with `query_key_value`, whose outputs are query, key and value of each head in turn."""
    heads = attention.query_key_value(prompt).view(1, prompt.shape[1], -1, 3 * attention.head_size).transpose(1, 2)
    _, keys, values = heads.chunk(3, dim=-1)
    return keys, values


_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _Family("self_attn", _keys_values_separate)),
    "phi3": _Family("self_attn", _keys_values_concatenated),
    "gpt_neox": _Family("attention", _keys_values_interleaved),
}
"""Supported architectures, by transformers' `model_type`."""


def _family(model: PreTrainedModel) -> _Family:
    """Look up the model's architecture; `UserError` if it is not supported."""
    model_type = model.config.model_type
    if model_type not in _FAMILIES:
        known, given = ", ".join(sorted(_FAMILIES)), short_name(model_type)
        raise UserError(f"LLaMA-Adapter knows {known}, not {given}; `method: lora` takes any architecture")
    return _FAMILIES[model_type]


def _attention_with_prompts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Compute the attention to the tokens plus the gated attention to the prompts; see the module.

    Args:
        module: the attention module, with prompt and gate.
        query: [batch, heads, length, size].
        settings: further arguments of transformers' attention functions.

    Returns:
        The output [batch, length, heads, size], and None for the attention weights.
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    keys_values = _FAMILIES[module.config.model_type].keys_values
    # all rows of the batch have the same prompts, so expanding copies nothing
    keys, values = (
        part.expand(len(query), -1, -1, -1) for part in keys_values(module, module.adaption_prompt.to(query.dtype))
    )
    prompted = F.scaled_dot_product_attention(query, keys, values, scale=settings["scaling"], enable_gqa=True)
    return output + (module.adaption_gate * prompted.transpose(1, 2)).to(output.dtype), None


AttentionInterface.register(_IMPLEMENTATION, _attention_with_prompts)


# Prompts in a model


def _prompted(model: nn.Module) -> dict[str, Any]:
    """Return every attention module that has prompts, by its path, from the lowest layer to the highest."""
    return {name: module for name, module in model.named_modules() if "adaption_prompt" in module._parameters}


def _free_attentions(model: PreTrainedModel) -> list[str]:
    """Return the paths of the attention modules of all layers, from the lowest to the highest.

    Raises:
        UserError: the model has prompts already, is of an unsupported architecture, or its attention is not sdpa.
    """
    family = _family(model)
    if _prompted(model):
        raise UserError("the model has prompts of LLaMA-Adapter already; remove them first")
    if model.config._attn_implementation != "sdpa":
        implementation = short_name(str(model.config._attn_implementation))
        raise UserError(f"LLaMA-Adapter needs the model's attention to be sdpa, not {implementation}")
    return [name for name, _ in model.named_modules() if name.endswith(f".{family.attention}")]


@torch.no_grad()
def _insert(model: PreTrainedModel, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give attention modules their prompts and gates as parameters, and freeze everything else.

    Args:
        values: (prompt, gate) by the path of the attention module.
    """
    dtype = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    model.requires_grad_(False)
    for name, (prompt, gate) in values.items():
        attention: Any = model.get_submodule(name)
        device = next(attention.parameters()).device
        attention.adaption_prompt = nn.Parameter(prompt.to(device, dtype, copy=True))
        attention.adaption_gate = nn.Parameter(gate.to(device, dtype, copy=True))
        # tells the training step that the prompt's gradient may be zero as long as the gate is
        attention.adaption_prompt.zero_until = attention.adaption_gate
        config = copy.copy(attention.config)  # a copy, because all layers share one configuration
        config.unprompted, config._attn_implementation = attention.config, _IMPLEMENTATION
        attention.config = config


def _report(model: PreTrainedModel, asked_layers: int) -> PromptReport:
    """Describe the prompts that were put into a model."""
    attentions = _prompted(model)
    trainable = sum(tensor.numel() for tensor in prompt_tensors(model).values())
    return PromptReport(
        layers=tuple(attentions),
        asked_layers=asked_layers,
        length=next(iter(attentions.values())).adaption_prompt.shape[1],
        trainable=trainable,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - trainable,
    )


# Prompts in a folder


def _read_settings(file: Path, family: _Family) -> tuple[int, int]:
    """Read the number of prompts of each layer and the number of layers from an adapter's configuration.

    Raises:
        UserError: there is no such file, or it does not describe prompts of LLaMA-Adapter for this architecture.
    """
    try:
        settings = read_json(file, MB // 4)
    except OSError:
        raise UserError(f"{file.parent}: holds no adapter (no {file.name})") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != KIND:
        raise UserError(f"{file}: `peft_type` is {short_repr(kind)}; that of LLaMA-Adapter is {KIND}")
    for key in ("adapter_len", "adapter_layers"):
        if type(settings.get(key)) is not int or settings[key] < 1:
            raise UserError(
                f"{file}: `{key}` is {short_repr(settings.get(key))}; it must be a whole number, at least 1"
            )
    target = settings.get("target_modules")
    if target not in (None, family.attention):
        raise UserError(f"{file}: prompts of {short_repr(target)}; in this model they belong to {family.attention}")
    return settings["adapter_len"], settings["adapter_layers"]


def _read_tensors(file: Path, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Read the tensors of an adapter.

    Args:
        shapes: the shapes that the file must hold, by key.

    Raises:
        UserError: the file is missing or damaged, holds other keys or shapes, or entries that are not finite
            floating-point numbers.
    """
    try:
        check_header(file)
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
            for name in sorted(found.keys() ^ shapes.keys()):
                what = "is not in it" if name in shapes else "is none of this model's prompts"
                raise UserError(f"{file.parent}: `{short_name(name, 120)}` {what}; was it trained on another base?")
            for name, shape in found.items():
                if shape != shapes[name]:
                    wanted = f"{short_repr(shape)} where this model takes {shapes[name]}"
                    raise UserError(f"{file.parent}: `{name}` is {wanted}; was it trained on another base?")
            tensors = {name: stored.get_tensor(name) for name in found}
    except FileNotFoundError:
        raise UserError(f"{file.parent}: has no {file.name}; other files of weights are not read") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged, or not a safetensors file: {first_line(str(error))}") from None
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.double()).all()):
            raise UserError(f"{file}: `{name}` holds something other than finite numbers")
    return tensors
