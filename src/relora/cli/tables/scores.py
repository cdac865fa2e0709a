"""Scores of a model as tables: likelihood of text, answers to instructions, tasks."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from relora.evaluation.instructions import InstructionScores
from relora.evaluation.lm_eval import TaskScore
from relora.evaluation.perplexity import Score


def print_scores(scores: Sequence[Score], console: Console | None = None) -> None:
    """The scores as a table, one source a row."""
    table = Table(box=None, pad_edge=False)
    table.add_column("data", overflow="fold")
    for column in ("loss", "perplexity", "bits/byte", "word ppl.", "tokens", "window/stride"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            score.data,
            f"{score.loss:.4f}",
            f"{score.perplexity:,.2f}",
            "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}",
            "-" if score.word_perplexity is None else f"{score.word_perplexity:,.2f}",
            f"{score.tokens:,}",
            f"{score.sequence_length}/{score.stride}",
        )
    (console or Console(highlight=False)).print(table)


def print_instruction_scores(scores: InstructionScores, console: Console | None = None) -> None:
    """The scores as a table, and what stands behind them in a line each."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    row = []
    for column, figure in (
        ("loss", f"{scores.loss:.4f}"),
        ("perplexity", f"{scores.perplexity:,.2f}"),
        ("BLEU", f"{scores.bleu:.2f}"),
        ("ROUGE-1", f"{scores.rouge1:.2f}"),
        ("ROUGE-2", f"{scores.rouge2:.2f}"),
        ("ROUGE-L", f"{scores.rougeL:.2f}"),
        ("exact %", f"{scores.exact_match:.2f}"),
        ("F1", f"{scores.f1:.2f}"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
        row.append(figure)
    table.add_row(*row)
    console.print(table)
    without_room = f", {scores.without_room:,} prompts left no room for one" if scores.without_room else ""
    cut = f", {scores.cut:,} cut to {scores.sequence_length:,}" if scores.cut else ""
    console.print(
        f"{scores.records:,} records, template {scores.template}; "
        f"loss over {scores.response_tokens:,} tokens of responses{cut}\n"
        f"{scores.ended:,} answers ended by themselves, others at {scores.max_new_tokens:,} tokens{without_room}; "
        f"{scores.answer_tokens:,} tokens in {scores.seconds:.1f} s, {scores.tokens_per_second:,.1f} tokens/s",
        soft_wrap=True,
    )


def print_task_scores(scores: Sequence[TaskScore], console: Console | None = None) -> None:
    """The scores as a table, one figure a row."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for column in ("value", "+-", "examples", "shots"):
        table.add_column(column, justify="right", no_wrap=True)
    before = None
    for score in scores:
        table.add_row(
            "" if score.task == before else score.task,
            score.metric,
            f"{score.value:.4f}",
            "-" if score.stderr is None else f"{score.stderr:.4f}",
            "-" if score.examples is None else f"{score.examples:,}",
            "-" if score.shots is None else str(score.shots),
        )
        before = score.task
    (console or Console(highlight=False)).print(table)
