"""Inputs of a fine-tuning run: examples, tokenizer, model and device, opened and checked against each other.

Nothing is written here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.adapters.added_tokens import fit_vocabulary, train_token_rows
from relora.adapters.llama_adapter import add_prompts
from relora.config import FinetuneConfig
from relora.data.finetuning.classification import (
    ClassBatches,
    ClassExamples,
    HeldOutClasses,
    encode_classes,
    settle_padding,
)
from relora.data.finetuning.examples import MULTIPLE, ExampleBatches, HeldOutExamples
from relora.data.finetuning.instruct import encode
from relora.data.finetuning.labelled import read_labels, split_labelled
from relora.data.finetuning.packing import check_packing
from relora.data.finetuning.records import Record, Records, split
from relora.data.readers import column_names
from relora.data.tokenizer import load_tokenizer, vocabulary_size
from relora.device import choose_device
from relora.distributed.group import ALONE, current_group
from relora.errors import UserError
from relora.evaluation.classification import evaluate_classes
from relora.evaluation.scored_model import BATCH
from relora.files.untrusted import check_folder
from relora.lowrank.targets import find_targets
from relora.lowrank.usage import FEWEST_TOKENS, usage_of, why_not_on
from relora.measure import Evaluation, evaluate, token_loss
from relora.model.attention import attention_note, check_causal
from relora.model.classifier import class_loss, open_classifier
from relora.model.finite import check_weights
from relora.model.load import model_folder, open_model
from relora.model.own_loss import own_loss_note
from relora.model.unused import leave_out_unused
from relora.recipes.from_settings import autocast_of, form_of, lowrank_of
from relora.recipes.pretraining_inputs import marked_as_sample
from relora.recipes.ranks import first_device
from relora.report.reporter import Reporter
from relora.report.trackers import check_trackers
from relora.runs.changes import HELD_OUT
from relora.runs.fingerprints import file_digest, fingerprint_of, held_out_choice
from relora.runs.settings import is_run
from relora.train.step import Loss


@dataclass(frozen=True)
class FinetuningInputs:
    """Everything that a fine-tuning run opens before it starts."""

    device: torch.device
    base: Path
    """The folder of the model that is fine-tuned."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    batches: ExampleBatches | ClassBatches
    held_out: HeldOutExamples | HeldOutClasses
    held_out_records: tuple[Record, ...]
    layout: str | None
    """Layout of the instruction records; None for classification."""
    notes: tuple[str, ...]
    """Lines for the console: counts of the examples, and what was added to the model."""
    content: dict[str, str]
    """Fingerprints of the examples and of the base; how held-out examples are chosen."""
    is_grown: bool = False
    """Whether the model has more ids than that in `base`."""

    @property
    def is_classifier(self) -> bool:
        """Whether the model classifies; otherwise it is a language model."""
        return isinstance(self.batches, ClassBatches)

    @property
    def asks(self) -> bool:
        """Whether the examples have prompts that the trained model can answer."""
        return self.layout is not None and self.layout != "completion"

    @property
    def loss(self) -> Loss:
        """Loss function of a batch."""
        return class_loss if self.is_classifier else token_loss

    def evaluate(self, config: FinetuneConfig, model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        """Measure held-out loss and scores of a model in training; `each_batch` is called before each batch."""
        autocast, group = autocast_of(config), current_group()
        if isinstance(self.held_out, HeldOutClasses):
            assert isinstance(model, PreTrainedModel)  # `self.model`, whose type the loop does not know
            scored = evaluate_classes(model, self.held_out, autocast=autocast, each_batch=each_batch, group=group)
            return marked_as_sample(scored.as_evaluation(), self.held_out.whole_targets)
        found = evaluate(model, self.held_out, autocast=autocast, each_batch=each_batch, group=group)
        return marked_as_sample(found, self.held_out.whole_targets)

    def evaluate_whole(self, model: PreTrainedModel, reporter: Reporter, *, shared: bool = True) -> Evaluation:
        """Measure the finished model on all held-out examples: the figure that an evaluation of the result gives.

        Args:
            shared: all ranks call this and share the work; otherwise this process does all of it.
        """
        held_out, group = self.held_out, current_group() if shared else ALONE
        if isinstance(held_out, HeldOutClasses):
            classes = HeldOutClasses(held_out.examples, sequences=BATCH)
            size = f"{classes.targets:,} examples"
            shown = reporter.measuring(classes, len(classes), size)
            return evaluate_classes(model, shown, group=group).as_evaluation()
        batches = HeldOutExamples(held_out.whole, micro_sequences=BATCH, pad_id=0)
        size = f"{batches.targets:,} tokens"
        return evaluate(model, reporter.measuring(batches, len(batches), size), group=group)


def gather_finetuning(config: FinetuneConfig) -> FinetuningInputs:
    """Open examples, tokenizer and model of a configuration.

    Raises:
        UserError: one of them cannot be used, or they do not fit together.
    """
    check_trackers(config.log.trackers)
    device = choose_device(config.device, current_group().local_rank)
    base, trust = base_folder(config), config.model.trust_remote_code
    tokenizer = load_tokenizer(str(base), trust_remote_code=trust)
    train, held_out_records, source_notes = read_records(config)
    batches: ExampleBatches | ClassBatches
    held_out: HeldOutExamples | HeldOutClasses
    layout = None
    if config.task == "classification":
        batches, held_out, notes = _classes(config, tokenizer, train, held_out_records)
        model = open_classifier(
            base,
            batches.examples.names,
            pad_token_id=batches.examples.pad_token_id,
            seed=config.seed,
            trust_remote_code=trust,
        )
    else:
        batches, held_out, layout, notes = _instructions(config, tokenizer, train, held_out_records)
        model = open_model(base, trust_remote_code=trust)
    notes = [*source_notes, *notes]
    rows = model.get_input_embeddings().num_embeddings
    resize = config.model.resize_vocabulary == "auto"
    notes += fit_vocabulary(model, vocabulary_size(tokenizer), config.data.sequence_length, resize=resize)
    check_weights(model, base)
    model.to(first_device(config, device, current_group()))
    model_notes = [attention_note(model)]
    if config.task != "classification":
        check_causal(model, base)
        model_notes.append(own_loss_note(model, experts_train=config.method == "full"))
    longest = _settle_length(model, batches)
    if config.method == "full":
        model_notes.append(leave_out_unused(model, longest))
    notes += [note for note in model_notes if note]
    if config.data.packing:
        check_packing(model, config.batch.micro_sequences)
    if config.method == "llama-adapter":
        notes.append(
            str(add_prompts(model, length=config.prompts.length, layers=config.prompts.layers, seed=config.seed))
        )
    elif config.method != "full":
        lowrank = config.lowrank
        notes += train_token_rows(model, tokenizer, lowrank.trainable_tokens, lowrank.trained_modules, rows)
        find_targets(model, lowrank_of(config))
    content = {
        "data": fingerprint_of(batches.content.encode(), held_out.content.encode()),
        HELD_OUT: held_out_choice(held_out.targets, held_out.whole_targets),
        "model": fingerprint_of((base / "config.json").read_bytes()),
        "base": fingerprint_of(*(file_digest(file) for file in sorted(base.glob("*.safetensors")))),
    }
    return FinetuningInputs(
        device,
        base,
        model,
        tokenizer,
        batches,
        held_out,
        tuple(held_out_records),
        layout,
        tuple(notes),
        content,
        model.get_input_embeddings().num_embeddings > rows,
    )


def _settle_multiple(model: PreTrainedModel, batches: ExampleBatches) -> None:
    """Let rows be padded to lengths on which the model trains: for Reformer, multiples of the length of its chunks.

    Raises:
        UserError: there is none up to the sequence length, or that is no such multiple.
    """
    usage, kind, most = usage_of(model, batches.longest), model.config.model_type, batches.sequence_length
    if usage is not None and usage.tokens == FEWEST_TOKENS:  # a prime number
        return
    reason, multiple = why_not_on(model, FEWEST_TOKENS), MULTIPLE
    while reason is not None and multiple <= most:
        reason = why_not_on(model, multiple if 3 * multiple > most else 3 * multiple)
        if reason is None:
            batches.multiple = multiple
            if batches.longest % multiple:
                raise UserError(f"data.sequence_length ({most}) must be a multiple of {multiple} for a {kind} model")
        multiple *= 2
    if reason is not None:
        raise UserError(f"data.sequence_length: a {kind} model does not train on {most} positions: {reason}")


def _settle_length(model: PreTrainedModel, batches: ExampleBatches | ClassBatches) -> int:
    """Return the positions of the longest batch; what the model uses on so many is kept for every later look.

    Raises:
        UserError: see `_settle_multiple`.
    """
    if isinstance(batches, ClassBatches):
        longest = int(np.diff(batches.examples.bounds).max())
    else:
        _settle_multiple(model, batches)
        longest = batches.longest
    usage_of(model, longest)
    return longest


def base_folder(config: FinetuneConfig) -> Path:
    """Folder of the model that is fine-tuned; `model.path` names it, a hub id, or the run that trained it."""
    assert config.model.path is not None  # checked by FinetuneConfig
    folder = Path(config.model.path)
    if not is_run(folder):
        return model_folder(config.model.path, trust_remote_code=config.model.trust_remote_code)
    check_folder(folder)
    if not (folder / "model").is_dir():
        raise UserError(f"model.path: {folder} has no model; finish that run, or give a model folder")
    return model_folder(folder / "model")


def read_records(config: FinetuneConfig) -> tuple[list[Record], list[Record], list[str]]:
    """Read the records to train on and the held-out ones; the third part is lines about what was not read.

    Records without a label are left out before they are split.
    """
    data = config.data
    sources = Records([data.train] if isinstance(data.train, str) else data.train, skip_bad=data.skip_bad)
    train = list(sources)
    if data.validation is None and config.task == "classification":
        found = read_labels(
            train, text_columns=data.text_columns, label_column=data.label_column, unlabelled=data.unlabelled
        )
        parts = split_labelled(found, data.validation_share, config.seed)
        return *parts, [*sources.notes(), *found.left_out]
    if data.validation is None:
        return *split(train, data.validation_share, config.seed), sources.notes()
    held_out_source = Records([data.validation], skip_bad=data.skip_bad)
    held_out = list(held_out_source)
    return train, held_out, [*sources.notes(), *(f"held out: {note}" for note in held_out_source.notes())]


def _instructions(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast, train: list[Record], held_out: list[Record]
) -> tuple[ExampleBatches, HeldOutExamples, str, list[str]]:
    """Encode instruction records: training batches, held-out examples, the layout's name, lines for the console."""
    data, form = config.data, form_of(config)
    # A sequence of n positions takes an example of n + 1 tokens: the first is only an input, the last only a label.
    length, skip = data.sequence_length + 1, data.skip_bad
    encoded = encode(train, tokenizer, form, sequence_length=length, skip_bad=skip)
    encoded_held_out = encode(held_out, tokenizer, form, sequence_length=length, skip_bad=skip)
    batches = ExampleBatches(
        encoded.examples,
        sequences=config.batch.sequences,
        sequence_length=data.sequence_length,
        pad_id=tokenizer.eos_token_id,
        packing=data.packing,
        group_by_length=data.group_by_length,
        seed=config.seed,
    )
    held_out_examples = HeldOutExamples(
        encoded_held_out.examples,
        micro_sequences=config.batch.micro_sequences,
        pad_id=tokenizer.eos_token_id,
        tokens=config.evaluate.tokens,
        seed=config.seed,
    )
    notes = [f"train: {encoded}", *encoded.notes, f"held out: {encoded_held_out.counts}"]
    notes += [f"held out: {note}" for note in encoded_held_out.notes if note not in encoded.notes]
    return batches, held_out_examples, encoded.layout.name, notes


def encode_labelled(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast, records: Iterable[Record]
) -> ClassExamples:
    """Encode labelled training records by the columns of the configuration; the tokenizer gets a padding token."""
    settle_padding(tokenizer)
    data = config.data
    return encode_classes(
        records,
        tokenizer,
        sequence_length=data.sequence_length,
        text_columns=data.text_columns,
        label_column=data.label_column,
        unlabelled=data.unlabelled,
    )


def _classes(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast, train: list[Record], held_out: list[Record]
) -> tuple[ClassBatches, HeldOutClasses, list[str]]:
    """Encode labelled records: training batches, held-out examples, lines for the console."""
    data = config.data
    examples = encode_labelled(config, tokenizer, train)
    held_out_examples = encode_classes(
        held_out, tokenizer, sequence_length=data.sequence_length, unlabelled=data.unlabelled, like=examples
    )
    kinds = f"{len(examples.names)} classes" if examples.names else "a number"
    cut = f", {examples.cut:,} cut" if examples.cut else ""
    note = f"train: {len(examples):,} examples of {kinds}{cut}; held out: {len(held_out_examples):,}"
    batches = ClassBatches(examples, sequences=config.batch.sequences, seed=config.seed)
    held_out_classes = HeldOutClasses(
        held_out_examples,
        sequences=config.batch.micro_sequences,
        tokens=config.evaluate.tokens,
        seed=config.seed,
    )
    held_out_notes = [f"held out: {one}" for one in held_out_examples.notes if one not in examples.notes]
    if lacking := held_out_examples.lacking:
        held_out_notes.append(
            f"held out: no example of {len(lacking):,} of {len(examples.names):,} classes ({column_names(lacking)}); "
            "raise data.validation_share, or give data.validation"
        )
    return batches, held_out_classes, [note, *examples.notes, *held_out_notes]
