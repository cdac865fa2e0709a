"""Tables of `relora evaluate`: likelihood of text, answers to instructions, tasks of lm-evaluation-harness."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Column

from relora.cli.tables.layout import build_table, console_or_stdout
from relora.evaluation.instructions import InstructionScores
from relora.evaluation.lm_eval import TaskScore
from relora.evaluation.perplexity import Score


def print_scores(scores: Sequence[Score], console: Console | None = None) -> None:
    """Print loss, perplexity and bits per byte of texts, one row for each source."""
    figures = ("loss", "perplexity", "bits/byte", "word ppl.", "tokens", "window/stride")
    columns = [Column("data", overflow="fold"), *map(_figure_column, figures)]
    rows = [
        [
            score.data,
            f"{score.loss:.4f}",
            f"{score.perplexity:,.2f}",
            "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}",
            "-" if score.word_perplexity is None else f"{score.word_perplexity:,.2f}",
            f"{score.tokens:,}",
            f"{score.sequence_length}/{score.stride}",
        ]
        for score in scores
    ]
    console = console_or_stdout(console)
    console.print(build_table(columns, rows))
    for note in (note for score in scores for note in score.notes):
        console.out(note)


def print_instruction_scores(scores: InstructionScores, console: Console | None = None) -> None:
    """Print the scores of answers as a table of one row, and below it the data and the speed that they come from."""
    console = console_or_stdout(console)
    figures = {
        "loss": f"{scores.loss:.4f}",
        "perplexity": f"{scores.perplexity:,.2f}",
        "BLEU": f"{scores.bleu:.2f}",
        "ROUGE-1": f"{scores.rouge1:.2f}",
        "ROUGE-2": f"{scores.rouge2:.2f}",
        "ROUGE-L": f"{scores.rougeL:.2f}",
        "exact %": f"{scores.exact_match:.2f}",
        "F1": f"{scores.f1:.2f}",
    }
    console.print(build_table([_figure_column(name) for name in figures], [list(figures.values())]))
    without_room = f", {scores.without_room:,} prompts left no room for one" if scores.without_room else ""
    cut = f", {scores.cut:,} cut to {scores.sequence_length:,}" if scores.cut else ""
    console.out(
        f"{scores.records:,} records, template {scores.template}; "
        f"loss over {scores.response_tokens:,} tokens of responses{cut}\n"
        f"{scores.ended:,} answers ended by themselves, others at {scores.max_new_tokens:,} tokens{without_room}; "
        f"{scores.answer_tokens:,} tokens in {scores.seconds:.1f} s, {scores.tokens_per_second:,.1f} tokens/s"
    )
    for note in scores.notes:
        console.out(note)


def print_task_scores(scores: Sequence[TaskScore], console: Console | None = None) -> None:
    """Print the scores of tasks, one row for each metric of a task; a task is named in its first row only."""
    texts = [Column(name, overflow="fold") for name in ("task", "metric")]
    figures = [_figure_column(name) for name in ("value", "+-", "examples", "shots")]
    console_or_stdout(console).print(build_table([*texts, *figures], _task_rows(scores)))


def _task_rows(scores: Sequence[TaskScore]) -> Iterator[list[str]]:
    task_before = None
    for score in scores:
        yield [
            "" if score.task == task_before else score.task,
            score.metric,
            f"{score.value:.4f}",
            "-" if score.stderr is None else f"{score.stderr:.4f}",
            "-" if score.examples is None else f"{score.examples:,}",
            "-" if score.shots is None else str(score.shots),
        ]
        task_before = score.task


def _figure_column(name: str) -> Column:
    """Make a column of numbers, which are never broken over two lines."""
    return Column(name, justify="right", no_wrap=True)
