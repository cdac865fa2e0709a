"""The verb about this machine: doctor."""

from typing import Annotated

import typer

from relora.cli.options import Json, print_found

app = typer.Typer()


@app.command(epilog="Example: relora doctor --json")
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the rates that runs choose by anew; on an idle machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what this machine has and lacks: versions, devices, dtypes, memory, disk, extras."""
    from relora.cli.tables.doctor import print_diagnosis
    from relora.planning.doctor import diagnose

    print_found(diagnose(calibrate=calibrate), as_json, print_diagnosis)
