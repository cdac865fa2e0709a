"""LLaMA-Adapter: learned prompts in the attention of the upper layers, let in by a gate that starts at zero.

    attention(x) = o_proj(softmax(q kᵀ/√d) v  +  g · softmax(q k_Pᵀ/√d) v_P)        k_P, v_P = k_proj(P), v_proj(P)

P [1, length, hidden] and g [1] are all that trains: `adaption_prompt` and `adaption_gate` of a layer's attention. With
g = 0 the model starts as it was. Zhang et al. 2023 (arXiv 2303.16199, section 3) in the form of PEFT, whose files are
read and written: q as the layer has it (rotated where it rotates), k_P without a position, and g as it is, one a layer
(the authors' code takes tanh g, one a head).

The layer's own forward pass runs, with its own query: transformers lets a layer name the function that computes its
attention, and ours adds the second term to sdpa's. So cache, positions, packing and padding, which concern keys and
values of tokens, stay the model's affair, and no weight changes its name. The price: k_P and v_P are computed in every
forward pass, which reads the weights of k_proj and v_proj once more for every token generated.

The gradient of P has the factor g, so it is zero in the first step; that of g is alive at once.
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
"""PEFT's name of the method."""
_PREFIX = "base_model.model."
"""Of PEFT's keys, before the name that a tensor has in the model."""
_IMPLEMENTATION = "sdpa-with-prompts"


@dataclass(frozen=True)
class PromptReport:
    """What was put into a model; counts are parameters."""

    layers: tuple[str, ...]
    """Path of every attention that has prompts, from below."""
    asked_layers: int
    """More than there are layers means all of them."""
    length: int
    trainable: int
    frozen: int

    def __str__(self) -> str:
        count = len(self.layers)
        cut = f", which is all ({self.asked_layers} were asked for)" if count < self.asked_layers else ""
        return (
            f"{self.length} prompts in the attention of the upper {count} layers{cut}; "
            f"{self.trainable:,} parameters train, {self.frozen:,} are frozen"
        )


def add_prompts(model: PreTrainedModel, *, length: int = 10, layers: int = 30, seed: int) -> PromptReport:
    """Put prompts into the attention of the upper `layers` and freeze everything else; the function stays, to the bit.

    Prompts are drawn from the standard normal distribution, keyed by seed and layer, and kept in fp32 or better. Build
    the optimizer afterwards: what trains has changed.

    Raises:
        UserError: an architecture that is not known here, attention other than sdpa, prompts that are there already,
            or no length or layer at all. The model is left untouched.
    """
    for key, number in (("length", length), ("layers", layers)):
        if number < 1:
            raise UserError(f"prompts.{key} ({number}) must be at least 1")
    values = {}
    for name in _free_attentions(model)[-layers:]:
        prompt = torch.empty(1, length, model.config.hidden_size, device="cpu")
        values[name] = prompt.normal_(generator=keyed_generator(seed, "prompt", name)), torch.zeros(1)
    _put(model, values)
    return _report(model, layers)


def prompt_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All prompts and gates by their name in the model; empty where there are none."""
    return {
        f"{name}.{kind}": attention.get_parameter(kind)
        for name, attention in _prompted(model).items()
        for kind in ("adaption_prompt", "adaption_gate")
    }


def remove_prompts(model: PreTrainedModel) -> None:
    """The model as it was before `add_prompts` or `load_prompts`, in place; every parameter may train again.

    Raises:
        UserError: it has no prompts.
    """
    attentions = _prompted(model)
    if not attentions:
        raise UserError("the model has no prompts of LLaMA-Adapter to remove")
    for attention in attentions.values():
        attention.config = attention.config.unprompted
        del attention.adaption_prompt, attention.adaption_gate
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def save_prompts(model: PreTrainedModel, folder: str | Path, *, base: str | None) -> Path:
    """Write a new folder that PEFT's `PeftModel.from_pretrained` reads too: prompts, gates and nothing else.

    The folder is whole or absent (see `files.atomic`). `base` is the path or hub id of the model that the prompts
    belong to, for whoever loads them.

    Raises:
        UserError: there are no prompts, or `folder` exists. RunStopped: the disk is full or refuses the write.
    """
    folder = Path(folder)
    attentions = _prompted(model)
    if not attentions:
        raise UserError(f"{folder}: the model has no prompts of LLaMA-Adapter to save")
    if folder.exists() or folder.is_symlink():
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
        with atomic_folder(folder, replace=False, parents=True) as partial:
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
            write_json(partial / CONFIG, settings, indent=2, sort_keys=True)
    except (OSError, SafetensorError) as error:
        raise RunStopped(f"{folder}: the prompts could not be written: {first_line(str(error))}") from error
    return folder


def load_prompts(model: PreTrainedModel, folder: str | Path) -> PromptReport:
    """Put the prompts of a folder by `save_prompts` or PEFT into a model, and freeze everything else.

    Raises:
        UserError: not such a folder, prompts of another model, values that are not finite, or see `add_prompts`. The
            model is left untouched.
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
    _put(model, values)
    return _report(model, layers)


# Architectures


@dataclass(frozen=True)
class _Family:
    """Where a block keeps its attention, and how that makes keys and values [1, heads, length, size] of prompts."""

    attention: str
    keys_values: Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def _separate(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """One product each; Qwen3 norms every head's keys."""
    heads = (1, prompt.shape[1], -1, attention.head_dim)
    keys, values = attention.k_proj(prompt).view(heads), attention.v_proj(prompt).view(heads)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _side_by_side(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """One product for the queries of all heads, then their keys, then their values."""
    count = attention.num_key_value_heads
    heads = attention.qkv_proj(prompt).view(1, prompt.shape[1], -1, attention.head_dim).transpose(1, 2)
    return heads[:, -2 * count : -count], heads[:, -count:]


def _head_by_head(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """One product, in which every head has its query, key and value together."""
    heads = attention.query_key_value(prompt).view(1, prompt.shape[1], -1, 3 * attention.head_size).transpose(1, 2)
    _, keys, values = heads.chunk(3, dim=-1)
    return keys, values


_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _Family("self_attn", _separate)),
    "phi3": _Family("self_attn", _side_by_side),
    "gpt_neox": _Family("attention", _head_by_head),
}
"""By `model_type`."""


def _family(model: PreTrainedModel) -> _Family:
    kind = model.config.model_type
    if kind not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(f"LLaMA-Adapter knows {known}, not {short_name(kind)}; `method: lora` takes any architecture")
    return _FAMILIES[kind]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Tokens' attention and the gated one of prompts, [batch, length, heads, size]; query has heads before length."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    keys_values = _FAMILIES[module.config.model_type].keys_values
    # one prompt for the whole batch: each entry sees the same memory
    keys, values = (
        part.expand(len(query), -1, -1, -1) for part in keys_values(module, module.adaption_prompt.to(query.dtype))
    )
    prompted = F.scaled_dot_product_attention(query, keys, values, scale=settings["scaling"], enable_gqa=True)
    return output + (module.adaption_gate * prompted.transpose(1, 2)).to(output.dtype), None


AttentionInterface.register(_IMPLEMENTATION, _attention)


# In a model


def _prompted(model: nn.Module) -> dict[str, Any]:
    """Every attention that has prompts, by its path."""
    return {name: module for name, module in model.named_modules() if "adaption_prompt" in module._parameters}


def _free_attentions(model: PreTrainedModel) -> list[str]:
    """Paths of the attentions of all layers, from below; `UserError` where they cannot take prompts."""
    family = _family(model)
    if _prompted(model):
        raise UserError("the model has prompts of LLaMA-Adapter already; remove them first")
    if model.config._attn_implementation != "sdpa":
        implementation = short_name(str(model.config._attn_implementation))
        raise UserError(f"LLaMA-Adapter needs the model's attention to be sdpa, not {implementation}")
    return [name for name, _ in model.named_modules() if name.endswith(f".{family.attention}")]


@torch.no_grad()
def _put(model: PreTrainedModel, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Path of an attention -> (prompt, gate); everything else is frozen."""
    precise = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    model.requires_grad_(False)
    for name, (prompt, gate) in values.items():
        attention: Any = model.get_submodule(name)
        device = next(attention.parameters()).device
        attention.adaption_prompt = nn.Parameter(prompt.to(device, precise, copy=True))
        attention.adaption_gate = nn.Parameter(gate.to(device, precise, copy=True))
        attention.adaption_prompt.zero_until = attention.adaption_gate  # so a training step takes it for no dead tensor
        attention.adaption_prompt.zero_until = attention.adaption_gate  # where the training step looks for dead tensors
        config = copy.copy(attention.config)  # all layers share one
        config.unprompted, config._attn_implementation = attention.config, _IMPLEMENTATION
        attention.config = config


def _report(model: PreTrainedModel, asked_layers: int) -> PromptReport:
    attentions = _prompted(model)
    trainable = sum(tensor.numel() for tensor in prompt_tensors(model).values())
    return PromptReport(
        layers=tuple(attentions),
        asked_layers=asked_layers,
        length=next(iter(attentions.values())).adaption_prompt.shape[1],
        trainable=trainable,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - trainable,
    )


# In a folder


def _read_settings(file: Path, family: _Family) -> tuple[int, int]:
    """(prompts of a layer, layers) of an adapter's configuration."""
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
    """Floating-point tensors of these names and shapes, all finite; `UserError` for a file that holds anything else."""
    try:
        check_header(file)
        with safe_open(file, framework="pt") as stored:
            there = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
            for name in sorted(there.keys() ^ shapes.keys()):
                what = "is not in it" if name in shapes else "is none of this model's prompts"
                raise UserError(f"{file.parent}: `{short_name(name, 120)}` {what}; was it trained on another base?")
            for name, shape in there.items():
                if shape != shapes[name]:
                    wanted = f"{short_repr(shape)} where this model takes {shapes[name]}"
                    raise UserError(f"{file.parent}: `{name}` is {wanted}; was it trained on another base?")
            tensors = {name: stored.get_tensor(name) for name in there}
    except FileNotFoundError:
        raise UserError(f"{file.parent}: has no {file.name}; other files of weights are not read") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged, or not a safetensors file: {first_line(str(error))}") from None
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.double()).all()):
            raise UserError(f"{file}: `{name}` holds something other than finite numbers")
    return tensors
