"""Adapters as tables: lists, contents, what a merge, an unmerge and an extraction did."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from relora.adapters.contents import Contents, Summary
from relora.adapters.extract import Extraction
from relora.adapters.merge import MergeReport, UnmergeReport


def print_list(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Adapters as a table, one a row."""
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "type", "r", "targets", "parameters", "size", "base"):
        table.add_column(column, justify="right" if column in ("r", "parameters", "size") else "left", overflow="fold")
    for one in summaries:
        if one.problem is not None:
            table.add_row(one.name, one.kind, "-", one.problem, "-", _size(one.bytes), one.base or "-")
            continue
        ranks = f"{min(one.r)} ... {max(one.r)}" if len(one.r) > 1 else "".join(map(str, one.r)) or "-"
        targets = " ".join(one.targets) or "-"
        table.add_row(one.name, one.kind, ranks, targets, f"{one.parameters:,}", _size(one.bytes), one.base or "-")
    _console(console).print(table)


def print_contents(contents: Contents) -> None:
    """One adapter as tables."""
    print_list([contents.summary])
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "out x in", "r", "lora_alpha", "scaling", "norm of the update"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in contents.layers:
        sides, norm = f"{layer.out} x {layer.inn}", f"{layer.update_norm:.4g}"
        table.add_row(layer.path, sides, str(layer.r), f"{layer.lora_alpha:g}", f"{layer.scaling:g}", norm)
    _console().print(table)
    for name, shape in contents.full_tensors.items():
        _console().print(f"trained in full: {name} ({' x '.join(map(str, shape))})")


def print_merge(report: MergeReport) -> None:
    """What a merge did, in lines."""
    print(f"{report.out}: {report.adapter} merged into {report.layers} layers of {report.base}", end="")
    print(f", {report.full_tensors} tensors replaced" if report.full_tensors else "", end="")
    print(f" ({_size(report.bytes)})")
    if report.largest_logit_difference is None:
        print("logits not compared")
    else:
        print(
            f"largest logit difference between base + adapter and merged, on {report.tokens} tokens: "
            f"{report.largest_logit_difference:.2e}"
        )


def print_unmerge(report: UnmergeReport) -> None:
    """What was taken out, in one line."""
    how = "bit for bit" if report.exact else f"every weight within {report.error_bound:.1e} of it"
    print(f"{report.out}: {report.base} again without {report.adapter}, {how}")


def print_extraction(report: Extraction) -> None:
    """What an extraction kept, as a table."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("energy kept", justify="right")
    for path, share in report.layers.items():
        table.add_row(path, f"{share:.1%}")
    table.add_row(f"all {len(report.layers)} layers, r = {report.r}", f"{report.energy_kept:.1%}")
    _console().print(table)
    if report.left_out:
        others = ", ".join(report.left_out[:4]) + (" ..." if len(report.left_out) > 4 else "")
        print(f"not in the adapter: {len(report.left_out)} other weights that differ ({others})")
    print(report.out)


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _console(console: Console | None = None) -> Console:
    return console or Console(highlight=False)
