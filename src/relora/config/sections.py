"""The sections of a configuration, one class each; the string under a field is its documentation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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


class WarmStartSettings(Settings):
    """Full-rank training before the low-rank phase, in the same run."""

    steps: NonNegativeInt = 1000


class RestartSettings(Settings):
    """Merge, redraw, clear, dip: one period drives all four."""

    every_steps: PositiveInt = 1000
    warmup_steps: NonNegativeInt = 50
    optimizer: Literal["zero", "random", "magnitude", "keep"] = "zero"
    """The factors' optimizer state: zero all of it (m, v and step), prune m and v by one mask, or keep it."""
    keep_ratio: Annotated[float, Number, Field(gt=0, lt=1)] = 0.1
    """For random and magnitude: the share of the entries that stays."""
    init: Literal["kaiming"] = "kaiming"


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


class OptimizerSettings(Settings):
    """AdamW."""

    name: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit keeps its moments in 8 bits (needs the extra `quant`)."""
    lr: PositiveFloat = 1.0e-3
    """Of everything trained at full rank."""
    lowrank_lr: PositiveFloat | None = None
    """Of the factors; 2 x lr unless given (the ReLoRA authors' rule)."""
    lowrank_b_lr_ratio: PositiveFloat = 1.0
    """Learning rate of lora_B over that of lora_A (LoRA+)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    """On matrices; norms and biases are not decayed."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """0 turns clipping off."""


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
