"""The verbs that train, and the one that prepares their data: prepare, pretrain, finetune, compare."""

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relora.cli.options import (
    Fresh,
    Json,
    Overrides,
    Quiet,
    Strict,
    Until,
    launched,
    parse_share,
    print_found,
    print_json,
    processes_to_lead,
    settled,
    unescape,
)
from relora.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: relora prepare books/ --out prepared/books --train-tokenizer 8192 --validation 1%")
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or a hub dataset id (id or id:config).")],
    out: Annotated[Path, typer.Option(help="Folder to write; gets train/ and validation/.")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id.")] = None,
    train_tokenizer: Annotated[int | None, typer.Option(help="Train a byte-level BPE of this many ids.")] = None,
    validation: Annotated[str, typer.Option(help="Share of the documents held out, e.g. 1% or 0.01.")] = "1%",
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    document_separator: Annotated[
        str | None,
        typer.Option(
            help=r"Text between documents of .txt and .md files; by default lines <|endoftext|>, EOS; \n is a line end."
        ),
    ] = None,
    take: Annotated[int | None, typer.Option(help="At most this many documents of each source.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that tokenize; by default one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Keys the choice of held-out documents.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken records instead of refusing.")] = False,
    as_json: Json = False,
) -> None:
    """Turn raw text into token files: a train and a validation folder, each with all that training needs."""
    if processes_to_lead() is None:
        return
    from relora.data.pretraining.prepare import prepare as run_prepare
    from relora.data.pretraining.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        prepared = run_prepare(
            sources,
            out,
            tokenizer=tokenizer,
            train_tokenizer=train_tokenizer,
            validation=parse_share(validation),
            text_field=text_field,
            document_separator=None if document_separator is None else unescape(document_separator),
            take=take,
            workers=workers,
            seed=seed,
            skip_bad=skip_bad,
            progress=progress,
        )
    print_found(prepared, as_json, print)


@app.command(epilog="Example: relora pretrain configs/quickstart.yaml optimizer.lr=2e-3")
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run; build nothing.")] = False,
    fresh: Fresh = False,
    strict: Strict = False,
    until: Until = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pretrain by a configuration; on a run folder that holds a checkpoint, continue."""
    from relora.config import load_config

    _ignore_checkpoint_requests()
    if dry_run:
        settings = load_config(config, overrides or [])
        from relora.cli.tables.timetable import print_timetable
        from relora.planning.timetable import timetable_of

        timetable = timetable_of(settings)
        print_found(timetable, as_json, print_timetable)
        return
    with launched() as prints:
        settings = settled(load_config(config, overrides or []))
        from relora.recipes.pretrain import pretrain as run_pretrain

        result = run_pretrain(settings, fresh=fresh, strict=strict, quiet=quiet or as_json, until=until)
    if as_json and prints:
        print_json(asdict(result))


@app.command(epilog="Example: relora finetune configs/finetune/lora.yaml model.path=runs/quickstart/model")
def finetune(
    config: Annotated[Path, typer.Argument(help="YAML configuration with a `task`.")],
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(help="Print so many examples as the model sees them, and what is scored.")] = 0,
    fresh: Fresh = False,
    strict: Strict = False,
    until: Until = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model (LoRA, ReLoRA, LLaMA-Adapter, full) on instructions or classes; continues as pretrain does."""
    from relora.config import load_finetune_config

    _ignore_checkpoint_requests()
    if show:
        settings = load_finetune_config(config, overrides or [])
        from relora.planning.examples import show_examples

        print(show_examples(settings, show))
        return
    with launched() as prints:
        settings = settled(load_finetune_config(config, overrides or []))
        from relora.recipes.finetune import finetune as run_finetune

        result = run_finetune(settings, fresh=fresh, strict=strict, quiet=quiet or as_json, until=until)
    if as_json and prints:
        print_json(asdict(result))


@app.command(epilog="Example: relora compare configs/small/methods.yaml --methods full,lora-warm,relora --tune-lr")
def compare(
    config: Annotated[Path, typer.Argument(help="YAML configuration; one with a `task` compares fine-tuning.")],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="full,lora-warm,relora,...; fine-tuning: full,lora,relora,llama-adapter.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="NAME:key=value,key=value: relora with settings of its own.")
    ] = None,
    lr: Annotated[list[str] | None, typer.Option(help="METHOD=RATE,RATE: what its rate is chosen from.")] = None,
    tune_lr: Annotated[
        bool, typer.Option("--tune-lr", help="Search each method's rate by successive halving.")
    ] = False,
    rates: Annotated[str | None, typer.Option(help="With --tune-lr: multiples of a method's own rate.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every method.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; they share the cores.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Where the runs lie; comparisons can share them.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs' checkpoints, models and reports.")] = False,
    answers: Annotated[int | None, typer.Option(help="Fine-tuning: held-out records to answer and score.")] = None,
    as_json: Json = False,
) -> None:
    """Methods on the same model and data, each with its best rate: held-out loss, time, memory, as table and page."""
    from relora.config import FinetuneConfig, load_any_config

    processes = processes_to_lead()
    if processes is None:
        return
    settings = load_any_config(config, overrides or [])
    if isinstance(settings, FinetuneConfig):
        names = ("--method", "--tune-lr", "--rates", "--seeds", "--jobs", "--runs", "--keep")
        values = (method, tune_lr, rates, seeds, jobs, runs, keep)
        if given := [name for name, value in zip(names, values, strict=True) if value]:
            raise UserError(f"{given[0]}: compares pretraining, but {config} has a `task`; leave it out")
        from relora.cli.tables.comparison import print_comparison
        from relora.experiments.compare_finetuning import candidates_of, compare_finetuning
        from relora.experiments.tables import FINETUNING_COLUMNS, finetuning_rows

        candidates = candidates_of(methods or "full,lora,llama-adapter", lr or [])
        outcomes = compare_finetuning(settings, candidates, answers=50 if answers is None else answers)
        print_found(outcomes, as_json, lambda found: print_comparison(FINETUNING_COLUMNS, finetuning_rows(found)))
    else:
        if answers is not None:
            raise UserError(f"--answers: compares fine-tuning, but {config} has no `task`; leave it out")
        from relora.cli.tables.comparison import print_comparison
        from relora.experiments.compare_pretraining import budget_of, compare_pretraining
        from relora.experiments.methods import methods_of
        from relora.experiments.results import as_figures
        from relora.experiments.tables import PRETRAINING_COLUMNS, pretraining_rows

        if jobs is None and processes > 1:
            jobs = processes
        budget = budget_of(
            lr or [],
            tune=tune_lr,
            multiples=rates,
            seeds=seeds,
            jobs=jobs,
            keep=keep,
            runs=runs,
        )
        chosen = methods_of(methods or "full,lora-warm,relora", method or [], config, overrides or [])
        comparison = compare_pretraining(config, overrides or [], chosen, budget, partial(typer.echo, err=True))
        print_found(
            comparison,
            as_json,
            lambda found: print_comparison(PRETRAINING_COLUMNS, pretraining_rows(found)),
            as_figures,
        )
    if not as_json:
        print(f"{settings.output_dir}/comparison.html")


def _ignore_checkpoint_requests() -> None:
    """Ignore SIGUSR1, by which a user asks a run for a checkpoint, until the training loop handles it.

    The signal's default action would end a run that has not begun, or that has trained its last step.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
