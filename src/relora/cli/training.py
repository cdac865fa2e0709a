"""The verbs that lead to a trained model."""

import json
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relora.cli.options import Fresh, Json, Overrides, Quiet, Strict, configuration, one_process, print_json, share
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
    take: Annotated[int | None, typer.Option(help="At most this many documents of each source.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that tokenize; by default one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Keys the choice of held-out documents.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken records instead of refusing.")] = False,
    as_json: Json = False,
) -> None:
    """Turn raw text into token files: a train and a validation folder, each with all that training needs."""
    from relora.data.pretraining.prepare import prepare as run_prepare
    from relora.data.pretraining.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        report = run_prepare(
            sources,
            out,
            tokenizer=tokenizer,
            train_tokenizer=train_tokenizer,
            validation=share(validation),
            text_field=text_field,
            take=take,
            workers=workers,
            seed=seed,
            skip_bad=skip_bad,
            progress=progress,
        )
    print_json(asdict(report)) if as_json else print(report)


@app.command(epilog="Example: relora pretrain configs/quickstart.yaml optimizer.lr=2e-3")
def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run; build nothing.")] = False,
    fresh: Fresh = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pretrain by a configuration; on a run folder that holds a checkpoint, continue."""
    # what asks a run for a checkpoint must not end one that has not begun, or has trained its last step
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    settings = configuration(config, overrides)
    if dry_run:
        from relora.cli.tables.dry_run import print_timetable
        from relora.planning.dry_run import describe

        plan = describe(settings)
        print_json(asdict(plan)) if as_json else print_timetable(plan)
        return
    from relora.recipes.pretrain import pretrain as run_pretrain

    result = run_pretrain(settings, fresh=fresh, strict=strict, quiet=quiet or as_json)
    if as_json:
        print_json(asdict(result))


@app.command(epilog="Example: relora finetune configs/finetune/lora.yaml model.path=runs/quickstart/model")
def finetune(
    config: Annotated[Path, typer.Argument(help="YAML configuration with a `task`.")],
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(help="Print so many examples as the model sees them, and what is scored.")] = 0,
    fresh: Fresh = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model (LoRA, ReLoRA, LLaMA-Adapter, full) on instructions or classes; continues as pretrain does."""
    from relora.config import load_finetune_config

    one_process()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as in pretrain
    settings = load_finetune_config(config, overrides or [])
    from relora.recipes.finetune import finetune as run_finetune
    from relora.recipes.finetune import show_examples

    if show:
        print(show_examples(settings, show))
        return
    result = run_finetune(settings, fresh=fresh, strict=strict, quiet=quiet or as_json)
    if as_json:
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

    one_process()
    settings = load_any_config(config, overrides or [])
    if isinstance(settings, FinetuneConfig):
        names = ("--method", "--tune-lr", "--rates", "--seeds", "--jobs", "--runs", "--keep")
        values = (method, tune_lr, rates, seeds, jobs, runs, keep)
        if given := [name for name, value in zip(names, values, strict=True) if value]:
            raise UserError(f"{given[0]}: compares pretraining, but {config} has a `task`; leave it out")
        from relora.cli.tables.comparison import print_comparison
        from relora.experiments.compare_finetuning import FINETUNING_COLUMNS, candidates_of, finetuning_rows
        from relora.experiments.compare_finetuning import compare as run_compare

        candidates = candidates_of(methods or "full,lora,llama-adapter", lr or [])
        outcomes = run_compare(settings, candidates, answers=50 if answers is None else answers)
        print_json([asdict(outcome) for outcome in outcomes]) if as_json else print_comparison(
            FINETUNING_COLUMNS, finetuning_rows(outcomes)
        )
    else:
        if answers is not None:
            raise UserError(f"--answers: compares fine-tuning, but {config} has no `task`; leave it out")
        from relora.cli.tables.comparison import print_comparison
        from relora.experiments.compare_pretraining import budget_of, compare_pretraining
        from relora.experiments.methods import methods_of
        from relora.experiments.results import as_figures
        from relora.experiments.tables import PRETRAINING_COLUMNS, pretraining_rows, write_tables

        budget = budget_of(lr or [], tune=tune_lr, multiples=rates, seeds=seeds, jobs=jobs, keep=keep, runs=runs)
        chosen = methods_of(methods or "full,lora-warm,relora", method or [], config, overrides or [])
        comparison = compare_pretraining(config, overrides or [], chosen, budget, partial(typer.echo, err=True))
        write_tables(comparison)
        print_json(as_figures(comparison)) if as_json else print_comparison(
            PRETRAINING_COLUMNS, pretraining_rows(comparison)
        )
    if not as_json:
        print(f"{settings.output_dir}/comparison.html")


@app.command(epilog="Example: relora plan configs/quickstart.yaml --fit 6GiB --out fits.yaml")
def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    fit: Annotated[str | None, typer.Option(help="Find the fastest configuration within so much, e.g. 6GiB.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --fit: file to write it to.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Take real steps of each phase; use what they took.")] = False,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also for other methods, bases and kinds of checkpointing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory by kind and time by phase, before anything is built."""
    from relora.cli.tables.plan import print_plan
    from relora.config import to_yaml
    from relora.planning.plan import as_figures, fitting, make_plan, size_in_bytes, write_config

    settings = configuration(config, overrides)
    if out is not None and fit is None:
        raise UserError("--out: writes what --fit finds; give --fit SIZE")
    if out is not None and out.exists():
        raise UserError(f"{out}: is there already and was left as it is; give another --out")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or give another --out")
    if fit is not None:
        settings = fitting(settings, size_in_bytes(fit))
    found = make_plan(settings, probed=probe, alternatives=alternatives)
    if out is not None:
        write_config(settings, out)
    if as_json:
        print_json({**as_figures(found), **({"config": settings.model_dump(mode="json")} if fit else {})})
        return
    if fit is not None and out is None:
        print(to_yaml(settings), end="")
    print_plan(found)


@app.command("config", epilog="Example: relora config configs/quickstart.yaml batch.sequences=32")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of all keys instead.")] = False,
) -> None:
    """Check a configuration and print it with every default filled in."""
    from relora.config import RunConfig, load_any_config, to_yaml

    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=1))
        return
    if config is None:
        raise UserError("give a configuration file, or --schema")
    print(to_yaml(load_any_config(config, overrides or [])), end="")
