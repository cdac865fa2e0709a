"""Calibration: the rates of a machine's matrix products and memory, measured once and kept in a file.

The measurement takes a fraction of a second. Its figures decide in which order a layer's products are computed
(`costs`), and thereby the last bits of the results. Therefore the first measurement of a machine is kept: later
processes read it, whatever else the machine is doing then, and a run's checkpoints keep the rates that the run started
with. `relora doctor --calibrate` measures again.
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
from relora.lowrank.costs import NOMINAL_RATES, Rates
from relora.lowrank.storage.int8 import LEVELS, column_major

_SIDE = 1024
"""Side of the square matrices that are multiplied on a CPU; four times as much on other devices."""
_NARROW_SIDES = (8, 32, 128, 512)
"""Narrowest sides at which the fp32 rate is measured, besides the square product."""
_SMALL_SIDE = 256
"""Side at which it is found out whether a type is worth measuring: a processor that emulates it is 50 times slower."""
_ROUNDS = 6
"""Repetitions of every measurement; the fastest counts."""


def calibrated(device: torch.device, folder: Path | None = None, *, anew: bool = False) -> Rates:
    """Return the rates of a device: those kept in `folder` if there are any, else measured now and kept there.

    If the folder cannot be written, every process measures again; that is not an error.

    Args:
        folder: the user's cache unless given.
        anew: discard the rates that are kept, which may have been measured while the machine was busy.

    Returns:
        The rates; `NOMINAL_RATES` for the meta device, on which nothing is computed.
    """
    if device.type == "meta":
        return NOMINAL_RATES
    file = rates_file(device, folder)
    if anew:
        _calibrated.cache_clear()
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return _calibrated(device, file)


def rates_file(device: torch.device, folder: Path | None = None, kind: str = "rates") -> Path:
    """Return the file that keeps the rates of this machine with this number of threads and this version of PyTorch.

    Args:
        folder: the user's cache unless given.
        kind: beginning of the file's name, which says what is measured.
    """
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        machine = f"{platform.machine()}-{capability}-{os.cpu_count()}-{torch.get_num_threads()}"
    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type}-{machine}-torch-{torch.__version__}")
    return (folder or user_cache()) / f"{kind}-{label}.json"


def measure(device: torch.device) -> Rates:
    """Measure the rates of a device; this takes some tenths of a second."""
    side = _SIDE if device.type == "cpu" else 4 * _SIDE

    def product(narrowest: int, dtype: torch.dtype, side: int = side) -> Callable[[], object]:
        """Return a function that multiplies [side, side] by [side, narrowest]."""
        x = torch.ones(side, side, device=device, dtype=dtype)
        y = torch.ones(side, narrowest, device=device, dtype=dtype)
        if dtype == torch.int8:
            y = column_major(y)
        return lambda: (torch._int_mm if dtype == torch.int8 else torch.mm)(x, y)

    numbers = torch.zeros(16 * side * side, device=device)
    copy = torch.empty_like(numbers)
    calls = {f"fp32 {narrowest}": product(narrowest, torch.float32) for narrowest in (*_NARROW_SIDES, side)}
    bf16_side = side if _bf16_is_usable(device) else _SMALL_SIDE
    calls |= {"bf16": product(bf16_side, torch.bfloat16, bf16_side), "copy": lambda: copy.copy_(numbers)}
    if _int8_is_usable(device):
        calls["int8"] = product(side, torch.int8)
    seconds = best_seconds(calls, device)
    fp32_rates, best_rate = [], 0.0
    for narrowest in (*_NARROW_SIDES, side):  # a wider product is never slower; if it seems so, other work interfered
        best_rate = max(best_rate, 2 * side * side * narrowest / seconds[f"fp32 {narrowest}"])
        fp32_rates.append((narrowest, best_rate))
    return Rates(
        fp32=tuple(fp32_rates),
        bf16=2 * bf16_side**3 / seconds["bf16"],
        int8=2 * side**3 / seconds["int8"] if "int8" in calls else 0.0,
        bandwidth=2 * 4 * numbers.numel() / seconds["copy"],
    )


def _bf16_is_usable(device: torch.device) -> bool:
    """Tell whether a product in bf16 takes less than twice the time of the same product in fp32."""
    numbers = torch.ones(_SMALL_SIDE, _SMALL_SIDE, device=device)
    short = numbers.bfloat16()
    seconds = best_seconds({"bf16": lambda: short @ short, "fp32": lambda: numbers @ numbers}, device)
    return seconds["bf16"] < 2 * seconds["fp32"]


def _int8_is_usable(device: torch.device) -> bool:
    """Tell whether `torch._int_mm` gives exact sums, in less than twice the time of the same product in fp32."""
    if device.type not in ("cpu", "cuda"):
        return False
    side = _SMALL_SIDE
    codes = torch.full((side, side), LEVELS, device=device, dtype=torch.int8)
    numbers = codes.float()
    seconds = best_seconds({"int8": lambda: torch._int_mm(codes, codes), "fp32": lambda: numbers @ numbers}, device)
    exact = bool((torch._int_mm(codes, codes) == side * LEVELS**2).all())
    return exact and seconds["int8"] < 2 * seconds["fp32"]


def to_json(rates: Rates) -> str:
    """Convert rates to JSON, for a file or a checkpoint."""
    return json.dumps(asdict(rates))


def from_json(text: str) -> Rates | None:
    """Convert the text that `to_json` returned back to rates; return None for any other text."""
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
    plausible = rates.fp32 and rates.int8 >= 0 and all(0 < figure < math.inf for figure in measured)
    return rates if plausible else None


@functools.cache
def _calibrated(device: torch.device, file: Path) -> Rates:
    """Read the rates from `file`, or measure and write them; once per process."""
    if kept := _read(file):
        return kept
    measured = measure(device)
    keep_first(file, to_json(measured))
    return _read(file) or measured


def keep_first(file: Path, text: str) -> None:
    """Write what was measured into a file that could not be read, unless another process has written it meanwhile.

    Of processes that measure at once the first must win, so that all take the same figures; `files.atomic` would let
    the last one win.
    """
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            file.hardlink_to(temporary.name)  # fails if another process was first; the caller reads what that has kept


def _read(file: Path) -> Rates | None:
    """Return the rates in `file`; None if it is absent or its content is not valid."""
    with contextlib.suppress(OSError, ValueError):
        return from_json(file.read_text(encoding="utf-8"))
    return None


def best_seconds(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Return the seconds of one call of each function, the fastest of several rounds.

    Other work on the machine can only slow a call down, and it seldom slows down all rounds of one function.
    """
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best
