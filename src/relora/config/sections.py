"""The sections of a configuration, one class each.

The string under a field documents its key: `relora config --schema` prints it, and its first sentence stands in
docs/configuration.md (written by docs/generate_configuration.py), so that sentence is short and complete in itself.
"""

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

_NO_SHAPE = {"preset", "path", "from_scratch", "trust_remote_code", "resize_vocabulary"}
"""Keys of the model that do not change its shape."""


class ModelSettings(Settings):
    """Model to train: a preset to build, or a Hugging Face causal LM to open.

    The shape keys, `vocab_size` to `tie_word_embeddings`, are those of the preset or of `path` unless given.
    """

    preset: Text | None = None
    """LLaMA shape of the ReLoRA paper to build, llama-9m to llama-7b; give this or `path`."""
    path: Place | None = None
    """Folder or hub id of a Hugging Face causal LM; give this or `preset`."""
    from_scratch: bool = False
    """Take only the architecture of `path`, and draw new weights from `seed`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model at `path`; only for a model whose code you have read."""
    resize_vocabulary: Literal["never", "auto"] = "never"
    """`auto`: embedding and head of a trained model get rows for ids that only the tokenizer of the data has. Each is
    the mean of the old rows."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; at least as many as the tokenizer has ids."""
    hidden_size: PositiveInt | None = None
    """Width of the hidden states; a multiple of `num_attention_heads`."""
    intermediate_size: PositiveInt | None = None
    """Width of the MLP."""
    num_hidden_layers: Annotated[int, Number, Field(gt=0, le=10_000)] | None = None
    """Number of decoder blocks."""
    num_attention_heads: PositiveInt | None = None
    """Number of attention heads; a multiple of `num_key_value_heads`."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key and value heads; follows `num_attention_heads` where the model has as many of both."""
    max_position_embeddings: PositiveInt | None = None
    """Length of the longest sequence in tokens; at least `data.sequence_length`."""
    tie_word_embeddings: bool | None = None
    """Use one matrix for the embedding and the head."""

    @property
    def overrides(self) -> dict[str, int | bool]:
        """Shape keys that were given, under the names of `transformers`, with their values."""
        return self.model_dump(exclude=_NO_SHAPE, exclude_none=True)

    @model_validator(mode="after")
    def _check_source(self) -> "ModelSettings":
        """Refuse both or neither of `preset` and `path`, and a shape key on a trained model."""
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either `preset` (a shape to build) or `path` (a model to open), one of the two")
        if self.resize_vocabulary == "auto" and (self.preset is not None or self.from_scratch):
            raise ValueError("`resize_vocabulary` is for a trained model; a new one gets its rows by `vocab_size`")
        if self.path is not None and self.overrides and not self.from_scratch:
            raise ValueError(
                f"`{next(iter(self.overrides))}` changes a trained model's shape; drop it or set `from_scratch: true`"
            )
        return self


class WeightedSource(Settings):
    """One prepared folder of a mixture."""

    path: Place
    """Folder written by `relora prepare`."""
    weight: PositiveFloat = 1.0
    """Share of the sequences that come from this folder, relative to the other weights."""


class DataSettings(Settings):
    """Folders of tokens, written by `relora prepare`."""

    train: Place | Annotated[tuple[WeightedSource, ...], Field(min_length=1)]
    """Prepared folder with the training text, or a list of `{path, weight}` to mix."""
    validation: Place
    """Prepared folder with the held-out text."""
    sequence_length: PositiveInt = 256
    """Tokens per sequence."""

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """Training folders with their weights, also where `train` is a single folder."""
        return (WeightedSource(path=self.train),) if isinstance(self.train, str) else self.train


class LowRankSettings(Settings):
    """Factors lora_A and lora_B beside each frozen weight (`relora.LowRankConfig` in the library)."""

    r: PositiveInt = 128
    """Rank of the factors; `all-linear` leaves out layers with a side smaller than it."""
    lora_alpha: PositiveFloat = 32.0
    """Numerator of the scale of the update, lora_alpha / r."""
    lora_dropout: Share = 0.0
    """Dropout probability on the input of the factors, in training."""
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """Layers that get factors: `all-linear`, a list of names, or one regular expression. `all-linear` is every linear
    layer of the decoder blocks; a name matches the end of a layer's path, an expression the whole path."""
    rslora: bool = False
    """Scale the update by lora_alpha / sqrt(r) instead of lora_alpha / r (rsLoRA)."""
    trainable_scaling: bool = False
    """Train one scale for each layer. A restart sets it back to its initial value, so that it cannot stay at zero."""
    base: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Format in which the frozen weights are stored; `auto` follows `precision.dtype`. With `bf16` and `int8` main
    memory holds an fp32 master copy of them, into which the factors are merged."""


class ResidualSettings(Settings):
    """Full-rank update of the frozen weights by that part of their gradient which the factors cannot express."""

    scale: NonNegativeFloat = 0.0
    """Learning rate of the frozen weights, relative to that of the factors; 0 leaves them as they are."""
    every_steps: PositiveInt = 1
    """Update the frozen weights only at multiples of this step. The other steps cost what they cost without it."""


class PretrainingLowRankSettings(LowRankSettings):
    """Factors lora_A and lora_B beside each frozen weight (`relora.LowRankConfig` in the library)."""

    warmup_steps: NonNegativeInt | None = None
    """Warm-up of the factors after a warm start, in steps; unless given, `schedule.warmup_steps`. Their learning rate
    rises from 0 while everything else trains on. With `variant: paper`, unless this is given, all learning rates warm
    up after the switch as they do after a restart."""
    ranks: Literal["uniform", "spectrum"] = "uniform"
    """Ranks of the layers: `r` in all, or by `spectrum`, chosen for each when the warm start ends. Such a rank is from
    r/4 to 2r, higher where the update has more directions; all factors together have no more parameters than with `r`
    in all layers."""
    residual: ResidualSettings = ResidualSettings()


class WarmStartSettings(Settings):
    """Full-rank training before the low-rank phase, in the same run."""

    steps: NonNegativeInt = 1000
    """Full-rank steps before the switch to low rank; 0 for low rank from the first step. With `auto`, the most."""
    takeover: bool = False
    """Begin the factors with the r leading directions of what the warm start has changed in each weight. `false` leaves
    all of it in the weights, and the factors begin with nothing."""
    auto: bool = False
    """End the warm start earlier, when the loss has flattened and the update is of low rank. `warm_start: auto` is
    short for `warm_start: {auto: true}`."""
    window_steps: PositiveInt = 50
    """Steps from one check of `auto` to the next; each averages the losses of these steps."""
    slope: Share = 0.02
    """Relative decrease of the mean loss between two windows below which `auto` takes it as flat."""
    energy: Ratio = 0.5
    """Share of the update in its r largest directions from which `auto` takes it as of low rank. The update is the step
    that Adam would take; the share is that of its squared norm, averaged over the target modules."""


def _expand_auto(value: object) -> object:
    """Turn the one word of `warm_start: auto` into the section that it stands for."""
    return {"auto": True} if value == "auto" else value


WarmStart = Annotated[
    WarmStartSettings, BeforeValidator(_expand_auto, json_schema_input_type=WarmStartSettings | Literal["auto"])
]


class RestartSettings(Settings):
    """Restarts of the factors: one timetable for merge, redraw, optimizer state and learning rate."""

    every_steps: PositiveInt = 1000
    """Length of the first cycle in steps, counted from the end of the warm start."""
    growth: Annotated[float, Number, Field(ge=1, le=10)] = 1.0
    """Length of each cycle relative to the one before."""
    until: Ratio = 1.0
    """Share of the run after which nothing restarts."""
    warmup_steps: NonNegativeInt = 50
    """Warm-up of the learning rate from 0 after a restart, in steps; 0 for none."""
    ramp: Literal["all", "factors"] = "all"
    """Parameters whose learning rate warms up after a restart: all that train, or only the redrawn factors."""
    optimizer: Literal["zero", "random", "magnitude", "keep", "project"] = "zero"
    """Treatment of the factors' optimizer state at a restart. `zero` clears m, v and the step count; `random` and
    `magnitude` prune m and v by one mask and keep the step count; `keep` changes nothing; `project` carries m and v
    over into the space of the new factors."""
    keep_ratio: Annotated[float, Number, Field(gt=0, lt=1)] = 0.1
    """Share of the entries of m and v that `optimizer: random` and `magnitude` keep."""
    init: Literal["kaiming", "orthogonal", "gradient-svd", "weight-svd", "balanced"] = "kaiming"
    """Method by which a restart redraws the factors. `kaiming`, `orthogonal`, `gradient-svd` and `weight-svd` set
    lora_B to 0 and draw lora_A at random, orthonormal, or along the leading singular vectors of the gradient or of the
    weight. `balanced` gives both the norms that they had reached, and subtracts their product from the weight."""
    directions: Literal["orthogonal", "gradient-svd", "weight-svd"] = "orthogonal"
    """Directions of the factors that `init: balanced` draws."""
    retain: Annotated[float, Number, Field(ge=0, lt=1)] = 0.0
    """Share of the ranks that keep their directions with `init: balanced`. These are the leading directions of the old
    factors' product; only the others are drawn anew."""
    stagger: Literal["none", "layers", "ranks"] = "none"
    """Parts that restart in turn: groups of layers, or of ranks in every layer; `none` restarts all at once."""
    turns: Annotated[int, Number, Field(ge=2, le=1000)] = 4
    """Number of parts with `stagger`; each restarts once in a cycle."""
    adaptive: bool = False
    """Restart only when the update is full or the loss has flattened, checked every `every_steps`."""
    rank_share: Ratio = 0.9
    """Effective rank, as a share of r, at which `adaptive` takes the update as full. It is the mean over the layers;
    balanced factors, whose rank is full from the first step, are judged by the loss alone."""
    slope: Share = 0.01
    """Relative decrease of the mean loss between two checks below which `adaptive` takes it as flat."""

    @model_validator(mode="after")
    def _check_stagger_and_adaptive(self) -> "RestartSettings":
        """Refuse what cannot restart in parts, and a fixed timetable for restarts that the run decides on."""
        if self.stagger == "ranks" and self.optimizer not in ("zero", "keep"):
            raise ValueError(f"`stagger: ranks` knows `optimizer: zero` and `keep`, not `{self.optimizer}`")
        if self.retain and (self.init != "balanced" or self.stagger == "ranks"):
            raise ValueError("`retain` goes with `init: balanced` and restarts of whole layers; set `retain: 0`")
        if self.stagger == "ranks" and self.warmup_steps:
            raise ValueError("`stagger: ranks` has no rate for a part of a factor; set `warmup_steps: 0`")
        if self.stagger == "layers" and self.warmup_steps and self.ramp == "all":
            raise ValueError("`stagger: layers` would let every rate dip at every turn; set `ramp: factors`")
        if self.adaptive and (self.growth != 1 or self.stagger != "none"):
            key = "growth: 1" if self.growth != 1 else "stagger: none"
            raise ValueError(f"`adaptive` says how long a cycle is, and restarts all at once; set `{key}`")
        return self


class ScheduleSettings(Settings):
    """Length of the run and shape of the learning rate: linear warm-up, then a cosine over the rest of the run."""

    total_steps: PositiveInt | None = None
    """Optimizer steps of the whole run, warm start included; give this or `total_tokens`."""
    total_tokens: PositiveInt | None = None
    """Tokens of the whole run, rounded up to whole steps; give this or `total_steps`."""
    warmup_steps: NonNegativeInt = 500
    """Steps of the linear warm-up at the start of the run."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end of the cosine, relative to its peak; 1 for a constant rate after the warm-up."""

    @model_validator(mode="after")
    def _check_length(self) -> "ScheduleSettings":
        """Refuse both or neither of `total_steps` and `total_tokens`."""
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError("give either `total_steps` or `total_tokens`, one of the two")
        return self


class ProjectionSettings(Settings):
    """Space in which `galore`, `apollo` and `fira` keep the moments of a matrix."""

    rank: PositiveInt = 128
    """Rank of the space."""
    every_steps: PositiveInt = 200
    """Steps after which the space is computed anew."""
    scale: PositiveFloat | None = None
    """Scale of the update; unless given, that of the authors: 0.25, with apollo 1."""


class OptimizerSettings(Settings):
    """Optimizer and its peak learning rates."""

    name: Literal["adamw", "adamw-8bit", "galore", "apollo", "fira"] = "adamw"
    """Optimizer; `galore`, `apollo` and `fira` want `method: full`. `adamw-8bit` keeps its moments in 8 bits (extra
    `quant`). `galore`, `apollo` and `fira` keep the moments of the blocks' matrices at a low rank (extra `baselines`;
    `apollo` for apollo)."""
    factors: Literal["adamw", "muon"] = "adamw"
    """Optimizer of lora_A and lora_B beside `name: adamw`. `muon` moves all directions of a factor equally far, and
    keeps one moment instead of two."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the blocks' matrices while they train at full rank, beside `name: adamw`."""
    momentum: Share = 0.95
    """Momentum of `muon`."""
    lr: PositiveFloat = 1.0e-3
    """Peak learning rate of all that trains at full rank."""
    matrix_lr: PositiveFloat | None = None
    """Peak learning rate of the blocks' matrices while they train at full rank; unless given, `lr`."""
    lowrank_lr: PositiveFloat | None = None
    """Peak learning rate of the factors; unless given, 2 x `matrix_lr` (the ReLoRA authors' rule)."""
    lowrank_b_lr_ratio: PositiveFloat = 1.0
    """Learning rate of lora_B relative to that of lora_A (LoRA+)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1.0e-8
    """Number added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the matrices that train; norms, biases and scales have none."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    projection: ProjectionSettings = ProjectionSettings()


class BatchSettings(Settings):
    """Batch of an optimizer step, and its micro-batches."""

    sequences: PositiveInt = 64
    """Sequences of an optimizer step."""
    micro_sequences: PositiveInt = 8
    """Sequences of a micro-batch (one forward pass), in training and evaluation; divides `sequences`."""

    @model_validator(mode="after")
    def _check_micro_batches(self) -> "BatchSettings":
        """Refuse a batch that is no whole number of micro-batches."""
        if self.sequences % self.micro_sequences:
            raise ValueError(
                f"sequences ({self.sequences}) must be a multiple of micro_sequences ({self.micro_sequences})"
            )
        return self


class PrecisionSettings(Settings):
    """Number formats of products and of frozen weights; what trains, and its optimizer state, is fp32."""

    dtype: Literal["auto", "fp32", "bf16", "bf16-mixed"] = "auto"
    """Format of products: `bf16-mixed` and `bf16` compute them in bf16, `auto` where that is faster on this device.
    `bf16-mixed` keeps all weights in fp32; `bf16` stores the frozen ones in bf16. `auto` is `bf16-mixed` on a GPU that
    has bf16, and on a CPU on which the matrices of this model were measured to be faster by a fifth; elsewhere `fp32`.
    The run says which, writes it into its folder's config.yaml, and goes on with it."""
    frozen: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Format of products with frozen weights in training; `auto`: int8 where it is faster, else that of `dtype`. Faster
    means by the rates that were measured on this machine."""

    @model_validator(mode="after")
    def _check_frozen(self) -> "PrecisionSettings":
        """Refuse frozen weights in fp32 where all other products are in bf16."""
        if self.frozen == "fp32" and self.dtype not in ("auto", "fp32"):
            raise ValueError(f"`frozen: fp32` would be finer than `dtype: {self.dtype}`; set `frozen: auto` or `bf16`")
        return self


class MemorySettings(Settings):
    """Memory of the backward pass."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them. `none` keeps all; `selective` keeps
    the results of matrix products and of attention; `full` keeps only the input of each block."""


class CheckpointSettings(Settings):
    """Checkpoints: when they are written, and how many are kept."""

    every_steps: PositiveInt = 500
    """Steps from one checkpoint to the next; the last step always has one."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept; one more where these share one copy of the frozen weights."""
    background: bool = True
    """Write from a copy in main memory while training goes on; `false` saves that memory and waits for the disk."""


class NonFiniteSettings(Settings):
    """Reaction to a loss, a gradient or a weight that is not finite."""

    policy: Literal["stop", "skip", "rewind"] = "stop"
    """Stop the run, skip the step, or rewind to the last checkpoint. A run that was rewound leaves out the batches that
    led to the incident."""
    limit: PositiveInt = 3
    """Incidents in one run after which it stops in any case."""


class EvaluateSettings(Settings):
    """Held-out loss: measured in the loop, at the start, around the switch and restarts, and at the end."""

    every_steps: PositiveInt = 500
    """Steps from one measurement of the held-out loss to the next. Restarts that come oftener than twice as often are
    not all measured, but every n-th."""
    tokens: PositiveInt = 200_000
    """Most held-out tokens of a measurement in training: a sample of them at equal distances, or all. It is the same
    sample every time; the result is measured on the whole held-out part in any case."""


class LogSettings(Settings):
    """Figures of the run: metrics.jsonl, which is always written, and trackers."""

    every_steps: PositiveInt = 10
    """Steps from one line of metrics.jsonl to the next; the last step always has one."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers that get the figures, too; `wandb` and `trackio` need the extra of that name."""


class SampleSettings(Settings):
    """Text that the finished model generates for the report."""

    prompts: tuple[Text, ...] = ("The",)
    """Texts that the model continues."""
    max_new_tokens: PositiveInt = 80
    """Tokens of a continuation; fewer where the model has no room."""
    temperature: PositiveFloat = 0.8
    """Sampling temperature."""
    top_p: Ratio = 0.95
    """Nucleus sampling: least total probability of the tokens that are drawn from."""
