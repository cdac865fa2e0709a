"""The verb that searches settings: tune."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relora.cli.options import Json, Overrides, print_found

app = typer.Typer()


@app.command(epilog="Example: relora tune configs/finetune/lora.yaml --trials 24 --jobs 2")
def tune(
    config: Annotated[Path, typer.Argument(help="YAML configuration; one with a `task` is for fine-tuning.")],
    overrides: Overrides = None,
    space: Annotated[Path | None, typer.Option(help="YAML file of the space; otherwise a built-in one.")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of the study, earlier ones included.")] = None,
    hours: Annotated[float | None, typer.Option(help="Hours of this command.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that all trials train on.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds with which the best trials are run.")] = 1,
    finalists: Annotated[int, typer.Option(help="Trials that are run with several seeds.")] = 3,
    rungs: Annotated[str, typer.Option(help="Shares of the run after which the worse trials end.")] = "0.25,0.5,1",
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    objectives: Annotated[str, typer.Option(help="loss,memory,adapter,seconds: show their Pareto front.")] = "loss",
    memory: Annotated[
        str | None, typer.Option(help="Most memory of a trial as `relora plan` has it, e.g. 6GiB.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Largest size of the factors, e.g. 10MB.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Most minutes of a whole run.")] = None,
    jobs: Annotated[int, typer.Option(help="Trials side by side; they share the cores.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="Database URL or journal:FILE; otherwise a file in the study's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search the settings of LoRA or ReLoRA; the same command continues a search, or joins it from another machine."""
    import torch

    from relora.cli.tables.trials import print_trials
    from relora.distributed.launch import leave_launcher, place_of
    from relora.experiments.tune.limits import Limits
    from relora.experiments.tune.output import columns, recorded, rows
    from relora.experiments.tune.rungs import parse_rungs
    from relora.experiments.tune.search import Budget
    from relora.experiments.tune.tune import tune as run_tune
    from relora.planning.sizes import size_in_bytes

    place = place_of(os.environ)
    leave_launcher()  # each process is a worker of its own
    found = run_tune(
        config,
        overrides or [],
        space=space,
        storage=storage,
        budget=Budget(trials=trials, hours=hours, tokens=tokens, seeds=seeds, finalists=finalists),
        limits=Limits(
            memory=None if memory is None else size_in_bytes(memory, "--memory"),
            adapter=None if adapter is None else size_in_bytes(adapter, "--adapter"),
            minutes=minutes,
        ),
        rungs=parse_rungs(rungs),
        sampler=sampler,
        jobs=jobs,
        objectives=[name.strip() for name in objectives.split(",") if name.strip()],
        device=f"cuda:{place.local_rank}" if place is not None and torch.cuda.is_available() else None,
        tell=partial(typer.echo, err=True),
    )
    if place is not None and place.rank:
        return  # under a launcher one of the workers prints what all of them have found
    print_found(
        found,
        as_json,
        lambda result: print_trials(
            columns(result), rows(result), list(result.space.settings), result.folder / "tune.md"
        ),
        recorded,
    )
    if not as_json:
        for line in recorded(found)["advice"]:
            print(line)
        print(f"{found.folder}/best.yaml  {found.folder}/tune.html")
