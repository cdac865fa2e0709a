"""How well a model answers an instruction set: its own answers beside the responses, and the loss of the responses.

Every prompt is answered greedily, as the template of the model's training writes it; the answers are scored against
the responses by `text_metrics`. Prompts of about one length are answered together, padded on the left, where no
token of an answer can come; which prompts share a batch changes an answer by rounding only. The loss is that of the
responses alone, ends included, as a fine-tuning run measures its held-out examples; a response that is part of the
prompt of a later one counts there, too, while only the last of a conversation is compared with an answer.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from relora.data.finetuning.examples import Example, HeldOutExamples
from relora.data.finetuning.instruct import InstructionForm, Prompt, encode, prompts
from relora.data.finetuning.records import Record, Records
from relora.data.finetuning.templates import TemplateName
from relora.errors import UserError
from relora.evaluation.output_folder import check_free, save_scores
from relora.evaluation.perplexity import check_counts, open_scored, scored_length
from relora.evaluation.text_metrics import TextScorer, TextScores
from relora.inference.decoding import end_ids, without_settings
from relora.measure import evaluate, evaluating
from relora.model.load import max_positions, quiet_transformers
from relora.report.progress import with_progress


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt."""

    text: str
    tokens: int
    """New ones, the end among them."""
    ended: bool
    """By the model, and not because no more tokens were allowed."""


@dataclass(frozen=True)
class Sample:
    """A prompt, the response to it, and what the model answered."""

    where: str
    """The record."""
    prompt: str
    """As the model sees it, special tokens spelt out."""
    reference: str
    answer: Answer
    scores: TextScores

    def line(self) -> dict[str, Any]:
        """As in samples.jsonl."""
        texts = {"where": self.where, "prompt": self.prompt, "reference": self.reference, "answer": self.answer.text}
        return {**texts, "answer_tokens": self.answer.tokens, "ended": self.answer.ended, **asdict(self.scores)}


@dataclass(frozen=True, kw_only=True)
class InstructionScores(TextScores):
    """What a model makes of an instruction set; texts in percent (see `TextScores`)."""

    loss: float
    """Nats per token of the responses."""
    perplexity: float
    response_tokens: int
    """That the loss is the mean of."""
    records: int
    """Answered: all with a response, up to the limit."""
    cut: int
    """Of them those that were too long for `sequence_length`, and lost a part for the loss."""
    without_room: int
    """Of them those whose prompt fills the model's positions, so that there is no answer."""
    ended: int
    """Answers that ended by themselves."""
    answer_tokens: int
    seconds: float
    """Of answering."""
    tokens_per_second: float
    max_new_tokens: int
    sequence_length: int
    template: str
    bleu_signature: str


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
    batch: int = 8,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> InstructionScores:
    """Answer every record of an instruction set and score the answers and the loss of the responses.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        source: a file, a folder or a hub dataset of records (see `data.finetuning.records` and `layouts`).
        adapter: a folder or run whose adapter is used, beside the model that it belongs to.
        template: alpaca, chat, plain or auto; by default that of the run which trained the model.
        prompt_column: with `response_column`, where the texts are, if in columns of no known name.
        limit: at most so many records, from the start.
        sequence_length: tokens of an example for the loss; by default those of the run, else the model's positions.
        batch: prompts, and examples, per forward pass.
        out: a new folder for scores.json and samples.jsonl; unless given, nothing is kept.

    Raises:
        UserError: no such model, adapter or data, ones that do not fit each other, the extra `eval` is absent, or
            `out` holds something. Nothing was written.
    """
    scorer = TextScorer()
    check_counts(limit=limit, max_new_tokens=max_new_tokens, sequence_length=sequence_length, batch=batch)
    if template not in (None, "auto", *get_args(TemplateName)):
        raise UserError(f"template: `{template}` is none of auto, {', '.join(get_args(TemplateName))}")
    if out is not None:
        check_free(Path(out))
    records = list(islice(Records([source]), limit))
    finished = open_scored(model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    trained_with = finished.adapters.template(finished.adapters.in_use) or finished.template
    form = InstructionForm(
        template=template or trained_with or "auto",  # type: ignore[arg-type]  # one of its names
        prompt_column=prompt_column,
        response_column=response_column,
    )
    scores, samples = score_records(
        finished.model,
        finished.tokenizer,
        records,
        form,
        sequence_length=scored_length(finished, sequence_length),
        max_new_tokens=max_new_tokens,
        batch=batch,
        scorer=scorer,
        label=source,
    )
    if out is not None:
        settings = {"model": str(model_or_run), "adapter": adapter, "instructions": source}
        save_scores(Path(out), {**settings, **asdict(scores)}, [sample.line() for sample in samples])
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
    """The scores of a model that is there, in whatever mode, and a sample for every record with a response.

    `label`: of a progress bar; none is shown unless given. See `evaluate_instructions`.
    """
    examples = encode(records, tokenizer, form, sequence_length=sequence_length)
    asked = list(prompts(records, tokenizer, form))
    _check_ids(model, asked, examples.examples)
    by_length = sorted(examples.examples, key=lambda example: example.positions)
    held_out = HeldOutExamples(by_length, micro_sequences=batch, pad_id=0, tokens=sys.maxsize)
    measured = evaluate(model, held_out if label is None else with_progress(held_out, len(held_out), label))
    begin = time.perf_counter()
    answers = answer(
        model,
        tokenizer,
        [each.input_ids for each in asked],
        max_new_tokens=max_new_tokens,
        batch=batch,
        ends=_ends_of_responses(examples.examples, tokenizer),
        label=label,
    )
    seconds = time.perf_counter() - begin
    texts, each_text = scorer.score([one.text for one in answers], [each.response for each in asked])
    samples = [
        Sample(each.where, tokenizer.decode(each.input_ids), each.response, one, scores)
        for each, one, scores in zip(asked, answers, each_text, strict=True)
    ]
    answer_tokens = sum(one.tokens for one in answers)
    scores = InstructionScores(
        **asdict(texts),
        loss=measured.loss,
        perplexity=measured.perplexity,
        response_tokens=measured.tokens,
        records=len(samples),
        cut=examples.counts.prompt_cut + examples.counts.response_cut,
        without_room=sum(not one.tokens for one in answers),
        ended=sum(one.ended for one in answers),
        answer_tokens=answer_tokens,
        seconds=seconds,
        tokens_per_second=answer_tokens / seconds,
        max_new_tokens=max_new_tokens,
        sequence_length=sequence_length,
        template=examples.template,
        bleu_signature=scorer.bleu_signature,
    )
    return scores, samples


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int,
    ends: Iterable[int] = (),
    label: str | None = None,
) -> list[Answer]:
    """Greedy answers to prompts, in their order; the model's mode and its settings for generation stay.

    Where a model's positions have no room for `max_new_tokens` after a prompt, its answer is shorter.
    `ends`: ids that end an answer, beside the EOS of the model and of the tokenizer.
    """
    positions = max_positions(model) or sys.maxsize
    start: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    asked = [list(ids) or [start] for ids in asked]
    answers = [Answer("", 0, False)] * len(asked)
    jobs: list[tuple[int, list[int]]] = []
    longest_first = sorted(range(len(asked)), key=lambda number: -len(asked[number]))
    for room, same in groupby(longest_first, lambda number: min(max_new_tokens, positions - len(asked[number]))):
        numbers = list(same)
        if room > 0:
            jobs += [(room, numbers[first : first + batch]) for first in range(0, len(numbers), batch)]
    stops = end_ids(model, tokenizer, ends)
    with evaluating(model), quiet_transformers(), without_settings(model):
        for room, numbers in jobs if label is None else with_progress(jobs, len(jobs), label):
            for number, ids in zip(numbers, _written(model, [asked[n] for n in numbers], room, stops), strict=True):
                length = next((at for at, token in enumerate(ids) if token in stops), len(ids))
                text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[number] = Answer(text.strip(), min(length + 1, len(ids)), length < len(ids))
    return answers


def _written(model: PreTrainedModel, asked: Sequence[Sequence[int]], most: int, ends: list[int]) -> list[list[int]]:
    """The new ids after each prompt; what ended before the others is filled up with an end."""
    lengths = torch.tensor([len(ids) for ids in asked])
    longest = int(lengths.max())
    input_ids = torch.full((len(asked), longest), ends[0])
    for row, ids in enumerate(asked):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
    seen = torch.arange(longest) >= longest - lengths.unsqueeze(1)  # [prompts, longest]
    whole: Tensor = model.generate(
        input_ids.to(model.device),
        attention_mask=seen.long().to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
        ),
    )
    new: list[list[int]] = whole[:, longest:].tolist()
    return new


def _ends_of_responses(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The control tokens with which a template ends a response: a model trained on it stops there."""
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return control & {int(example.input_ids[-1]) for example in examples}


def _check_ids(model: PreTrainedModel, asked: Sequence[Prompt], examples: Sequence[Example]) -> None:
    rows = model.get_input_embeddings().num_embeddings
    largest = max([max(one.input_ids, default=0) for one in asked] + [int(one.input_ids.max()) for one in examples])
    if largest >= rows:
        raise UserError(f"the tokenizer gives id {largest} but the model has {rows} ids; they do not belong together")
