"""Saving a causal LM as a plain Hugging Face model folder, which opens without this package.

Weights are written to safetensors only.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder
from relora.messages import first_line
from relora.model.finite import cast_finite
from relora.model.load import quiet_transformers


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a plain Hugging Face model folder: configurations, safetensors, tokenizer. The model does not change.

    The folder is whole or absent, and replaces a model folder that was there (see `files.atomic`).

    Args:
        dtype: dtype of the stored weights; by default the most precise one in the model.

    Returns:
        The folder.

    Raises:
        UserError: the model still has low-rank factors or prompts, `folder` holds something other than a model, or a
            weight is beyond the range of `dtype`.
        NonFinite: a weight holds what is not a number.
        RunStopped: the disk is full or refuses the write.
    """
    folder = Path(folder)
    weights = model.state_dict()
    for key in weights:
        if "lora_" in key:
            raise UserError(f"{folder}: the model still holds low-rank factors (`{key}`); merge and strip them first")
        if "adaption_" in key:
            raise UserError(f"{folder}: the model still holds prompts of LLaMA-Adapter (`{key}`); remove them first")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: exists and is not a model folder; it was left as it is")
    dtype = dtype or functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    cast = _cast(weights, dtype)
    try:
        with atomic_folder(folder, replace=True) as partial:
            with quiet_transformers():
                model.save_pretrained(partial, state_dict=cast)
                tokenizer.save_pretrained(partial)
            _write_dtype(partial / "config.json", dtype)
    except Exception as error:  # any error: tokenizers has no class of its own for a full disk
        reason = first_line(str(error)) or type(error).__name__
        raise RunStopped(f"{folder}: the model could not be written: {reason}") from error
    return folder


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cast floating-point weights to `dtype`; tied weights stay one tensor, by which transformers recognises them."""
    cast_tensors: dict[tuple[int, torch.Size], torch.Tensor] = {}
    cast = {}
    for name, weight in weights.items():
        identity = (weight.data_ptr(), weight.shape)
        if identity not in cast_tensors:
            cast_tensors[identity] = cast_finite(weight, dtype, name) if weight.is_floating_point() else weight
        cast[name] = cast_tensors[identity]
    return cast


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Set `dtype` in config.json to that of the stored weights; transformers writes that of the model in memory."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
