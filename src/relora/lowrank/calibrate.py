"""What this machine's products and memory do in a second: measured once, in a fraction of a second, and kept in a file.

The figures decide between ways of computing the same (`costs`), and so the last bits of a result. That is why the first
measurement of a machine stays: later processes read it, whatever else the machine is doing, and a run's checkpoints
keep the one that it began with. `relora doctor --calibrate` measures anew.
"""

import contextlib
import functools
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from relora.files.cache import user_cache
from relora.lowrank.costs import ANY, Rates
from relora.lowrank.storage.int8 import LEVELS, columnwise

_SIDE, _SIDES = 1024, (8, 32, 128, 512)
_ROUNDS = 6


def calibrated(device: torch.device, folder: Path | None = None, *, anew: bool = False) -> Rates:
    """The rates of a device: those kept in `folder` (by default the user's cache), else measured now and kept there.

    A folder that cannot be written costs a measurement per process and no more.

    Args:
        anew: forget the ones that are kept; they may have been measured while the machine was busy.
    """
    if device.type == "meta":
        return ANY
    file = rates_file(device, folder)
    if anew:
        _calibrated.cache_clear()
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return _calibrated(device, file)


def rates_file(device: torch.device, folder: Path | None = None) -> Path:
    """Where the rates of this machine, with this number of threads and this PyTorch, are kept."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        machine = f"{platform.machine()}-{capability}-{os.cpu_count()}-{torch.get_num_threads()}"
    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type}-{machine}-torch-{torch.__version__}")
    return (folder or user_cache()) / f"rates-{label}.json"


def measure(device: torch.device) -> Rates:
    """Measure for some tenths of a second."""
    side = _SIDE if device.type == "cpu" else 4 * _SIDE

    def product(narrowest: int, dtype: torch.dtype) -> Callable[[], object]:
        x = torch.ones(side, side, device=device, dtype=dtype)
        y = torch.ones(side, narrowest, device=device, dtype=dtype)
        if dtype == torch.int8:
            y = columnwise(y)
        return lambda: (torch._int_mm if dtype == torch.int8 else torch.mm)(x, y)

    numbers = torch.zeros(16 * side * side, device=device)
    copy = torch.empty_like(numbers)
    works = {f"fp32 {narrowest}": product(narrowest, torch.float32) for narrowest in (*_SIDES, side)}
    works |= {"bf16": product(side, torch.bfloat16), "copy": lambda: copy.copy_(numbers)}
    if _int8_pays_at_all(device):
        works["int8"] = product(side, torch.int8)
    seconds = _seconds(works, device)
    rates, best = [], 0.0
    for narrowest in (*_SIDES, side):  # a wider product is not slower; where it seems so, other work came between
        best = max(best, 2 * side * side * narrowest / seconds[f"fp32 {narrowest}"])
        rates.append((narrowest, best))
    return Rates(
        fp32=tuple(rates),
        bf16=2 * side**3 / seconds["bf16"],
        int8=2 * side**3 / seconds["int8"] if "int8" in works else 0.0,
        bandwidth=2 * 4 * numbers.numel() / seconds["copy"],
    )


def _int8_pays_at_all(device: torch.device) -> bool:
    """Whether there is more than a plain loop behind `torch._int_mm`, and its sums are exact."""
    if device.type not in ("cpu", "cuda"):
        return False
    side = 256
    codes = torch.full((side, side), LEVELS, device=device, dtype=torch.int8)
    numbers = codes.float()
    seconds = _seconds({"int8": lambda: torch._int_mm(codes, codes), "fp32": lambda: numbers @ numbers}, device)
    exact = bool((torch._int_mm(codes, codes) == side * LEVELS**2).all())
    return exact and seconds["int8"] < 2 * seconds["fp32"]


def to_json(rates: Rates) -> str:
    """For a file, or a checkpoint."""
    return json.dumps(asdict(rates))


def from_json(text: str) -> Rates | None:
    """Inverse of `to_json`; None for what it did not write."""
    try:
        kept = json.loads(text)
        rates = Rates(
            fp32=tuple((int(side), float(rate)) for side, rate in kept["fp32"]),
            bf16=float(kept["bf16"]),
            int8=float(kept["int8"]),
            bandwidth=float(kept["bandwidth"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    measured = (rates.bf16, rates.bandwidth, *(figure for pair in rates.fp32 for figure in pair))
    sound = rates.fp32 and rates.int8 >= 0 and all(0 < figure < math.inf for figure in measured)
    return rates if sound else None


@functools.cache
def _calibrated(device: torch.device, file: Path) -> Rates:
    if kept := _read(file):
        return kept
    measured = measure(device)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # one that cannot be read
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as aside:
            aside.write(to_json(measured))
            aside.flush()
            file.hardlink_to(aside.name)  # fails where another process was first, whose figures are then taken over
    return _read(file) or measured


def _read(file: Path) -> Rates | None:
    with contextlib.suppress(OSError, ValueError):
        return from_json(file.read_text(encoding="utf-8"))
    return None


def _seconds(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Of one call each, the best of some rounds: other work can only slow a call down, and seldom all rounds of one."""
    best = dict.fromkeys(works, math.inf)
    for _ in range(_ROUNDS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best
