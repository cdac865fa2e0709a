"""What `relora plan` predicts against what real steps take: peak resident memory and seconds.

    python benchmarks/plan.py                    # the benchmark set; minutes
    python benchmarks/plan.py llama-9m/full/4/256/none/1 llama-60m/low_rank/8/256/full/2

With MALLOC_MMAP_THRESHOLD_=1048576 in the environment glibc keeps no freed tensors, and nothing but tensors and the
process is left to predict.

A case is preset / phase / micro-batch in sequences / sequence length / activation checkpointing / micro-batches in a
step. Each is measured in a process of its own that takes three steps on synthetic tokens: its peak resident set, and
the faster of the second and third step. A low-rank step is that of LoRA and of ReLoRA alike (r = 64).
"""

import argparse
import os
import platform
import statistics

import torch

from relora.config import RunConfig, parse_config
from relora.device import choose_device
from relora.planning.phase_cost import allocator_loss, step_figures
from relora.planning.probe import probe, process_bytes
from relora.train.schedule import Phase

CASES = [
    *(f"{preset}/{phase}/4/256/none/1" for preset in ("llama-9m", "llama-20m", "llama-35m", "llama-60m")
      for phase in ("full", "low_rank")),
    *(f"llama-35m/{phase}/{micro}/none/2" for phase in ("full", "low_rank") for micro in ("2/512", "8/128", "8/256")),
    *(f"llama-60m/{phase}/8/256/{kind}/2" for phase in ("full", "low_rank") for kind in ("none", "selective", "full")),
]  # fmt: skip
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", default=CASES)
    parser.add_argument("--base", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--frozen", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    process = process_bytes()
    print(f"process {process / MB:.0f} MB; MB predicted, measured, their ratio; seconds of a step likewise")
    memory, time = [], []
    for case in arguments.cases:
        config, phase = configuration(case, arguments.base, arguments.frozen)
        figures = step_figures(config, phase, choose_device("cpu"))
        predicted = process + figures.peak + allocator_loss(figures)
        measured = probe(config, phase)
        memory.append(predicted / measured.peak)
        time.append(figures.seconds / measured.step_seconds)
        loss = (measured.peak - process - figures.peak) / figures.heap
        print(
            f"{case:<36} {predicted / MB:8.0f} {measured.peak / MB:8.0f}  {memory[-1]:.3f}   "
            f"{figures.seconds:7.2f} {measured.step_seconds:7.2f}  {time[-1]:.2f}   heap loss {loss:.2f}",
            flush=True,
        )
    for name, ratios in {"memory": memory, "time": time}.items():
        low, high = min(ratios), max(ratios)
        print(f"{name}: median of ratios {statistics.median(ratios):.3f}, from {low:.3f} to {high:.3f}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads; torch {torch.__version__}")


def configuration(case: str, base: str, frozen: str) -> tuple[RunConfig, Phase]:
    preset, phase, micro, length, checkpointing, micro_batches = case.split("/")
    low_rank = phase == "low_rank"
    config = parse_config(
        {
            "output_dir": "none",
            "device": "cpu",
            "model": {"preset": preset},
            "data": {"train": "none", "validation": "none", "sequence_length": int(length)},
            "method": "lora" if low_rank else "full",
            "lowrank": {"r": 64, "base": base},
            "precision": {"frozen": frozen},
            "warm_start": {"steps": 0},
            "schedule": {"total_steps": 10, "warmup_steps": 0},
            "batch": {"sequences": int(micro) * int(micro_batches), "micro_sequences": int(micro)},
            "memory": {"activation_checkpointing": checkpointing},
        }
    )
    return config, "low_rank" if low_rank else "full"


if __name__ == "__main__":
    main()
