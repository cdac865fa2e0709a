"""Pretraining methods that `relora compare --methods` knows by name, each a list of overrides of the configuration.

They are the rows of the tables of the ReLoRA paper (arXiv 2307.05695; Table 2: main results; Table 6: restarts,
optimizer reset, jagged schedule and warm start, one after the other), and optimizers that keep their moments at low
rank. All that a method does not override is the configuration's, the same for all methods: model, tokens, order of the
data, rank, warm start, periods.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from relora.config import RunConfig, load_config
from relora.config.variants import BALANCED, PAPER, RENEWING, Defaults
from relora.errors import UserError
from relora.lowrank import inject
from relora.recipes.from_settings import lowrank_of
from relora.recipes.pretraining_inputs import open_configured_model

_RELORA = ("method=relora",)


def _overrides(defaults: Defaults) -> tuple[str, ...]:
    """Write the defaults of a variant as overrides, which replace what the configuration gives."""
    return tuple(
        f"{section}.{key}={str(value).lower()}" for section, keys in defaults.items() for key, value in keys.items()
    )


_ADAMW, _MUON = "optimizer.factors=adamw", "optimizer.factors=muon"
_DEFAULT = (*_RELORA, "variant=default", *_overrides(RENEWING))
_BALANCED = (*_RELORA, "variant=default", _ADAMW, "restart.retain=0", *_overrides(BALANCED))
_PAPER = (*_RELORA, "variant=paper", *_overrides(PAPER))
_NO_WARM_START = "warm_start={steps: 0}"
_RESIDUAL = "lowrank.residual.scale=1"
_NO_RESET, _NO_RESTART_WARMUP = "restart.optimizer=keep", "restart.warmup_steps=0"

PRETRAINING_METHODS: dict[str, tuple[str, ...]] = {
    # the main table of the paper
    "full": ("method=full",),
    "control": ("method=full",),  # `methods_of` adds the shape that `control_shape` finds
    "lora": ("method=lora", _ADAMW, _NO_WARM_START),
    "lora-warm": ("method=lora", _ADAMW),
    "relora-paper": _PAPER,
    "relora": _DEFAULT,
    # stronger baselines: Muon for all matrices, and for LoRA's factors; and restarts beside AdamW
    "full-muon": ("method=full", "optimizer.matrices=muon"),
    "lora-muon": ("method=lora", _MUON, _NO_WARM_START),
    "lora-muon-warm": ("method=lora", _MUON),
    "relora-balanced": _BALANCED,
    "relora-balanced-scratch": (*_BALANCED, _NO_WARM_START),
    # the ablation table of the paper: no warm start, and one part of ReLoRA after the other
    "restarts": (*_PAPER, _NO_WARM_START, _NO_RESET, _NO_RESTART_WARMUP),
    "restarts-reset": (*_PAPER, _NO_WARM_START, _NO_RESTART_WARMUP),
    "restarts-jagged": (*_PAPER, _NO_WARM_START, _NO_RESET),
    "relora-paper-scratch": (*_PAPER, _NO_WARM_START),
    "relora-scratch": (*_DEFAULT, _NO_WARM_START),
    # LoRA whose frozen weights follow the part of their gradient that the factors cannot express
    "residual": ("method=lora", _ADAMW, _RESIDUAL),
    "residual-scratch": ("method=lora", _ADAMW, _RESIDUAL, _NO_WARM_START),
    # full-rank weights, moments at low rank; `methods_of` replaces {r} by lowrank.r
    "galore": ("method=full", "optimizer.name=galore", "optimizer.projection.rank={r}"),
    "apollo": ("method=full", "optimizer.name=apollo", "optimizer.projection.rank={r}"),
    "fira": ("method=full", "optimizer.name=fira", "optimizer.projection.rank={r}"),
}
"""Name -> overrides, as a person would type them after the configuration."""

_NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_NEXT_OVERRIDE = re.compile(r",(?=[a-z_]+[.a-z_]*=)")
"""A comma before a `key=`: it separates two overrides; a comma inside a list does not match."""


def methods_of(
    names: str, own: Sequence[str], path: str | Path, overrides: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return name -> overrides of the methods that a command line asks for.

    Args:
        names: names of known methods, separated by commas: `full,lora-warm`.
        own: the user's own methods, `NAME:key=value,key=value`: ReLoRA with these overrides.
        path, overrides: the configuration that the methods override; it gives `control` its shape and {r} its value.

    Raises:
        UserError: a name that is not known, an own method that cannot be read, or no method at all.
    """
    found = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in PRETRAINING_METHODS:
            known = ", ".join(PRETRAINING_METHODS)
            raise UserError(f"--methods: `{name}` is none of {known}; for one of your own see --method")
        found[name] = PRETRAINING_METHODS[name]
    for text in own:
        name, colon, settings = text.partition(":")
        if not colon or not settings or not _NEW_NAME.fullmatch(name) or name in PRETRAINING_METHODS:
            raise UserError(f"--method {text}: write NAME:key=value,key=value with a new NAME, as a:restart.until=0.7")
        found[name] = (*_RELORA, *_NEXT_OVERRIDE.split(settings))
    if not found:
        raise UserError("--methods: give at least one, e.g. full,relora")
    relora = load_config(path, [*overrides, *_RELORA])
    if "control" in found:
        found["control"] += control_shape(relora)
    return {name: tuple(part.replace("{r}", str(relora.lowrank.r)) for part in parts) for name, parts in found.items()}


def control_shape(relora: RunConfig) -> tuple[str, ...]:
    """Return overrides that shrink a preset until it has as many parameters as ReLoRA trains: the paper's "Control".

    The number of layers and heads stays. For each width (with an even size of every head) the feed-forward size is the
    one that comes nearest to the wanted number of parameters. Among the widths the one is chosen whose ratio of
    feed-forward size to width is nearest to the preset's.

    Raises:
        UserError: the model is not a preset, or no such shape is small enough.
    """
    if relora.model.preset is None:
        raise UserError("control: needs `model.preset`, whose shape it changes; leave `control` out of --methods")
    with torch.device("meta"):
        model = open_configured_model(relora)
    shape: PreTrainedConfig = model.config
    wanted = inject(model, lowrank_of(relora)).trainable
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers

    def ffn_of(width: int) -> int:
        """Return the feed-forward size with which a model of this width has about `wanted` parameters."""
        ffn: int = round((wanted - _parameters(shape, width, 0)) / (3 * layers * width))
        return ffn

    def distortion(width: int) -> float:
        """Return |log| of how much the ratio of feed-forward size to width differs from the preset's."""
        return abs(math.log(ffn_of(width) / width * shape.hidden_size / shape.intermediate_size))

    widths = range(2 * heads, 2 * shape.hidden_size, 2 * heads)
    possible = [width for width in widths if ffn_of(width) >= 1]
    if not possible:
        raise UserError(f"control: no model of {layers} layers and {heads} heads has only {wanted:,} parameters")
    width = min(possible, key=distortion)
    return f"model.hidden_size={width}", f"model.intermediate_size={ffn_of(width)}"


def _parameters(shape: PreTrainedConfig, width: int, ffn: int) -> int:
    """Count the parameters of a LLaMA of another width and feed-forward size.

    They are embeddings and head; in every layer attention, feed-forward and two norms; and the last norm.
    """
    key_value = width // shape.num_attention_heads * shape.num_key_value_heads
    layer = 2 * width * width + 2 * width * key_value + 3 * width * ffn + 2 * width
    embeddings = shape.vocab_size * width * (1 if shape.tie_word_embeddings else 2)
    return int(embeddings + shape.num_hidden_layers * layer + width)
