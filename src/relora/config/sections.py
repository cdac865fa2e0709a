"""The sections of a configuration, one class each; the string under a field is its documentation."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from relora.config.values import (
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Place,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Settings,
    Share,
    Text,
)


class ModelSettings(Settings):
    """Which model: a preset to build, or a Hugging Face causal LM to open. Shape keys override a preset's."""

    preset: Text | None = None
    """A LLaMA shape of the ReLoRA paper: llama-9m ... llama-7b."""
    path: Place | None = None
    """A Hugging Face model folder or hub id."""
    from_scratch: bool = False
    """With `path`: take the architecture only and draw the weights anew."""
    trust_remote_code: bool = False
    """With `path`: run code that comes with the model. Only for a model whose code you have read."""
    vocab_size: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: Annotated[int, Number, Field(gt=0, le=10_000)] | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None
    max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool | None = None

    @property
    def overrides(self) -> dict[str, int | bool]:
        """The shape keys that were given, under the names of `transformers`."""
        return self.model_dump(exclude={"preset", "path", "from_scratch", "trust_remote_code"}, exclude_none=True)

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSettings":
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either `preset` (a shape to build) or `path` (a model to open), one of the two")
        if self.path is not None and self.overrides and not self.from_scratch:
            raise ValueError(
                f"`{next(iter(self.overrides))}` changes a trained model's shape; drop it or set `from_scratch: true`"
            )
        return self


class WeightedSource(Settings):
    """One prepared folder of a mixture."""

    path: Place
    weight: PositiveFloat = 1.0
    """Share of the sequences, relative to the other weights."""


class DataSettings(Settings):
    """Folders written by `relora prepare`."""

    train: Place | Annotated[tuple[WeightedSource, ...], Field(min_length=1)]
    """A folder, or a list of {path, weight} to mix."""
    validation: Place
    sequence_length: PositiveInt = 256
    """Tokens per sequence."""

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """`train` as a list of weighted folders."""
        return (WeightedSource(path=self.train),) if isinstance(self.train, str) else self.train


class LowRankSettings(Settings):
    """The two factors beside every frozen weight (see `relora.LowRankConfig`)."""

    r: PositiveInt = 128
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Share = 0.0
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """`all-linear` (every linear layer of the decoder blocks), a list of names, or a regular expression."""
    rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    trainable_scaling: bool = False
    """Train one scale per layer; a restart sets it back to its start, so it never dies."""
    base: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """How frozen weights are stored; auto follows precision.dtype. bf16, int8: an fp32 master is in main memory."""


class ResidualSettings(Settings):
    """A full-rank path: the frozen weights follow that part of their gradient which the factors cannot express."""

    scale: NonNegativeFloat = 0.0
    """Of their learning rate: 1 is that of the factors, 0 leaves them where they are."""
    every_steps: PositiveInt = 1
    """Only at steps that are a multiple of this; the others cost what they do without."""


class PretrainingLowRankSettings(LowRankSettings):
    """The two factors beside every frozen weight (see `relora.LowRankConfig`)."""

    warmup_steps: NonNegativeInt | None = None
    """Of the climb of the factors' rate from 0 after a warm start; schedule.warmup_steps unless given. With `variant:
    paper` everything dips there as at a restart, unless this is given."""
    ranks: Literal["uniform", "spectrum"] = "uniform"
    """spectrum: from r/4 to 2r by layer, more where the update has more directions when the warm start ends; in all no
    more parameters than r for every layer has."""
    residual: ResidualSettings = ResidualSettings()


class WarmStartSettings(Settings):
    """Full-rank training before the low-rank phase, in the same run."""

    steps: NonNegativeInt = 1000
    """How long; with `auto` at most."""
    auto: bool = False
    """End it when the loss has flattened and the update is of low rank."""
    window_steps: PositiveInt = 50
    """With auto: how often to look, and the steps whose mean losses are compared."""
    slope: Share = 0.02
    """With auto: flattened is a loss that falls by less than this share of itself from window to window."""
    energy: Ratio = 0.5
    """With auto: share of the update (of the squared norm of the step that Adam takes) in its r largest directions."""


def _auto(value: object) -> object:
    """`warm_start: auto` in one word."""
    return {"auto": True} if value == "auto" else value


WarmStart = Annotated[
    WarmStartSettings, BeforeValidator(_auto, json_schema_input_type=WarmStartSettings | Literal["auto"])
]


class RestartSettings(Settings):
    """Merge, redraw, clear, ramp: one timetable drives all four."""

    every_steps: PositiveInt = 1000
    growth: Annotated[float, Number, Field(ge=1, le=10)] = 1.0
    """Every cycle is so many times as long as the one before."""
    until: Ratio = 1.0
    """No restart after this share of the run."""
    warmup_steps: NonNegativeInt = 50
    """Of the climb of the learning rate from 0 after a restart; 0 for no dip."""
    ramp: Literal["all", "factors"] = "all"
    """Whose rate dips: that of all that trains (the paper's), or of the factors that were drawn anew."""
    optimizer: Literal["zero", "random", "magnitude", "keep", "project"] = "zero"
    """The factors' optimizer state: zero all of it (m, v and step), prune m and v by one mask, keep it, or project it
    into the new factors' space."""
    keep_ratio: Annotated[float, Number, Field(gt=0, lt=1)] = 0.1
    """For random and magnitude: the share of the entries that stays."""
    init: Literal["kaiming", "orthogonal", "gradient-svd", "weight-svd", "balanced"] = "kaiming"
    """lora_A drawn at random, or along the leading singular vectors of the gradient or the weight, beside lora_B = 0;
    balanced: both non-zero at the norms that they had reached, and the weight gives up their product."""
    directions: Literal["orthogonal", "gradient-svd", "weight-svd"] = "orthogonal"
    """Of balanced factors."""
    stagger: Literal["none", "layers", "ranks"] = "none"
    """Restart all at once, or a part of the layers or of every layer's ranks in turn."""
    turns: Annotated[int, Number, Field(ge=2, le=1000)] = 4
    """With stagger: in so many parts; each comes once in every_steps."""
    adaptive: bool = False
    """Restart when the update is full or the loss has flattened; looked at every `every_steps`."""
    rank_share: Ratio = 0.9
    """With adaptive: full is an effective rank of this share of r; balanced factors go by the loss alone."""
    slope: Share = 0.01
    """With adaptive: flattened is a loss that falls by less than this share of itself between two looks."""

    @model_validator(mode="after")
    def _parts_can_restart_alone(self) -> "RestartSettings":
        if self.stagger == "ranks" and self.optimizer not in ("zero", "keep"):
            raise ValueError(f"`stagger: ranks` knows `optimizer: zero` and `keep`, not `{self.optimizer}`")
        if self.stagger == "ranks" and self.warmup_steps:
            raise ValueError("`stagger: ranks` has no rate for a part of a factor; set `warmup_steps: 0`")
        if self.stagger == "layers" and self.warmup_steps and self.ramp == "all":
            raise ValueError("`stagger: layers` would let every rate dip at every turn; set `ramp: factors`")
        if self.adaptive and (self.growth != 1 or self.stagger != "none"):
            key = "growth: 1" if self.growth != 1 else "stagger: none"
            raise ValueError(f"`adaptive` says how long a cycle is, and restarts all at once; set `{key}`")
        return self


class ScheduleSettings(Settings):
    """How long, and the learning rate's shape: linear warm-up, then cosine to min_lr_ratio over the whole run."""

    total_steps: PositiveInt | None = None
    """Optimizer steps."""
    total_tokens: PositiveInt | None = None
    """Stands in for total_steps; tokens, rounded up to whole steps."""
    warmup_steps: NonNegativeInt = 500
    min_lr_ratio: Ratio = 0.1

    @model_validator(mode="after")
    def _one_length(self) -> "ScheduleSettings":
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError("give either `total_steps` or `total_tokens`, one of the two")
        return self


class ProjectionSettings(Settings):
    """The space in which galore, apollo and fira keep the moments of a matrix."""

    rank: PositiveInt = 128
    every_steps: PositiveInt = 200
    """Steps from one space to the next."""
    scale: PositiveFloat | None = None
    """Of the update, as the package takes it; 0.25 for galore and fira, 1 for apollo unless given."""


class OptimizerSettings(Settings):
    """AdamW, or what others train matrices with at full rank."""

    name: Literal["adamw", "adamw-8bit", "galore", "apollo", "fira"] = "adamw"
    """adamw-8bit keeps its moments in 8 bits (needs the extra `quant`); galore, apollo and fira keep those of the
    blocks' matrices at a low rank (with `method: full`; they need the extra `baselines`)."""
    lr: PositiveFloat = 1.0e-3
    """Of everything trained at full rank."""
    matrix_lr: PositiveFloat | None = None
    """Of the matrices in the blocks while they train at full rank; lr unless given."""
    lowrank_lr: PositiveFloat | None = None
    """Of the factors; 2 x matrix_lr unless given (the ReLoRA authors' rule)."""
    lowrank_b_lr_ratio: PositiveFloat = 1.0
    """Learning rate of lora_B over that of lora_A (LoRA+)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    """On matrices; norms and biases are not decayed."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """0 turns clipping off."""
    projection: ProjectionSettings = ProjectionSettings()


class BatchSettings(Settings):
    """Sequences per optimizer step, and per forward pass."""

    sequences: PositiveInt = 64
    micro_sequences: PositiveInt = 8

    @model_validator(mode="after")
    def _whole(self) -> "BatchSettings":
        if self.sequences % self.micro_sequences:
            raise ValueError(
                f"sequences ({self.sequences}) must be a multiple of micro_sequences ({self.micro_sequences})"
            )
        return self


class PrecisionSettings(Settings):
    """fp32; bf16-mixed (fp32 weights, bf16 products); bf16 (bf16-mixed, and frozen weights stored in bf16)."""

    dtype: Literal["fp32", "bf16", "bf16-mixed"] = "fp32"
    frozen: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Arithmetic of the products with frozen weights; auto: int8 where it is faster here, else that of dtype."""

    @model_validator(mode="after")
    def _not_finer_than_the_rest(self) -> "PrecisionSettings":
        if self.frozen == "fp32" and self.dtype != "fp32":
            raise ValueError(f"`frozen: fp32` would be finer than `dtype: {self.dtype}`; set `frozen: auto` or `bf16`")
        return self


class MemorySettings(Settings):
    """What is kept for the backward pass, and what is computed again."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """selective keeps the results of matrix products and attention, full only what enters each block."""


class CheckpointSettings(Settings):
    """When to save, and how many checkpoints to keep."""

    every_steps: PositiveInt = 500
    keep_last: PositiveInt = 2
    """One more is kept where these share one copy of the frozen weights."""
    background: bool = True
    """Write from a copy in main memory while training goes on; false saves that memory and waits for the disk."""


class NonFiniteSettings(Settings):
    """What to do when a loss, a gradient or a weight is not finite."""

    policy: Literal["stop", "skip", "rewind"] = "stop"
    """Stop; leave the step out; or go back to the last checkpoint and past the batches that led there."""
    limit: PositiveInt = 3
    """Stop after so many incidents in one run."""


class EvaluateSettings(Settings):
    """Held-out loss in the loop, and before and after every restart."""

    every_steps: PositiveInt = 500
    tokens: PositiveInt = 200_000
    """Held-out tokens per evaluation, the same ones every time."""


class LogSettings(Settings):
    """metrics.jsonl is always written; trackers come on top."""

    every_steps: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)


class SampleSettings(Settings):
    """Text generated at the end of the run."""

    prompts: tuple[Text, ...] = ("The",)
    max_new_tokens: PositiveInt = 80
    temperature: PositiveFloat = 0.8
    top_p: Ratio = 0.95
