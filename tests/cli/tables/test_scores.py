"""The tables of `relora evaluate`."""

from dataclasses import replace

from tests.cli.tables.screen import Screen

from relora.cli.tables.scores import print_instruction_scores, print_scores, print_task_scores
from relora.evaluation.instructions import InstructionScores
from relora.evaluation.lm_eval import TaskScore
from relora.evaluation.perplexity import Score

ANSWERED = InstructionScores(
    bleu=12.345,
    rouge1=40.0,
    rouge2=20.0,
    rougeL=30.0,
    exact_match=5.0,
    f1=50.0,
    loss=1.25,
    perplexity=3.49,
    response_tokens=1234,
    records=20,
    cut=3,
    without_room=2,
    ended=15,
    answer_tokens=640,
    seconds=2.0,
    tokens_per_second=320.0,
    max_new_tokens=64,
    sequence_length=512,
    template="alpaca",
    bleu_signature="",
)


def test_what_is_not_known_of_a_text_is_a_dash() -> None:
    screen = Screen()
    raw = Score(1.5, 4.4817, 1.1, 1000, "book.txt", 4000, 20.5, 128, 64)
    print_scores([raw, replace(raw, data="prepared", word_perplexity=None, bits_per_byte=None)], screen)
    header, *rows = (line.split() for line in screen.text.splitlines())
    assert header[0] == "data" and header[-1] == "window/stride"
    assert rows == [
        ["book.txt", "1.5000", "4.48", "1.1000", "20.50", "1,000", "128/64"],
        ["prepared", "1.5000", "4.48", "-", "-", "1,000", "128/64"],
    ]


def test_what_was_not_read_of_a_source_stands_below_the_scores() -> None:
    screen = Screen()
    print_scores(
        [Score(1.5, 4.4817, 1.1, 1000, "texts", 4000, 20.5, 128, 64, notes=("texts: not read: 1 .png",))], screen
    )
    assert screen.text.splitlines()[-1] == "texts: not read: 1 .png"


def test_answers_to_instructions() -> None:
    screen = Screen()
    print_instruction_scores(replace(ANSWERED, notes=["not used: column `id` (20 records)"]), screen)
    assert screen.text.splitlines()[1].split() == [
        "1.2500",
        "3.49",
        "12.35",
        "40.00",
        "20.00",
        "30.00",
        "5.00",
        "50.00",
    ]
    assert screen.text.splitlines()[2:] == [
        "20 records, template alpaca; loss over 1,234 tokens of responses, 3 cut to 512",
        "15 answers ended by themselves, others at 64 tokens, 2 prompts left no room for one; "
        "640 tokens in 2.0 s, 320.0 tokens/s",
        "not used: column `id` (20 records)",
    ]


def test_nothing_is_said_of_what_did_not_happen() -> None:
    screen = Screen()
    print_instruction_scores(replace(ANSWERED, cut=0, without_room=0), screen)
    assert "cut" not in screen.text and "no room" not in screen.text


def test_a_task_is_named_once() -> None:
    screen = Screen()
    accuracy = TaskScore("arc", "acc", 0.5, 0.01, True, 1000, 0)
    group = TaskScore("all", "acc", 0.25, None, None, None, None)
    print_task_scores([accuracy, replace(accuracy, metric="acc_norm"), group], screen)
    assert [line.split() for line in screen.text.splitlines()[1:]] == [
        ["arc", "acc", "0.5000", "0.0100", "1,000", "0"],
        ["acc_norm", "0.5000", "0.0100", "1,000", "0"],
        ["all", "acc", "0.2500", "-", "-", "-"],
    ]
