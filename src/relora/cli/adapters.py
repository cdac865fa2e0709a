"""The verbs `relora adapters VERB`: list, show, merge, unmerge, combine, extract."""

from pathlib import Path
from typing import Annotated

import typer

from relora.cli.options import Json, print_found
from relora.errors import UserError

app = typer.Typer(
    help="Adapters (LoRA, rsLoRA, DoRA in PEFT's format): list, show, merge, unmerge, combine, extract.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder with adapter_config.json.")]


@app.command("list", epilog="Example: relora adapters list runs")
def list_(
    folder: Annotated[Path, typer.Argument(help="Folder that holds adapters, at any depth.")], as_json: Json = False
) -> None:
    """List adapters: type, rank, targets, parameters, size and base model."""
    from relora.adapters.contents import list_adapters
    from relora.cli.tables.adapters import print_list

    print_found(list_adapters(folder), as_json, print_list)


@app.command(epilog="Example: relora adapters show runs/french/adapter --json")
def show(adapter: Folder, as_json: Json = False) -> None:
    """Show what is in an adapter, layer by layer."""
    from relora.adapters.show import show_adapter
    from relora.cli.tables.adapters import print_contents

    print_found(show_adapter(adapter), as_json, print_contents)


@app.command(epilog="Example: relora adapters merge runs/french/adapter --out models/french")
def merge(
    adapter: Folder,
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id; by default what the adapter names.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Open both models and compare logits.")] = True,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model: a plain model folder, written in the memory of one weight."""
    from relora.adapters.merge import merge_adapter
    from relora.cli.tables.adapters import print_merge

    print_found(merge_adapter(adapter, out, base=base, check=check), as_json, print_merge)


@app.command(epilog="Example: relora adapters unmerge models/french --out models/base-again")
def unmerge(
    model: Annotated[Path, typer.Argument(help="Model folder written by `relora adapters merge`.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base model, if it is not where it was.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter, if it is not where it was.")] = None,
    as_json: Json = False,
) -> None:
    """Take a merged adapter out again: bit for bit where the base is at hand, else by subtraction."""
    from relora.adapters.merge import unmerge_adapter
    from relora.cli.tables.adapters import print_unmerge

    print_found(unmerge_adapter(model, out, base=base, adapter=adapter), as_json, print_unmerge)


@app.command(
    epilog="Example: relora adapters combine runs/french/adapter runs/law/adapter --weights 0.7,0.3 --out law-french"
)
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Folders with adapter_config.json.")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties; the last three also with _svd.")
    ] = "svd",
    weights: Annotated[str | None, typer.Option(help="One for each, e.g. 0.7,0.3; by default all alike.")] = None,
    r: Annotated[int | None, typer.Option(help="Rank, with svd; by default the largest of theirs.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the numbers kept, with ties and dare.")] = None,
    seed: Annotated[int, typer.Option(help="Keys the draws of dare.")] = 0,
    as_json: Json = False,
) -> None:
    """One adapter out of several for the same base model."""
    from relora.adapters.combine import combine_adapters
    from relora.cli.tables.adapters import print_list

    summary = combine_adapters(
        adapters, out, weights=_parse_weights(weights), method=method, r=r, density=density, seed=seed
    )
    print_found(summary, as_json, lambda combined: print_list([combined]))


@app.command(epilog="Example: relora adapters extract models/base models/tuned --r 16 --out extracted")
def extract(
    base: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The same model after full training.")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    r: Annotated[int, typer.Option(help="Rank.")] = 16,
    target_modules: Annotated[str, typer.Option(help="all-linear, or names of layers: q_proj,v_proj.")] = "all-linear",
    as_json: Json = False,
) -> None:
    """The adapter nearest to what full training changed, and the share of the change that it keeps."""
    from relora.adapters.extract import extract_adapter
    from relora.cli.tables.adapters import print_extraction

    targets = target_modules if target_modules == "all-linear" else tuple(target_modules.split(","))
    print_found(extract_adapter(base, tuned, out, r=r, target_modules=targets), as_json, print_extraction)


def _parse_weights(text: str | None) -> list[float] | None:
    """Read the value of `--weights`: `0.7,0.3` as [0.7, 0.3]."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: give numbers with commas between, e.g. 0.7,0.3") from None
