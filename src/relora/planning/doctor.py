"""What this machine offers a run: versions, devices, which dtypes are fast, memory, disk, what is not installed.

A dtype is judged by doing: a matrix product is timed against fp32's, since many CPUs accept bf16 and emulate it slowly.
"""

import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from relora.device import choose_device
from relora.lowrank.calibrate import calibrated, rates_file
from relora.model.load import DTYPES

PACKAGES = ("relora", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
EXTRAS = {
    "wandb": "log.trackers: [wandb]",
    "trackio": "log.trackers: [trackio]",
    "bitsandbytes": "optimizer.name: adamw-8bit",
    "peft": "comparing layers and adapters with PEFT's",
    "sacrebleu": "relora evaluate --instructions, relora compare",
    "rouge_score": "relora evaluate --instructions, relora compare",
    "lm_eval": "relora evaluate --tasks",
    "gguf": "relora export --format gguf",
    "galore_torch": "optimizer.name: galore",
    "apollo_torch": "optimizer.name: apollo",
    "fira": "optimizer.name: fira",
}
"""Packages that not everybody needs, and what each is for."""

MEASURE_SECONDS = 0.1
"""All dtypes together."""
GB = 1e9


@dataclass(frozen=True)
class DtypeSpeed:
    """Matrix products of one dtype on the device that a run would use."""

    gflops: float | None
    """None where the device cannot do it."""
    ratio_to_fp32: float | None


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    compute_capability: str
    memory_free_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """The findings; plain values all the way down, so that `dataclasses.asdict` gives JSON."""

    versions: dict[str, str | None]
    """Of Python and the packages; None for one that is not installed."""
    platform: str
    device: str
    """What `device: auto` means here."""
    cuda: str | None
    """The CUDA that this PyTorch was built with."""
    gpus: list[Gpu]
    cpu_cores: int
    threads: int
    memory_free_bytes: int | None
    """Main memory that a new process can have; None where the system does not say."""
    memory_total_bytes: int | None
    disk_free_bytes: int
    dtypes: dict[str, DtypeSpeed]
    rates: dict[str, float]
    """By which runs choose how to compute low-rank layers: GFLOP/s of products by dtype, and GB/s of memory."""
    rates_file: str
    """Where they are kept."""
    extras: dict[str, str | None]
    """Version, or None where it is not installed."""
    warnings: list[str]


def diagnose(folder: Path = Path(), *, calibrate: bool = False) -> Diagnosis:
    """Look around: a tenth of a second beyond the imports, some more where the machine's rates are not known yet.

    Args:
        folder: where runs would be written.
        calibrate: measure the rates anew, and keep them.
    """
    device = choose_device("auto")
    memory_free, memory_total = _main_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dtypes = _measure_dtypes(device)
    rates = calibrated(device, anew=calibrate)
    disk_free = shutil.disk_usage(_existing(folder)).free
    return Diagnosis(
        versions={"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        platform=platform.platform(),
        device=str(device),
        cuda=torch.version.cuda,
        gpus=[_describe_gpu(index) for index in range(torch.cuda.device_count())],
        cpu_cores=cores,
        threads=torch.get_num_threads(),
        memory_free_bytes=memory_free,
        memory_total_bytes=memory_total,
        disk_free_bytes=disk_free,
        dtypes=dtypes,
        rates={
            "fp32_gflops": rates.fp32[-1][1] / 1e9,
            "bf16_gflops": rates.bf16 / 1e9,
            "int8_gflops": rates.int8 / 1e9,
            "memory_gb_per_second": rates.bandwidth / GB,
        },
        rates_file=str(rates_file(device)),
        extras={package: _version(package) for package in EXTRAS},
        warnings=_warnings(device, dtypes, cores, memory_free, disk_free),
    )


def _measure_dtypes(device: torch.device) -> dict[str, DtypeSpeed]:
    """The best of several products of each dtype, taken in turn, so that a busy moment falls on all alike.

    On a CPU by one thread: two that wait for each other on a busy machine measure the other processes.
    """
    seconds: dict[str, float | None] = dict.fromkeys(DTYPES, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in DTYPES.values():
        _product_seconds(device, dtype)  # the first one waits for the library to be loaded
    begin = time.perf_counter()
    while time.perf_counter() - begin < MEASURE_SECONDS or math.inf in seconds.values():
        for name, dtype in DTYPES.items():
            best = seconds[name]
            if best is not None:
                taken = _product_seconds(device, dtype)
                seconds[name] = None if taken is None else min(best, taken)
    torch.set_num_threads(threads)
    base = seconds["fp32"]
    flop = 2 * _size(device) ** 3
    return {
        name: DtypeSpeed(flop / best / 1e9, base / best) if best and base else DtypeSpeed(None, None)
        for name, best in seconds.items()
    }


def _size(device: torch.device) -> int:
    """Rows of the square matrices that are multiplied."""
    return 256 if device.type == "cpu" else 4096


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float | None:
    """The time of one square product; None if the device has none of this dtype."""
    try:
        matrix = torch.ones(_size(device), _size(device), dtype=dtype, device=device)
        _wait(device)
        begin = time.perf_counter()
        matrix @ matrix
        _wait(device)
    except RuntimeError:
        return None
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _warnings(
    device: torch.device,
    dtypes: dict[str, DtypeSpeed],
    cores: int,
    memory_free: int | None,
    disk_free: int,
) -> list[str]:
    found = []
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        found.append("an NVIDIA GPU seems to be here, but this PyTorch is CPU-only; install a CUDA build of it")
    elif device.type == "cpu":
        build = "CPU-only" if torch.version.cuda is None else "without a GPU in sight"
        found.append(f"this PyTorch is {build}; runs use the CPU")
    bf16 = dtypes["bf16"].ratio_to_fp32
    if bf16 is None or bf16 < 0.8:
        found.append("bf16 products are not supported or slower than fp32 here; keep `precision.dtype: fp32`")
    if torch.get_num_threads() < cores and device.type == "cpu":
        found.append(f"PyTorch uses {torch.get_num_threads()} of {cores} cores; see OMP_NUM_THREADS")
    if memory_free is not None and memory_free < 2 * GB:
        found.append(f"only {memory_free / GB:.1f} GB of main memory are free")
    if disk_free < 5 * GB:
        found.append(f"only {disk_free / GB:.1f} GB of disk are free; a checkpoint takes 12 bytes per parameter")
    return found


def _describe_gpu(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"sm_{major}{minor}", free, total)


def _main_memory() -> tuple[int | None, int | None]:
    """Free and total bytes, as Linux tells them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
