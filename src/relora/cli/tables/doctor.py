"""What this machine has and lacks, as a table."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relora.planning.doctor import EXTRAS, GB, Diagnosis, DtypeSpeed


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """The findings as a table, the warnings under it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("versions", ", ".join(f"{name} {number or '-'}" for name, number in diagnosis.versions.items()))
    table.add_row("platform", diagnosis.platform)
    table.add_row("device", f"{diagnosis.device} (CUDA {diagnosis.cuda or 'not built in'})")
    for index, gpu in enumerate(diagnosis.gpus):
        free, total = gpu.memory_free_bytes / GB, gpu.memory_total_bytes / GB
        table.add_row(f"cuda:{index}", f"{gpu.name} ({gpu.compute_capability}), {free:.1f} of {total:.1f} GB free")
    table.add_row("CPU", f"{diagnosis.cpu_cores} cores, {diagnosis.threads} threads used by PyTorch")
    if diagnosis.memory_free_bytes is not None and diagnosis.memory_total_bytes is not None:
        free, total = diagnosis.memory_free_bytes / GB, diagnosis.memory_total_bytes / GB
        table.add_row("memory", f"{free:.1f} of {total:.1f} GB free")
    table.add_row("disk", f"{diagnosis.disk_free_bytes / GB:.1f} GB free")
    for name, speed in diagnosis.dtypes.items():
        table.add_row(name, _describe_speed(speed))
    rates = ", ".join(f"{name.replace('_', ' ')} {rate:,.0f}" for name, rate in diagnosis.rates.items())
    table.add_row("rates", Text(f"{rates}; kept in {diagnosis.rates_file}, --calibrate measures anew"))
    for name, number in diagnosis.extras.items():
        table.add_row(name, Text(number or f"not installed; needed for {EXTRAS[name]}"))  # Text: no markup in it
    console = console or Console(highlight=False)
    console.print(table)
    for warning in diagnosis.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def _describe_speed(speed: DtypeSpeed) -> str:
    if speed.gflops is None or speed.ratio_to_fp32 is None:
        return "not supported"
    return f"{speed.gflops:,.0f} GFLOP/s in matrix products (on a CPU per thread), {speed.ratio_to_fp32:.2g} times fp32"
