"""What `relora finetune` reads: examples instead of a stream of tokens, and defaults for a trained model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from relora.config.sections import (
    BatchSettings,
    EvaluateSettings,
    LowRankSettings,
    OptimizerSettings,
    RestartSettings,
)
from relora.config.training import TrainingConfig
from relora.config.values import NonNegativeInt, Place, PositiveFloat, PositiveInt, Ratio, Settings, Text

PROMPT_LR = 5.0e-3
"""A gate moves by about the rate in a step and must reach one: published runs have rate x steps of about 9."""


class ExampleSettings(Settings):
    """Records with a prompt and a response each, or with a text and its class."""

    train: Place | Annotated[tuple[Place, ...], Field(min_length=1)]
    """A file or folder (.json, .jsonl, .csv, .parquet) or a hub dataset id, or a list of these."""
    validation: Place | None = None
    """As `train`; unless given, `validation_share` of the training records."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    sequence_length: PositiveInt = 512
    """Tokens of an example at most; of longer ones the prompt is cut first."""
    layout: Literal["auto", "alpaca", "dolly", "chat", "completion", "columns"] = "auto"
    """The names of the records' columns; `columns` takes those of `prompt_column` and `response_column`."""
    prompt_column: Text | None = None
    response_column: Text | None = None
    template: Literal["auto", "alpaca", "chat", "plain"] = "auto"
    """How prompt and response become one text; auto: the tokenizer's chat template, else Alpaca's."""
    skip_bad: bool = False
    """Leave records out that cannot be used, and count them, instead of refusing the file."""
    loss_on: Literal["response", "all"] = "response"
    packing: bool = False
    """Several examples in one sequence, none of which sees another."""
    group_by_length: bool = True
    """Batches of examples of like length: less padding."""
    text_columns: Annotated[tuple[Text, ...], Field(max_length=2)] = ()
    """Classification: the column of the text, or of both texts; found by its usual names unless given."""
    label_column: Text | None = None
    """Classification: the column of the class, or of the number to predict."""

    @model_validator(mode="after")
    def _columns(self) -> "ExampleSettings":
        if self.layout == "columns" and self.response_column is None:
            raise ValueError("`layout: columns` needs `response_column` (and `prompt_column`): which hold the texts?")
        if self.layout != "columns" and (self.prompt_column or self.response_column):
            raise ValueError("`prompt_column` and `response_column` are read with `layout: columns`")
        return self


class FinetuneLowRankSettings(LowRankSettings):
    """The two factors beside every frozen weight (see `relora.LowRankConfig`); everything else is frozen."""

    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16.0
    rank_pattern: dict[Text, PositiveInt] = Field(default_factory=dict)
    """Regular expression for the end of a layer's path -> its r."""
    alpha_pattern: dict[Text, PositiveFloat] = Field(default_factory=dict)
    """Regular expression for the end of a layer's path -> its lora_alpha."""
    dora: bool = False
    """Train each row's norm apart from its direction (DoRA)."""
    trained_modules: tuple[Text, ...] = ()
    """Modules that train in full, by name or regular expression, e.g. lm_head."""
    init: Literal["kaiming", "orthogonal", "pissa", "gradient-svd"] = "kaiming"
    base: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"  # type: ignore[assignment]
    """How frozen weights are stored; auto follows precision.dtype. nf4 is QLoRA's (needs the extra `quant`)."""


class PromptSettings(Settings):
    """LLaMA-Adapter: learned prompts in the attention of the upper layers."""

    length: PositiveInt = 10
    """Prompt tokens of a layer."""
    layers: PositiveInt = 30
    """Upper layers that get them; all, where the model has fewer."""


class FinetuneScheduleSettings(Settings):
    """How long, and the learning rate's shape: linear warm-up, then cosine to min_lr_ratio over the whole run."""

    epochs: PositiveFloat | None = None
    """Passes over the training examples; 3 unless `total_steps` is given."""
    total_steps: PositiveInt | None = None
    """Optimizer steps."""
    warmup_steps: NonNegativeInt | None = None
    """3% of the run unless given."""
    min_lr_ratio: Ratio = 0.1

    @model_validator(mode="after")
    def _one_length(self) -> "FinetuneScheduleSettings":
        if self.epochs is not None and self.total_steps is not None:
            raise ValueError("give either `epochs` or `total_steps`, one of the two")
        return self


class FinetuneOptimizerSettings(OptimizerSettings):
    """AdamW."""

    lr: PositiveFloat = 2.0e-5
    """Of what trains in full; of the prompts of llama-adapter 5e-3 unless given."""
    lowrank_lr: PositiveFloat = 2.0e-4
    """Of the factors."""


class FinetuneRestartSettings(RestartSettings):
    """Merge, redraw, clear, dip: one period drives all four."""

    every_steps: PositiveInt = 100
    warmup_steps: NonNegativeInt = 10


class FinetuneBatchSettings(BatchSettings):
    """Examples (with packing: sequences) per optimizer step, and per forward pass."""

    sequences: PositiveInt = 32
    micro_sequences: PositiveInt = 4


class FinetuneEvaluateSettings(EvaluateSettings):
    """Held-out loss in the loop, and before and after every restart."""

    every_steps: PositiveInt = 100


class AnswerSettings(Settings):
    """Answers to held-out prompts at the end of the run, greedy."""

    examples: NonNegativeInt = 3
    max_new_tokens: PositiveInt = 128


class FinetuneConfig(TrainingConfig):
    """Everything that `relora finetune` reads."""

    task: Literal["instruct", "classification"]
    """Answer instructions, or tell classes of texts (or numbers) apart."""
    data: ExampleSettings
    method: Literal["lora", "relora", "llama-adapter", "full"] = "lora"
    lowrank: FinetuneLowRankSettings = FinetuneLowRankSettings()
    prompts: PromptSettings = PromptSettings()
    schedule: FinetuneScheduleSettings = FinetuneScheduleSettings()
    optimizer: FinetuneOptimizerSettings = FinetuneOptimizerSettings()
    restart: FinetuneRestartSettings = FinetuneRestartSettings()
    batch: FinetuneBatchSettings = FinetuneBatchSettings()
    evaluate: FinetuneEvaluateSettings = FinetuneEvaluateSettings()
    samples: AnswerSettings = AnswerSettings()

    @model_validator(mode="before")
    @classmethod
    def _rate_of_prompts(cls, tree: Any) -> Any:
        """LLaMA-Adapter's prompts want a far higher rate than a model's own weights."""
        if not (isinstance(tree, dict) and tree.get("method") == "llama-adapter"):
            return tree
        given = tree.get("optimizer", {})
        return tree | {"optimizer": {"lr": PROMPT_LR, **given}} if isinstance(given, dict) else tree

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneConfig":
        if self.model.path is None:
            raise ValueError("model.path: fine-tuning begins with a trained model; give its folder or hub id")
        if self.method == "relora" and (self.lowrank.dora or self.lowrank.init in ("pissa", "gradient-svd")):
            option = "dora" if self.lowrank.dora else f"init: {self.lowrank.init}"
            raise ValueError(f"lowrank.{option} is of one update; with `method: relora` leave it out")
        if self.task == "classification" and self.data.packing:
            raise ValueError("data.packing: a class belongs to a whole sequence; leave it out")
        if self.task == "classification" and self.method == "llama-adapter":
            raise ValueError("method: llama-adapter trains no head, which a classifier needs; take lora or full")
        return self
