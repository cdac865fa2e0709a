"""Score a model on an instruction set: its own answers compared with the responses, and the loss of the responses.

Every prompt is written with the template of the model's training and answered greedily; `text_metrics` compares the
answers with the responses. Prompts of similar length are answered in one batch, padded on the left, because the answer
follows on the right; which prompts share a batch changes an answer only through rounding.

The loss is that of the responses alone, end tokens included, as a fine-tuning run measures it on its held-out examples.
In a conversation of several turns every response counts for the loss, but only the last one is compared with an answer.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from relora.data.finetuning.examples import Example, HeldOutExamples
from relora.data.finetuning.instruct import InstructionForm, Prompt, encode, prompts
from relora.data.finetuning.records import Record, Records
from relora.data.finetuning.templates import TemplateName
from relora.errors import UserError
from relora.evaluation.output_folder import check_free, save_scores
from relora.evaluation.scored_model import BATCH, check_counts, check_loss, open_scored_model, scored_length
from relora.evaluation.text_metrics import TextScorer, TextScores
from relora.inference.decoding import end_token_ids, generate_ids, without_generation_settings
from relora.inference.generation_settings import check_generation_settings
from relora.measure import evaluate, evaluating
from relora.model.load import max_positions, quiet_transformers
from relora.report.progress import with_progress


@dataclass(frozen=True)
class Answer:
    """The text that a model generated after one prompt."""

    text: str
    tokens: int
    """Number of generated tokens, including the end token."""
    ended: bool
    """Whether the model ended the answer itself; False if it reached the largest number of tokens."""


@dataclass(frozen=True)
class Sample:
    """A prompt, its response and the model's answer."""

    where: str
    """The place of the record in the data, for example file and line."""
    prompt: str
    """The prompt as the model is given it, with its special tokens."""
    reference: str
    """The response of the record."""
    answer: Answer
    scores: TextScores
    """Scores of this answer alone."""

    def to_json(self) -> dict[str, Any]:
        """Return the sample as an object of samples.jsonl."""
        texts = {"where": self.where, "prompt": self.prompt, "reference": self.reference, "answer": self.answer.text}
        return {**texts, "answer_tokens": self.answer.tokens, "ended": self.answer.ended, **asdict(self.scores)}


@dataclass(frozen=True, kw_only=True)
class InstructionScores(TextScores):
    """Scores of a model on an instruction set; those of the answers are percentages (see `TextScores`)."""

    loss: float
    """Mean over the tokens of the responses, in nats."""
    perplexity: float
    response_tokens: int
    """Number of tokens that the loss is the mean of."""
    records: int
    """Answered records: all that have a response, up to the limit."""
    cut: int
    """Answered records that exceed `sequence_length` and were shortened for the loss."""
    without_room: int
    """Answered records whose prompt fills the model's positions, so that their answer is empty."""
    ended: int
    """Answers that the model ended itself."""
    answer_tokens: int
    """Generated tokens of all answers together."""
    seconds: float
    """Time of generating the answers."""
    tokens_per_second: float
    max_new_tokens: int
    sequence_length: int
    template: str
    bleu_signature: str
    notes: list[str] = field(default_factory=list)
    """Lines about what of the records is left out, not used, or was changed."""


def evaluate_instructions(
    model_or_run: str | Path,
    source: str,
    *,
    adapter: str | None = None,
    template: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    sequence_length: int | None = None,
    batch: int = BATCH,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> InstructionScores:
    """Answer every record of an instruction set; score the answers and the loss of the responses.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        source: a file, a folder or a hub dataset of records (see `data.finetuning.records` and `layouts`).
        adapter: a folder or run whose adapter is used with the model.
        template: alpaca, chat, plain or auto; by default that of the run which trained the model.
        prompt_column: column of the prompts; needed together with `response_column` if the columns have no known names.
        response_column: column of the responses.
        limit: use at most so many records, from the start.
        max_new_tokens: longest answer, in tokens.
        sequence_length: most positions of an example for the loss, one less than its tokens; by default that of the
            run, else the model's positions.
        batch: prompts, or examples, per forward pass.
        out: a new folder for scores.json and samples.jsonl; by default nothing is written.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the model, the adapter or the data do not exist or do not fit each other, the extra `eval` is not
            installed, or `out` exists. Nothing was written.
    """
    scorer = TextScorer()
    check_counts(limit=limit, max_new_tokens=max_new_tokens, sequence_length=sequence_length, batch=batch)
    if template not in (None, "auto", *get_args(TemplateName)):
        raise UserError(f"template: `{template}` is none of auto, {', '.join(get_args(TemplateName))}")
    if out is not None:
        check_free(Path(out))
    reader = Records([source])
    records = list(islice(reader, limit))
    loaded = open_scored_model(model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    check_generation_settings(loaded)
    trained_with = loaded.adapters.template(loaded.adapters.in_use) or loaded.template
    form = InstructionForm(
        template=template or trained_with or "auto",  # type: ignore[arg-type]  # one of its names
        prompt_column=prompt_column,
        response_column=response_column,
    )
    scores, samples = score_records(
        loaded.model,
        loaded.tokenizer_of(loaded.adapters.in_use),
        records,
        form,
        sequence_length=scored_length(loaded, sequence_length),
        max_new_tokens=max_new_tokens,
        batch=batch,
        scorer=scorer,
        label=source,
    )
    scores.notes[:0] = reader.notes()
    if out is not None:
        settings = {"model": str(model_or_run), "adapter": adapter, "instructions": source}
        save_scores(Path(out), {**settings, **asdict(scores)}, [sample.to_json() for sample in samples])
    return scores


def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    form: InstructionForm,
    *,
    sequence_length: int,
    max_new_tokens: int,
    batch: int,
    scorer: TextScorer,
    label: str | None = None,
) -> tuple[InstructionScores, list[Sample]]:
    """Score a model that is already open; its mode stays as it is. See `evaluate_instructions`.

    Args:
        form: layout and template of the records.
        label: name of the progress bar; None shows no bar.

    Returns:
        The scores of all records together, and a sample for every record that has a response, in order.
    """
    # A sequence of n positions takes an example of n + 1 tokens, as in training.
    examples = encode(records, tokenizer, form, sequence_length=sequence_length + 1)
    asked = list(prompts(records, tokenizer, form))
    _check_ids(model, asked, examples.examples)
    held_out = HeldOutExamples(examples.examples, micro_sequences=batch, pad_id=0)
    measured = evaluate(model, held_out if label is None else with_progress(held_out, len(held_out), label))
    check_loss(measured.loss, model, label or "the records")
    begin = time.perf_counter()
    answers = answer_greedily(
        model,
        tokenizer,
        [prompt.input_ids for prompt in asked],
        max_new_tokens=max_new_tokens,
        batch=batch,
        ends=_ends_of_responses(examples.examples, tokenizer),
        label=label,
    )
    seconds = time.perf_counter() - begin
    texts, scores_of_each = scorer.score([answer.text for answer in answers], [prompt.response for prompt in asked])
    samples = [
        Sample(prompt.where, tokenizer.decode(prompt.input_ids), prompt.response, answer, scores)
        for prompt, answer, scores in zip(asked, answers, scores_of_each, strict=True)
    ]
    answer_tokens, counts = sum(answer.tokens for answer in answers), examples.counts
    scores = InstructionScores(
        **asdict(texts),
        loss=measured.loss,
        perplexity=measured.perplexity,
        response_tokens=measured.tokens,
        records=len(samples),
        cut=counts.prompt_cut + counts.response_cut,
        without_room=sum(answer.tokens == 0 for answer in answers),
        ended=sum(answer.ended for answer in answers),
        answer_tokens=answer_tokens,
        seconds=seconds,
        tokens_per_second=answer_tokens / seconds,
        max_new_tokens=max_new_tokens,
        sequence_length=sequence_length,
        template=examples.template,
        bleu_signature=scorer.bleu_signature,
        notes=[*([str(counts)] if counts.used < counts.read else []), *examples.notes],
    )
    return scores, samples


def answer_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int,
    ends: Iterable[int] = (),
    label: str | None = None,
) -> list[Answer]:
    """Answer prompts with the likeliest token at every position.

    The model's mode and its generation settings are as before when this returns. If a prompt leaves less room than
    `max_new_tokens` in the model's positions, its answer is shorter; without any room it is empty.

    Args:
        prompt_ids: token ids of each prompt; an empty prompt is replaced by the start token.
        batch: prompts per forward pass.
        ends: ids that end an answer, in addition to the EOS of the model and of the tokenizer.
        label: name of the progress bar; None shows no bar.

    Returns:
        The answers in the order of the prompts.
    """
    start: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompt_ids = [list(ids) or [start] for ids in prompt_ids]
    batches = _batches_with_equal_room(model, [len(ids) for ids in prompt_ids], max_new_tokens, batch)
    stops = end_token_ids(model, tokenizer, ends)
    answers = [Answer("", 0, False)] * len(prompt_ids)
    with evaluating(model), quiet_transformers(), without_generation_settings(model):
        for room, numbers in batches if label is None else with_progress(batches, len(batches), label):
            generated = _generate_batch(model, [prompt_ids[number] for number in numbers], room, stops)
            for number, ids in zip(numbers, generated, strict=True):
                length = next((position for position, token in enumerate(ids) if token in stops), len(ids))
                text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[number] = Answer(text.strip(), min(length + 1, len(ids)), length < len(ids))
    return answers


def _batches_with_equal_room(
    model: PreTrainedModel, lengths: Sequence[int], max_new_tokens: int, batch: int
) -> list[tuple[int, list[int]]]:
    """Group prompts, the longest first, into batches whose prompts leave room for equally many tokens.

    Args:
        lengths: tokens of each prompt.

    Returns:
        For each batch the most tokens that can be generated and the numbers of its prompts. Prompts that leave no room
        are in no batch.
    """
    positions = max_positions(model) or sys.maxsize
    batches: list[tuple[int, list[int]]] = []
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for room, group in groupby(longest_first, lambda number: min(max_new_tokens, positions - lengths[number])):
        numbers = list(group)
        if room > 0:
            batches += [(room, numbers[first : first + batch]) for first in range(0, len(numbers), batch)]
    return batches


def _generate_batch(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, ends: list[int]
) -> list[list[int]]:
    """Return the generated ids after each prompt, all of one length: those that ended earlier are padded with an end.

    Args:
        ends: ids that end an answer; the first one serves as padding.
    """
    lengths = torch.tensor([len(ids) for ids in prompt_ids])
    longest = int(lengths.max())
    input_ids = torch.full((len(prompt_ids), longest), ends[0])
    for row, ids in enumerate(prompt_ids):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
    is_prompt = torch.arange(longest) >= longest - lengths.unsqueeze(1)  # [prompts, longest]
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    output = generate_ids(model, input_ids.to(model.device), is_prompt.long().to(model.device), settings)
    generated: list[list[int]] = output[:, longest:].tolist()
    return generated


def _ends_of_responses(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Collect the special tokens with which the template ends a response: a model trained with it stops at them."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special & {int(example.input_ids[-1]) for example in examples}


def _check_ids(model: PreTrainedModel, asked: Sequence[Prompt], examples: Sequence[Example]) -> None:
    """Raise `UserError` if a prompt or an example has an id without a row in the model's embedding."""
    rows = model.get_input_embeddings().num_embeddings
    largest_in_prompts = [max(prompt.input_ids, default=0) for prompt in asked]
    largest_in_examples = [int(example.input_ids.max()) for example in examples]
    largest = max(largest_in_prompts + largest_in_examples)
    if largest >= rows:
        raise UserError(f"the tokenizer gives id {largest} but the model has {rows} ids; they do not belong together")
