"""What a name in `relora compare --methods` stands for: overrides of the configuration, as a person would type them.

The rows of the ReLoRA paper's tables (arXiv 2307.05695, Table 2: main results, Table 6: restarts x optimizer reset x
jagged schedule x warm start), and optimizers that keep their moments at low rank. Whatever a method does not override
is the configuration's, for all methods alike: model, tokens, order of the data, rank, warm start, periods.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from relora.config import RunConfig, load_config
from relora.config.pretraining import RESTARTS
from relora.errors import UserError
from relora.lowrank import inject
from relora.recipes.from_settings import lowrank_of
from relora.recipes.pretraining_inputs import open_configured_model

_RELORA = ("method=relora",)
_DEFAULT, _PAPER = (
    (*_RELORA, f"variant={variant}", *(f"restart.{key}={value}" for key, value in RESTARTS[variant].items()))
    for variant in ("default", "paper")
)
_SCRATCH = "warm_start={steps: 0}"
_RESIDUAL = "lowrank.residual.scale=1"
_NO_RESET, _NO_JAG = "restart.optimizer=keep", "restart.warmup_steps=0"

METHODS: dict[str, tuple[str, ...]] = {
    # the main table
    "full": ("method=full",),
    "control": ("method=full",),  # and the shape that `control_shape` finds
    "lora": ("method=lora", _SCRATCH),
    "lora-warm": ("method=lora",),
    "relora-paper": _PAPER,
    "relora": _DEFAULT,
    # the ablation table: no warm start, and one part after the other
    "restarts": (*_PAPER, _SCRATCH, _NO_RESET, _NO_JAG),
    "restarts-reset": (*_PAPER, _SCRATCH, _NO_JAG),
    "restarts-jagged": (*_PAPER, _SCRATCH, _NO_RESET),
    "relora-paper-scratch": (*_PAPER, _SCRATCH),
    "relora-scratch": (*_DEFAULT, _SCRATCH),
    # low-rank factors and moments, and weights that follow the rest of their gradient
    "residual": ("method=lora", _RESIDUAL),
    "residual-scratch": ("method=lora", _RESIDUAL, _SCRATCH),
    # full-rank weights, moments at low rank; {r} is lowrank.r
    "galore": ("method=full", "optimizer.name=galore", "optimizer.projection.rank={r}"),
    "apollo": ("method=full", "optimizer.name=apollo", "optimizer.projection.rank={r}"),
    "fira": ("method=full", "optimizer.name=fira", "optimizer.projection.rank={r}"),
}

_OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_NEXT_OVERRIDE = re.compile(r",(?=[a-z_]+[.a-z_]*=)")
"""A comma that parts overrides, and none within a list."""


def methods_of(
    names: str, own: Sequence[str], path: str | Path, overrides: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """`full,lora-warm`, and `NAME:key=value,key=value` of one's own (based on `relora`) -> name -> its overrides.

    Args:
        path, overrides: the configuration that they are to override.
    """
    found = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in METHODS:
            raise UserError(f"--methods: `{name}` is none of {', '.join(METHODS)}; for one of your own see --method")
        found[name] = METHODS[name]
    for text in own:
        name, colon, settings = text.partition(":")
        if not colon or not settings or not _OWN_NAME.fullmatch(name) or name in METHODS:
            raise UserError(f"--method {text}: write NAME:key=value,key=value with a new NAME, as a:restart.until=0.7")
        found[name] = (*_RELORA, *_NEXT_OVERRIDE.split(settings))
    if not found:
        raise UserError("--methods: give at least one, e.g. full,relora")
    relora = load_config(path, [*overrides, *_RELORA])
    if "control" in found:
        found["control"] += control_shape(relora)
    return {name: tuple(part.replace("{r}", str(relora.lowrank.r)) for part in parts) for name, parts in found.items()}


def control_shape(relora: RunConfig) -> tuple[str, ...]:
    """Overrides that make a preset as large as what ReLoRA trains of it: the paper's "Control".

    Depth and number of heads stay. For each width (an even size of every head) the feed-forward size is the one whose
    count of parameters is nearest; of the widths the one counts whose shape is most like the preset's.
    """
    if relora.model.preset is None:
        raise UserError("control: needs `model.preset`, whose shape it changes; leave `control` out of --methods")
    with torch.device("meta"):
        model = open_configured_model(relora)
    shape: PreTrainedConfig = model.config
    wanted = inject(model, lowrank_of(relora)).trainable
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers

    def ffn_of(width: int) -> int:
        ffn: int = round((wanted - _parameters(shape, width, 0)) / (3 * layers * width))
        return ffn

    def stretched(width: int) -> float:
        return abs(math.log(ffn_of(width) / width * shape.hidden_size / shape.intermediate_size))

    widths = range(2 * heads, 2 * shape.hidden_size, 2 * heads)
    possible = [width for width in widths if ffn_of(width) >= 1]
    if not possible:
        raise UserError(f"control: no model of {layers} layers and {heads} heads has only {wanted:,} parameters")
    width = min(possible, key=stretched)
    return f"model.hidden_size={width}", f"model.intermediate_size={ffn_of(width)}"


def _parameters(shape: PreTrainedConfig, width: int, ffn: int) -> int:
    """Of a LLaMA: embeddings and head, then by layer attention, feed-forward and two norms, then the last norm."""
    key_value = width // shape.num_attention_heads * shape.num_key_value_heads
    layer = 2 * width * width + 2 * width * key_value + 3 * width * ffn + 2 * width
    embeddings = shape.vocab_size * width * (1 if shape.tie_word_embeddings else 2)
    return int(embeddings + shape.num_hidden_layers * layer + width)
