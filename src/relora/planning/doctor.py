"""Findings about this machine: versions, devices, speed of the dtypes, memory, disk, packages that are not installed.

The speed of a dtype is measured by a matrix product, relative to fp32, since many CPUs accept bf16 but emulate it.
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

from relora.device import choose_device, main_memory
from relora.lowrank.calibrate import calibrated, rates_file
from relora.model.load import DTYPES
from relora.recipes.precision import auto_on, bf16_shares, has_bf16_instructions

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
"""Optional package -> the feature that needs it."""

MEASURE_SECONDS = 0.1
"""Time that the measurement of all dtypes takes together."""
GB = 1e9


@dataclass(frozen=True)
class DtypeSpeed:
    """Speed of matrix products of one dtype on the device that a run would use."""

    gflops: float | None
    """Billions of operations per second; None if the device does not support the dtype."""
    ratio_to_fp32: float | None
    """Speed relative to fp32; None if the device does not support the dtype."""


@dataclass(frozen=True)
class Gpu:
    """Properties of one CUDA device."""

    name: str
    compute_capability: str
    memory_free_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """All findings, as plain values, so that `dataclasses.asdict` gives a tree for JSON."""

    versions: dict[str, str | None]
    """Versions of Python and of the packages that every run needs; None for a package that is not installed."""
    platform: str
    device: str
    """Device that `device: auto` chooses on this machine."""
    cuda: str | None
    """Version of CUDA that this PyTorch was built with; None for a build without CUDA."""
    gpus: list[Gpu]
    cpu_cores: int
    """Number of cores that this process may use."""
    threads: int
    """Number of threads that PyTorch uses."""
    memory_free_bytes: int | None
    """Main memory available to a new process; None if the system does not report it."""
    memory_total_bytes: int | None
    """Main memory of the machine; None if the system does not report it."""
    disk_free_bytes: int
    dtypes: dict[str, DtypeSpeed]
    rates: dict[str, float]
    """Rates by which runs choose how to compute low-rank layers: GFLOP/s of products by dtype, GB/s of memory."""
    rates_file: str
    """File in which the rates are kept."""
    auto: str
    """Dtype that `precision.dtype: auto` takes on this machine, and why."""
    extras: dict[str, str | None]
    """Optional package -> version; None if it is not installed."""
    warnings: list[str]
    """One line for each finding that makes runs slow or may stop them."""


def diagnose(folder: Path = Path(), *, calibrate: bool = False) -> Diagnosis:
    """Examine this machine; it takes a tenth of a second, and some more if its rates have not been measured yet.

    Args:
        folder: folder in which runs would be written, whose disk is examined.
        calibrate: measure the rates again and keep the new ones.
    """
    device = choose_device("auto")
    memory_free, memory_total = main_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dtypes = _measure_dtypes(device)
    rates = calibrated(device, anew=calibrate)
    if calibrate and device.type == "cpu" and has_bf16_instructions():
        bf16_shares(device, anew=True)
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
        auto=auto_on(device),
        extras={package: _version(package) for package in EXTRAS},
        warnings=_warnings(device, dtypes, cores, memory_free, disk_free),
    )


def _measure_dtypes(device: torch.device) -> dict[str, DtypeSpeed]:
    """Measure the speed of each dtype: the fastest of several products, which are timed in turn.

    Turns spread the disturbance by other processes evenly. A CPU multiplies with one thread, because the time of
    threads that wait for one another depends on how busy the machine is.
    """
    seconds: dict[str, float | None] = dict.fromkeys(DTYPES, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in DTYPES.values():
        _product_seconds(device, dtype)  # the first product also loads the library
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
    """Return the number of rows of the square matrices that are multiplied."""
    return 256 if device.type == "cpu" else 4096


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the seconds of one square product; None if the device does not support the dtype."""
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
    """Wait until the device has finished its work."""
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
    """Return one line for each finding that makes runs slow or may stop them."""
    found = []
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        found.append("an NVIDIA GPU seems to be here, but this PyTorch is CPU-only; install a CUDA build of it")
    elif device.type == "cpu":
        build = "CPU-only" if torch.version.cuda is None else "without a GPU in sight"
        found.append(f"this PyTorch is {build}; runs use the CPU")
    bf16 = dtypes["bf16"].ratio_to_fp32
    if bf16 is None or bf16 < 0.8:
        found.append("bf16 products are not supported or slower than fp32 here; set no `precision.dtype`, or fp32")
    if torch.get_num_threads() < cores and device.type == "cpu":
        found.append(f"PyTorch uses {torch.get_num_threads()} of {cores} cores; see OMP_NUM_THREADS")
    if memory_free is not None and memory_free < 2 * GB:
        found.append(f"only {memory_free / GB:.1f} GB of main memory are free")
    if disk_free < 5 * GB:
        found.append(f"only {disk_free / GB:.1f} GB of disk are free; a checkpoint takes 12 bytes per parameter")
    return found


def _describe_gpu(index: int) -> Gpu:
    """Return the properties of a CUDA device."""
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"sm_{major}{minor}", free, total)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest parent folder that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
