"""Table of `relora doctor`: what this machine has and what it lacks."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Column
from rich.text import Text

from relora.cli.tables.layout import build_table, console_or_stdout
from relora.planning.doctor import EXTRAS, GB, Diagnosis, DtypeSpeed


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print the findings as a table, and the warnings below it."""
    console = console_or_stdout(console)
    table = build_table([Column(), Column()], _rows(diagnosis))
    table.show_header = False
    console.print(table)
    for warning in diagnosis.warnings:
        console.out(f"warning: {warning}")


def _rows(diagnosis: Diagnosis) -> Iterator[tuple[str, str | Text]]:
    """Yield each finding with its name; cells that may hold square brackets are `Text`, in which they are no markup."""
    yield "versions", ", ".join(f"{name} {number or '-'}" for name, number in diagnosis.versions.items())
    yield "platform", diagnosis.platform
    yield "device", f"{diagnosis.device} (CUDA {diagnosis.cuda or 'not built in'})"
    for index, gpu in enumerate(diagnosis.gpus):
        free = _free_of_total(gpu.memory_free_bytes, gpu.memory_total_bytes)
        yield f"cuda:{index}", f"{gpu.name} ({gpu.compute_capability}), {free}"
    yield "CPU", f"{diagnosis.cpu_cores} cores, {diagnosis.threads} threads used by PyTorch"
    if diagnosis.memory_free_bytes is not None and diagnosis.memory_total_bytes is not None:
        yield "memory", _free_of_total(diagnosis.memory_free_bytes, diagnosis.memory_total_bytes)
    yield "disk", f"{diagnosis.disk_free_bytes / GB:.1f} GB free"
    for name, speed in diagnosis.dtypes.items():
        yield name, _describe_speed(speed)
    rates = ", ".join(f"{name.replace('_', ' ')} {rate:,.0f}" for name, rate in diagnosis.rates.items())
    yield "rates", Text(f"{rates}; kept in {diagnosis.rates_file}, --calibrate measures anew")
    yield "precision.dtype: auto", Text(diagnosis.auto)
    for name, number in diagnosis.extras.items():
        yield name, Text(number or f"not installed; needed for {EXTRAS[name]}")


def _free_of_total(free_bytes: int, total_bytes: int) -> str:
    return f"{free_bytes / GB:.1f} of {total_bytes / GB:.1f} GB free"


def _describe_speed(speed: DtypeSpeed) -> str:
    if speed.gflops is None or speed.ratio_to_fp32 is None:
        return "not supported"
    return f"{speed.gflops:,.0f} GFLOP/s in matrix products (on a CPU per thread), {speed.ratio_to_fp32:.2g} times fp32"
