"""The verbs that read a configuration and train nothing: plan, config."""

import json
from pathlib import Path
from typing import Annotated

import typer

from relora.cli.options import Json, Overrides, print_found, print_json
from relora.errors import UserError

app = typer.Typer()


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
    world: Annotated[
        str | None, typer.Option(help="Predict a step on so many processes instead, e.g. 8 or 8,64,1024.")
    ] = None,
    bandwidth: Annotated[str, typer.Option(help="With --world: slowest link of a process, e.g. 25GB/s.")] = "25GB/s",
    within: Annotated[
        str | None, typer.Option(help="With --world: link within a machine; unless given, --bandwidth.")
    ] = None,
    per_machine: Annotated[int, typer.Option(min=1, help="With --world: processes of a machine.")] = 8,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="With --world: share of the backward pass that hides sending.")
    ] = 0.5,
    step_seconds: Annotated[
        str | None,
        typer.Option(help="With --world: measured seconds of a step on one process, one for each phase: 9.1,8.4."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory by kind and time by phase, before anything is built."""
    from relora.cli.tables.plan import print_plan
    from relora.cli.tables.scale import print_scale
    from relora.config import load_config, to_yaml
    from relora.planning.fit import fitting, write_config
    from relora.planning.plan import as_figures, make_plan
    from relora.planning.scale import link_of, scale, scale_figures
    from relora.planning.sizes import counts, positive_numbers, size_in_bytes

    settings = load_config(config, overrides or [])
    if out is not None and fit is None:
        raise UserError("--out: writes what --fit finds; give --fit SIZE")
    if out is not None and out.exists():
        raise UserError(f"{out}: is there already and was left as it is; give another --out")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or give another --out")
    if fit is not None:
        settings = fitting(settings, size_in_bytes(fit))
    if world is not None:
        if probe or alternatives or out is not None:
            raise UserError("--world: predicts steps on several processes; leave out --probe, --alternatives and --out")
        link = link_of(bandwidth, within, per_machine, overlap)
        measured = None if step_seconds is None else positive_numbers(step_seconds, "--step-seconds")
        found = scale(settings, counts(world, "--world"), link, step_seconds=measured)
        print_found(found, as_json, print_scale, scale_figures)
        return
    made = make_plan(settings, probed=probe, alternatives=alternatives)
    if out is not None:
        write_config(settings, out)
    if as_json:
        figures = as_figures(made)
        if fit is not None:
            figures["config"] = settings.model_dump(mode="json")
        print_json(figures)
        return
    if fit is not None and out is None:
        print(to_yaml(settings), end="")
    print_plan(made)


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
