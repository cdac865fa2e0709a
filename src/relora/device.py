"""Which device the arithmetic runs on, in what order it adds there, and the most memory that it has taken."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from relora.errors import UserError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""For `deterministic`. torch looks once, at the first product of a process on a GPU, so it is said on import."""


def choose_device(name: str = "auto") -> torch.device:
    """`auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`; `UserError` if it is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: `{name}` is none of auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but this machine has none; set `device: auto`")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device: `{name}` is none of auto, cpu, cuda, cuda:N, mps")
    return device


def _cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no CUDA GPU is in sight"
        raise UserError(f"device: {device} was asked for, but {why}; set `device: auto`, or see `relora doctor`")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device: {device} was asked for, but the GPUs here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within it a GPU takes every sum in the same order each time; a CPU does so anyway.

    Raises:
        UserError: an operation of the model has no such order, or the process multiplied on a GPU before it imported
            this module.
    """
    if device.type != "cuda":
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with `warn_only`, attention's way back would still add in any order
    memory.fill_uninitialized_memory = False  # a pass over every tensor, for programs that read what they never wrote
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            reason = "torch wants CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before the process begins"
        elif "deterministic implementation" in str(error):
            reason = str(error).partition(",")[0]
        else:
            raise
        raise UserError(f"deterministic: {reason}; set `deterministic: false` to do without") from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory taken so far: on a CUDA device by tensors, elsewhere by this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where what getrusage tells begins with what the parent process had taken
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
