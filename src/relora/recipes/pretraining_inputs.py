"""Inputs of a pretraining run: data, tokenizer, model and device, opened and checked against each other.

Nothing is written here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.adapters.own_tokenizer import vocabulary
from relora.config import RunConfig
from relora.data.pretraining.batches import HeldOut, TrainBatches, check_same_tokenizer
from relora.data.pretraining.shards import PreparedFolder
from relora.data.tokenizer import fingerprint, load_tokenizer
from relora.device import choose_device
from relora.distributed.group import current_group
from relora.errors import UserError
from relora.evaluation.scored_model import BATCH
from relora.lowrank.targets import find_targets
from relora.lowrank.usage import usage_of, why_not_on
from relora.measure import Evaluation, evaluate
from relora.model.attention import attention_note, check_causal
from relora.model.finite import check_weights
from relora.model.load import build_model, check_fit, model_folder, open_model
from relora.model.own_loss import own_loss_note
from relora.model.unused import leave_out_unused
from relora.model.vocabulary import grow_vocabulary
from relora.recipes.from_settings import autocast_of, lowrank_of
from relora.recipes.ranks import first_device
from relora.report.reporter import Reporter
from relora.report.trackers import check_trackers
from relora.runs.changes import HELD_OUT
from relora.runs.fingerprints import fingerprint_of, held_out_choice


@dataclass(frozen=True)
class PretrainingInputs:
    """Everything that a pretraining run opens before it starts."""

    device: torch.device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: TrainBatches
    held_out: HeldOut
    bytes_per_token: float
    content: dict[str, str]
    """Fingerprints of what the configuration only points at: the tokens of `data`, the shape of `model.path`; and how
    held-out tokens are chosen."""
    notes: tuple[str, ...] = ()
    """Lines for the console: what is peculiar to the model."""

    def evaluate(self, config: RunConfig, model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        """Measure the held-out loss of a model in training; `each_batch` is called before each batch."""
        found = evaluate(
            model,
            self.held_out,
            bytes_per_token=self.bytes_per_token,
            autocast=autocast_of(config),
            each_batch=each_batch,
            group=current_group(),
        )
        return marked_as_sample(found, self.held_out.whole_targets)

    def evaluate_whole(self, model: nn.Module, reporter: Reporter) -> Evaluation:
        """Measure the finished model on the whole held-out part: the figure that `relora evaluate` gives."""
        folder = self.held_out.folder
        batches = HeldOut(folder, self.held_out.sequence_length, folder.tokens, BATCH)
        shown = reporter.measuring(batches, len(batches), f"{batches.targets:,} tokens")
        return evaluate(model, shown, bytes_per_token=self.bytes_per_token, group=current_group())


def gather_pretraining(config: RunConfig) -> PretrainingInputs:
    """Open data, tokenizer and model of a configuration.

    Raises:
        UserError: one of them cannot be used, or they do not fit together.
    """
    check_trackers(config.log.trackers)
    device = choose_device(config.device, current_group().local_rank)
    batches, held_out = open_data(config)
    validation = held_out.folder
    model, vocabulary_notes = open_fitting_model(config, validation)
    for folder in (*batches.folders, validation):
        folder.verify()
    tokenizer = load_tokenizer(str(validation.tokenizer_path))
    if fingerprint(tokenizer) != validation.fingerprint:
        raise UserError(f"{validation.tokenizer_path}: not the tokenizer that wrote {validation.path}; put it back")
    content = {
        "data": fingerprint_of(*(folder.content.encode() for folder in (*batches.folders, validation))),
        HELD_OUT: held_out_choice(held_out.targets, held_out.whole_targets),
    }
    if config.model.path is not None:
        content["model"] = fingerprint_of((model_folder(config.model.path) / "config.json").read_bytes())
    model.to(first_device(config, device, current_group()))
    if config.model.path is not None:
        check_weights(model, config.model.path)
        check_causal(model, config.model.path)
    notes = [
        *vocabulary_notes,
        attention_note(model),
        own_loss_note(model, experts_train=True),
        leave_out_unused(model, config.data.sequence_length),
    ]
    return PretrainingInputs(
        device,
        model,
        tokenizer,
        batches,
        held_out,
        validation.bytes_per_token,
        content,
        tuple(note for note in notes if note),
    )


def open_data(config: RunConfig) -> tuple[TrainBatches, HeldOut]:
    """Open the prepared folders of a configuration; `UserError` if their tokenizers differ or they are too small."""
    sources = [(PreparedFolder.open(source.path), source.weight) for source in config.data.sources]
    validation = PreparedFolder.open(config.data.validation)
    check_same_tokenizer([*(folder for folder, _ in sources), validation])
    length = config.data.sequence_length
    batches = TrainBatches(sources, length, config.batch.sequences, config.seed)
    micro_sequences = config.batch.micro_sequences
    return batches, HeldOut(validation, length, config.evaluate.tokens, micro_sequences, seed=config.seed)


def open_fitting_model(config: RunConfig, validation: PreparedFolder) -> tuple[PreTrainedModel, list[str]]:
    """Open the model of a configuration, with a row for every id of the data, and say in a line what rows were added.

    Raises:
        UserError: the data or the low-rank settings do not fit the model.
    """
    model = open_configured_model(
        config, eos_token_id=validation.index.eos_token_id, trust_remote_code=config.model.trust_remote_code
    )
    lines = []
    if config.model.resize_vocabulary == "auto" and validation.vocab_size > model.get_input_embeddings().num_embeddings:
        lines.append(grow_vocabulary(model, validation.vocab_size))
    trained = config.model.path is not None and not config.model.from_scratch
    if config.model.path is not None and trained:
        lines += _other_ids(model_folder(config.model.path), validation)
    remedy = (
        "set `model.resize_vocabulary: auto` to add rows for the others, or prepare the data with the model's tokenizer"
    )
    check_fit(model, validation.vocab_size, config.data.sequence_length, remedy=remedy if trained else None)
    length = config.data.sequence_length
    # the usage is kept for every later look at what the model uses
    if usage_of(model, length) is None and (reason := why_not_on(model, length)):
        raise UserError(
            f"data.sequence_length: a {model.config.model_type} model does not train on {length} positions: {reason}"
        )
    if config.method != "full":
        find_targets(model, lowrank_of(config))
    return model, lines


def _other_ids(model: Path, data: PreparedFolder) -> list[str]:
    """Return a line if tokens of a trained model's tokenizer have other ids in the data; the model would not know them.

    Args:
        model: its folder. A model without a tokenizer.json is taken to know the ids of the data.
    """
    known, ids = vocabulary(model), vocabulary(data.tokenizer_path)
    other = [token for token, number in known.items() if ids.get(token) != number]
    if not other:
        return []
    return [
        f"the data's tokenizer is another than the model's: {len(other):,} of the model's {len(known):,} tokens have "
        "another id in it or none, so the model has learnt other tokens under these ids; prepare the data with the "
        "model's tokenizer, unless that is meant"
    ]


def open_configured_model(
    config: RunConfig, *, eos_token_id: int | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build or open the model of the `model` section, untrained, on the current default device.

    Args:
        trust_remote_code: given by the caller, because the configuration in a run folder may be another person's.
    """
    model = config.model
    if model.preset is not None:
        return build_model(model.preset, model.overrides, seed=config.seed, eos_token_id=eos_token_id)
    assert model.path is not None  # checked by ModelSettings
    return open_model(
        model.path,
        from_scratch=model.from_scratch,
        overrides=model.overrides,
        seed=config.seed,
        eos_token_id=eos_token_id,
        trust_remote_code=trust_remote_code,
    )


def marked_as_sample(found: Evaluation, whole: int) -> Evaluation:
    """Return the measurement with the number of tokens there are, if it was of fewer than the `whole`."""
    return replace(found, whole_tokens=whole) if found.tokens < whole else found
