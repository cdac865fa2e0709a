"""Configuration of `relora finetune`: examples instead of a stream of tokens, and defaults for a trained model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from relora.config.sections import (
    BatchSettings,
    EvaluateSettings,
    LowRankSettings,
    ModelSettings,
    OptimizerSettings,
    RestartSettings,
)
from relora.config.training import TrainingConfig
from relora.config.values import NonNegativeInt, Place, PositiveFloat, PositiveInt, Ratio, Settings, Text

PROMPT_LR = 5.0e-3
"""Default learning rate of LLaMA-Adapter's prompts and gates.

A gate moves by about the learning rate in a step and has to reach 1; published runs have rate x steps of about 9.
"""


class FinetuneModelSettings(ModelSettings):
    """Model to fine-tune: `path` is required, and `preset` belongs to pretraining."""

    path: Place | None = None
    """Model folder, hub id or run folder to begin with; required."""
    resize_vocabulary: Literal["never", "auto"] = "never"
    """`auto`: embedding and head get rows for ids that only the tokenizer has. Each is the mean of the old rows; a run
    that leaves an adapter then writes its base, RUN/base."""


class ExampleSettings(Settings):
    """Records with a prompt and a response each, or with a text and its class."""

    train: Place | Annotated[tuple[Place, ...], Field(min_length=1)]
    """File or folder (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .md), hub dataset id, or a list of these."""
    validation: Place | None = None
    """Held-out records, given like `train`; unless given, `validation_share` of the training records."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training records that is held out; of classes, of each."""
    sequence_length: PositiveInt = 512
    """Largest number of tokens of an example; a longer one loses tokens of its prompt first."""
    layout: Literal["auto", "alpaca", "dolly", "chat", "completion", "columns"] = "auto"
    """Columns of the records; `columns`: those that `prompt_column` and `response_column` name."""
    prompt_column: Text | None = None
    """Column of the prompt, with `layout: columns`."""
    response_column: Text | None = None
    """Column of the response, with `layout: columns`."""
    template: Literal["auto", "alpaca", "chat", "plain"] = "auto"
    """Form in which prompt and response become one text; `auto`: the tokenizer's chat template, else Alpaca's."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and count them, instead of refusing the file."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens that the loss is taken on: those of the response, or all."""
    packing: bool = False
    """Put several examples into one sequence, in which none attends to another."""
    group_by_length: bool = True
    """Make batches of examples of similar length, for less padding."""
    text_columns: Annotated[tuple[Text, ...], Field(max_length=2)] = ()
    """Classification: one or two columns of text; unless given, found by their usual names."""
    label_column: Text | None = None
    """Classification: column of the class, or of the number to predict; found likewise."""
    unlabelled: Literal["auto"] | tuple[int | Text, ...] = "auto"
    """Classification: labels that stand for none, whose records are left out and counted. `auto`: -1 and -100 beside
    labels from 0 on, these and `-` beside words; missing ones always."""

    @model_validator(mode="after")
    def _check_columns(self) -> "ExampleSettings":
        """Refuse a layout without the columns that it needs, and columns that the layout does not read."""
        if self.layout == "columns" and self.response_column is None:
            raise ValueError("`layout: columns` needs `response_column` (and `prompt_column`): which hold the texts?")
        if self.layout != "columns" and (self.prompt_column or self.response_column):
            raise ValueError("`prompt_column` and `response_column` are read with `layout: columns`")
        return self


class FinetuneLowRankSettings(LowRankSettings):
    """Factors lora_A and lora_B beside each frozen weight; everything but them and `trained_modules` is frozen."""

    r: PositiveInt = 8
    """Rank of the factors; `all-linear` leaves out layers with a side smaller than it."""
    lora_alpha: PositiveFloat = 16.0
    """Numerator of the scale of the update, lora_alpha / r."""
    rank_pattern: dict[Text, PositiveInt] = Field(default_factory=dict)
    """Ranks of single layers: regular expression for the end of a layer's path -> its r."""
    alpha_pattern: dict[Text, PositiveFloat] = Field(default_factory=dict)
    """Scales of single layers: regular expression for the end of a layer's path -> its lora_alpha."""
    dora: bool = False
    """Train the norm of each row apart from its direction (DoRA)."""
    trained_modules: tuple[Text, ...] = ()
    """Modules that train in full beside the factors, such as `lm_head`: names or regular expressions."""
    trainable_tokens: Literal["new"] | tuple[NonNegativeInt | Text, ...] = ()
    """Tokens (ids, texts, or `new`) whose rows of embedding and head train at `optimizer.lr`; other rows are frozen.
    `new` are the rows that `model.resize_vocabulary` has added."""
    init: Literal["kaiming", "orthogonal", "pissa", "gradient-svd"] = "kaiming"
    """Method by which the factors are drawn at the start; `gradient-svd` is LoRA-GA."""
    base: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"  # type: ignore[assignment]
    """Format in which the frozen weights are stored; `auto` follows `precision.dtype`. `nf4` is QLoRA's (extra
    `quant`)."""


class PromptSettings(Settings):
    """Prompts of `method: llama-adapter`, learned in the attention of the upper layers."""

    length: PositiveInt = 10
    """Prompt tokens of a layer."""
    layers: PositiveInt = 30
    """Number of upper layers that get prompts; all, where the model has fewer."""


class FinetuneScheduleSettings(Settings):
    """Length of the run and shape of the learning rate: linear warm-up, then a cosine over the rest of the run."""

    epochs: PositiveFloat | None = None
    """Passes over the training examples; unless this or `total_steps` is given, 3."""
    total_steps: PositiveInt | None = None
    """Optimizer steps of the whole run, instead of `epochs`."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of the linear warm-up at the start of the run; unless given, 3% of the run."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the end of the cosine, relative to its peak; 1 for a constant rate after the warm-up."""

    @model_validator(mode="after")
    def _check_length(self) -> "FinetuneScheduleSettings":
        """Refuse `epochs` together with `total_steps`."""
        if self.epochs is not None and self.total_steps is not None:
            raise ValueError("give either `epochs` or `total_steps`, one of the two")
        return self


class FinetuneOptimizerSettings(OptimizerSettings):
    """Optimizer and its peak learning rates."""

    lr: PositiveFloat = 2.0e-5
    """Peak learning rate of all that trains in full; unless given, 5e-3 with `method: llama-adapter`."""
    lowrank_lr: PositiveFloat = 2.0e-4
    """Peak learning rate of the factors."""


class FinetuneRestartSettings(RestartSettings):
    """Restarts of the factors, with `method: relora`: one timetable for merge, redraw, moments and learning rate."""

    every_steps: PositiveInt = 100
    """Length of the first cycle in steps, counted from the start of the run."""
    warmup_steps: NonNegativeInt = 10
    """Warm-up of the learning rate from 0 after a restart, in steps; 0 for none."""


class FinetuneBatchSettings(BatchSettings):
    """Batch of an optimizer step, and its micro-batches."""

    sequences: PositiveInt = 32
    """Examples of an optimizer step; with `data.packing`, sequences."""
    micro_sequences: PositiveInt = 4
    """Examples (or sequences) of a micro-batch, that is one forward pass; divides `sequences`."""


class FinetuneEvaluateSettings(EvaluateSettings):
    """Held-out loss: measured in the loop, at the start, around every restart, and at the end."""

    every_steps: PositiveInt = 100
    """Steps from one measurement of the held-out loss to the next."""


class AnswerSettings(Settings):
    """Answers to held-out prompts that the finished model gives for the report, by greedy decoding."""

    examples: NonNegativeInt = 3
    """Held-out prompts that are answered."""
    max_new_tokens: PositiveInt = 128
    """Largest number of tokens of an answer."""


class FinetuneConfig(TrainingConfig):
    """All keys of `relora finetune`."""

    task: Literal["instruct", "classification"]
    """Task: answering instructions, or telling classes of texts (or numbers) apart."""
    model: FinetuneModelSettings
    data: ExampleSettings
    method: Literal["lora", "relora", "llama-adapter", "full"] = "lora"
    """Training method: factors without or with restarts, learned prompts, or all weights."""
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
    def _fill_prompt_rate(cls, tree: Any) -> Any:
        """Give LLaMA-Adapter its own default rate: prompts need a far higher one than the weights of a model."""
        if not (isinstance(tree, dict) and tree.get("method") == "llama-adapter"):
            return tree
        given = tree.get("optimizer", {})
        return tree | {"optimizer": {"lr": PROMPT_LR, **given}} if isinstance(given, dict) else tree

    @model_validator(mode="after")
    def _check_combination(self) -> "FinetuneConfig":
        """Refuse a model that is not given, and methods, inits and tasks that exclude one another."""
        if self.model.path is None:
            raise ValueError("model.path: fine-tuning begins with a trained model; give its folder or hub id")
        if self.method == "relora" and (self.lowrank.dora or self.lowrank.init in ("pissa", "gradient-svd")):
            option = "dora" if self.lowrank.dora else f"init: {self.lowrank.init}"
            raise ValueError(f"lowrank.{option} is of one update; with `method: relora` leave it out")
        if self.method in ("full", "llama-adapter") and self.lowrank.trainable_tokens:
            raise ValueError(f"lowrank.trainable_tokens: is for rows beside factors, not for `method: {self.method}`")
        if self.task == "classification" and self.lowrank.trainable_tokens:
            raise ValueError("lowrank.trainable_tokens: a classifier has no head over tokens; leave it out")
        if self.lowrank.trainable_tokens == "new" and self.model.resize_vocabulary == "never":
            raise ValueError("lowrank.trainable_tokens: `new` needs `model.resize_vocabulary: auto`; or name tokens")
        if self.method == "llama-adapter" and self.model.resize_vocabulary == "auto":
            raise ValueError("model.resize_vocabulary: `method: llama-adapter` trains no rows; take lora or full")
        if self.task == "classification" and self.data.packing:
            raise ValueError("data.packing: a class belongs to a whole sequence; leave it out")
        if self.task == "classification" and self.method == "llama-adapter":
            raise ValueError("method: llama-adapter trains no head, which a classifier needs; take lora or full")
        return self
