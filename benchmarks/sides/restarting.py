"""A restart, timed, and what it takes beyond what was resident."""

import ctypes
from pathlib import Path
from typing import Any

import relora
from relora.lowrank import low_rank_layers
from sides.side import Side

KIB = 1024


def timed_restart(side: Side) -> dict[str, Any]:
    """One restart of the low-rank layers: seconds, bytes beyond what was resident, bytes of the largest weight."""
    ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps free would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    resident = status("VmRSS")
    report = relora.restart(side.model, side.optimizer, cycle=1)
    largest = max(layer.lora_A.element_size() * layer.weight.numel() for layer in low_rank_layers(side.model).values())
    return {"seconds": report.seconds, "extra_bytes": status("VmHWM") - resident, "largest_layer_bytes": largest}


def status(key: str) -> int:
    """A size of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{key}:"))
