"""The device that a run computes on: its choice, deterministic sums on it, and its peak memory."""

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
"""Required by `deterministic`; set on import, since torch reads it only once, at a process's first product on a GPU."""


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Return the device of a name: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.

    Args:
        local_rank: number of this process among those of the machine that train together; each has a GPU of its own.

    Raises:
        UserError: the name is none of these, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _cuda(torch.device("cuda", local_rank))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: `{name}` is none of auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        return _cuda(torch.device("cuda", local_rank) if device.index is None else device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but this machine has none; set `device: auto`")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device: `{name}` is none of auto, cpu, cuda, cuda:N, mps")
    return device


def _cuda(device: torch.device) -> torch.device:
    """Return a CUDA device with its index; `UserError` if this machine has none such."""
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no CUDA GPU is in sight"
        raise UserError(f"device: {device} was asked for, but {why}; set `device: auto`, or see `relora doctor`")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device: {device} was asked for, but the GPUs here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make every sum inside the block run in a fixed order on a GPU; on a CPU it does so anyway.

    Raises:
        UserError: the model uses an operation without a deterministic version, or the process computed a matrix
            product on a GPU before it imported this module.
    """
    if device.type != "cuda":
        yield
        return
    memory: Any = torch.utils.deterministic
    was_enabled, filled_memory = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    # not `warn_only`, with which the backward pass of attention would still sum in an arbitrary order
    torch.use_deterministic_algorithms(True)
    # filling costs a pass over every new tensor, and helps only programs that read memory which they never wrote
    memory.fill_uninitialized_memory = False
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
        torch.use_deterministic_algorithms(was_enabled)
        memory.fill_uninitialized_memory = filled_memory


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, or of the machine for other devices; None if the system does not report it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else main_memory()[0]


def main_memory() -> tuple[int | None, int | None]:
    """Return available and total bytes of main memory, which only Linux reports here; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the tensors on a CUDA device, elsewhere of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage's peak includes that of the parent process before the fork
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, in KiB elsewhere
    return resident if sys.platform == "darwin" else resident * 1024
