"""What a figure was measured on."""

import importlib.metadata
import os
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""Of the processor: what decides how fast products in fp32, bf16 and int8 are."""


def machine(threads: int, device: str = "cpu") -> str:
    """One line."""
    known: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    present = known.get("flags", known.get("Features", "")).split()
    flags = " ".join(flag for flag in FLAGS if flag in present) or "no known vector units"
    gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    model = known.get("model name", "unknown processor")
    host = f"{model} ({flags}), {threads} of {os.cpu_count()} cores, {gibibytes:.0f} GiB; {packages}"
    if device == "cpu":
        return host
    import torch  # a process that only counts goes without

    return f"{torch.cuda.get_device_name(device)} beside {host}"
