"""Tables and lines of `relora adapters`: lists, contents, and reports of merging, unmerging and extracting."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column

from relora.adapters.contents import Summary
from relora.adapters.extract import Extraction
from relora.adapters.merge import MergeReport, UnmergeReport
from relora.adapters.show import Contents
from relora.cli.tables.layout import build_table, console_or_stdout

SHOWN_NAMES = 4
"""Number of weights outside an extracted adapter that are listed by name."""


def print_list(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Print a table of adapters, one in a row."""
    columns = [
        Column("adapter", overflow="fold"),
        Column("type", overflow="fold"),
        Column("r", justify="right", overflow="fold"),
        Column("targets", overflow="fold"),
        Column("parameters", justify="right", overflow="fold"),
        Column("size", justify="right", overflow="fold"),
        Column("base", overflow="fold"),
    ]
    console_or_stdout(console).print(build_table(columns, map(_summary_row, summaries)))


def _summary_row(summary: Summary) -> list[str]:
    """Return the cells of one adapter; one that cannot be read has the reason in place of its targets."""
    if summary.problem is not None:
        ranks, targets, parameters = "-", summary.problem, "-"
    else:
        ranks = _ranks(summary.r)
        targets = " ".join(summary.targets) or "-"
        parameters = f"{summary.parameters:,}"
    size, base = format_decimal_bytes(summary.bytes), summary.base or "-"
    return [summary.name, summary.kind, ranks, targets, parameters, size, base]


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{min(ranks)} ... {max(ranks)}"


def print_contents(contents: Contents, console: Console | None = None) -> None:
    """Print one adapter: its row of the list, a table of its layers, and what was trained in full."""
    console = console_or_stdout(console)
    print_list([contents.summary], console)
    numbers = ("out x in", "r", "lora_alpha", "scaling", "norm of the update")
    columns = [
        Column("layer", overflow="fold"),
        *(Column(name, justify="right", overflow="fold") for name in numbers),
    ]
    rows = [
        [
            layer.path,
            f"{layer.out} x {layer.inn}",
            str(layer.r),
            f"{layer.lora_alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.update_norm:.4g}",
        ]
        for layer in contents.layers
    ]
    console.print(build_table(columns, rows))
    for name, shape in contents.full_tensors.items():
        console.print(f"trained in full: {name} ({' x '.join(map(str, shape))})")
    for name, ids in contents.rows.items():
        console.out(f"rows trained in full: {name} ({', '.join(map(str, ids))})")
    for name in contents.base_copies:
        console.out(f"a copy of the base's weight: {name}")
    if contents.misread_by_peft is None:
        console.out("its base is not a folder here, so it was not checked whether PEFT reads it as it was trained")
    for misreading in contents.misread_by_peft or ():
        console.out(f"warning: {misreading}")


def print_merge(report: MergeReport, console: Console | None = None) -> None:
    """Print what was merged into what, and how far the logits of the two models are apart."""
    console = console_or_stdout(console)
    replaced = f", {report.full_tensors} tensors replaced" if report.full_tensors else ""
    console.out(
        f"{report.out}: {report.adapter} merged into {report.layers} layers of {report.base}{replaced} "
        f"({format_decimal_bytes(report.bytes)})"
    )
    if report.untied:
        console.out(f"untied, since the adapter changes one of them alone: {' and '.join(report.untied)}")
    if report.largest_logit_difference is None:
        console.out("logits not compared")
    else:
        console.out(
            f"largest logit difference between base + adapter and merged, on {report.tokens} tokens: "
            f"{report.largest_logit_difference:.2e}"
        )


def print_unmerge(report: UnmergeReport, console: Console | None = None) -> None:
    """Print what was taken out of what, and how exactly."""
    how = "bit for bit" if report.exact else f"every weight within {report.error_bound:.1e} of it"
    console_or_stdout(console).out(f"{report.out}: {report.base} again without {report.adapter}, {how}")


def print_extraction(report: Extraction, console: Console | None = None) -> None:
    """Print a table of the energy that an extracted adapter keeps in each layer, and what it leaves out."""
    console = console_or_stdout(console)
    rows = [[path, f"{share:.1%}"] for path, share in report.layers.items()]
    rows.append([f"all {len(report.layers)} layers, r = {report.r}", f"{report.energy_kept:.1%}"])
    console.print(build_table([Column("layer", overflow="fold"), Column("energy kept", justify="right")], rows))
    if report.left_out:
        names = ", ".join(report.left_out[:SHOWN_NAMES])
        if len(report.left_out) > SHOWN_NAMES:
            names += " ..."
        console.out(f"not in the adapter: {len(report.left_out)} other weights that differ ({names})")
    console.out(report.out)


def format_decimal_bytes(size: float) -> str:
    """Format the size of a file in powers of 1000, as file managers and the hub do.

    Memory is another matter: `relora.planning.sizes.format_bytes` has powers of 1024.
    """
    if size < 1000:
        return f"{size:.0f} bytes"
    for unit in ("KB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"
