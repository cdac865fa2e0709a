"""The tables of scores show every figure, a dash for one that does not exist, and what was left out."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from relora.cli.tables.scores import print_instruction_scores, print_scores, print_task_scores
from relora.evaluation.instructions import InstructionScores
from relora.evaluation.lm_eval import TaskScore
from relora.evaluation.perplexity import Score

ANSWERED = InstructionScores(
    bleu=1.25,
    rouge1=21.5,
    rouge2=32.25,
    rougeL=43.75,
    exact_match=54.5,
    f1=65.25,
    loss=2.0,
    perplexity=math.exp(2.0),
    response_tokens=1234,
    records=20,
    cut=0,
    without_room=0,
    ended=15,
    answer_tokens=300,
    seconds=2.5,
    tokens_per_second=120.0,
    max_new_tokens=16,
    sequence_length=30,
    template="plain",
    bleu_signature="",
)


def printed(show: Callable[[Any, Console], None], scores: object) -> Sequence[str]:
    """Print scores on a wide console and return the lines, with single spaces."""
    stream = io.StringIO()
    show(scores, Console(file=stream, width=250))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_each_source_is_a_row() -> None:
    text = Score(1.0, math.e, 0.75, 5000, "text.txt", 20, 12.5, 32, 16)
    prepared = Score(2.0, math.exp(2), None, 5, "folder", 20, None, 8, 8)
    assert printed(print_scores, [text, prepared]) == [
        "data loss perplexity bits/byte word ppl. tokens window/stride",
        "text.txt 1.0000 2.72 0.7500 12.50 5,000 32/16",
        "folder 2.0000 7.39 - - 5 8/8",
    ]


def test_instruction_scores_are_a_table_and_two_lines() -> None:
    assert printed(print_instruction_scores, ANSWERED) == [
        "loss perplexity BLEU ROUGE-1 ROUGE-2 ROUGE-L exact % F1",
        "2.0000 7.39 1.25 21.50 32.25 43.75 54.50 65.25",
        "20 records, template plain; loss over 1,234 tokens of responses",
        "15 answers ended by themselves, others at 16 tokens; 300 tokens in 2.5 s, 120.0 tokens/s",
    ]


def test_records_that_are_cut_or_leave_no_room_are_shown() -> None:
    lines = printed(print_instruction_scores, replace(ANSWERED, cut=2, without_room=3))
    assert lines[2].endswith("tokens of responses, 2 cut to 30")
    assert "others at 16 tokens, 3 prompts left no room for one;" in lines[3]


def test_each_figure_of_a_task_is_a_row_and_the_task_is_named_once() -> None:
    scores = [
        TaskScore("colours", "acc", 2 / 3, 0.125, True, 3, 0),
        TaskScore("colours", "acc_norm", 0.25, 0.125, True, 3, 0),
        TaskScore("all", "acc", 0.5, None, None, None, None),
    ]
    assert printed(print_task_scores, scores) == [
        "task metric value +- examples shots",
        "colours acc 0.6667 0.1250 3 0",
        "acc_norm 0.2500 0.1250 3 0",
        "all acc 0.5000 - - -",
    ]
