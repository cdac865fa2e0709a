"""What activation checkpointing and compilation of the blocks cost in time and save in memory.

    python benchmarks/blocks.py --hidden 512 --layers 8
    python benchmarks/blocks.py --hidden 1024 --layers 4 --ways none selective full

A forward and backward pass of one micro-batch of 8 sequences of 256 tokens through a LLaMA in fp32, at full rank and
with factors of rank 64, on one thread. `time` is that of a pass over that of a plain one of the same round, in seconds
of the processor, so that neighbours matter little: median of the rounds, all ways
in one process, each with a model of its own. `first` are the
seconds of the first pass, compilation included, in a process of its own; with an empty cache unless --warm. `peak` is
that process's largest resident set, and `activations` what of it the passes added beside the gradients.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from sides.machine import machine
from torch import Tensor, nn

from relora.device import peak_memory_bytes
from relora.lowrank import LowRankConfig, inject
from relora.measure import token_loss
from relora.model.blocks import Checkpointing, training_blocks
from relora.model.load import build_model
from relora.model.presets import PRESETS

MB = 1e6
CPU = torch.device("cpu")
KINDS: tuple[Checkpointing, ...] = ("none", "selective", "full")
WAYS = {f"{'compiled ' * compiled}{kind}": (kind, compiled) for compiled in (False, True) for kind in KINDS}


@dataclass(frozen=True)
class Setting:
    """A model in one phase."""

    hidden: int
    layers: int
    vocabulary: int
    low_rank: bool

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model and its tokens."""
        torch.set_num_threads(1)
        width = next(preset.intermediate_size for preset in PRESETS.values() if preset.hidden_size == self.hidden)
        shape = {
            "hidden_size": self.hidden,
            "intermediate_size": width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
        }
        model = build_model("llama-60m", shape, seed=0).train()
        if self.low_rank:
            inject(model, LowRankConfig(r=64))
        return model, torch.randint(0, self.vocabulary, (8, 256), generator=torch.Generator().manual_seed(0))


def one_pass(model: nn.Module, ids: Tensor) -> None:
    loss, _ = token_loss(model, ids, ids)
    loss.backward()
    model.zero_grad()


def alone(setting: Setting, way: str) -> tuple[float, float, float]:
    """(seconds of the first pass, peak bytes, what of it was not there before, gradients aside)."""
    model, ids = setting.build()
    kind, compiled = WAYS[way]
    before = peak_memory_bytes(CPU)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    started = time.perf_counter()
    with training_blocks(model, checkpointing=kind, compiled=compiled):
        one_pass(model, ids)
        first = time.perf_counter() - started
        one_pass(model, ids)
    peak = peak_memory_bytes(CPU)
    return first, peak, peak - before - gradients


def together(setting: Setting, ways: list[str], rounds: int) -> dict[str, float]:
    """Each way's processor time over that of the first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as stack:
        models = {}
        for way in ways:
            models[way], ids = setting.build()
            kind, compiled = WAYS[way]
            stack.enter_context(training_blocks(models[way], checkpointing=kind, compiled=compiled))
            one_pass(models[way], ids)  # compiles
        for _ in range(rounds):
            for way, times in seconds.items():
                started = time.process_time()
                one_pass(models[way], ids)
                times.append(time.process_time() - started)
    plain = seconds[ways[0]]
    return {way: statistics.median(a / b for a, b in zip(times, plain, strict=True)) for way, times in seconds.items()}


def apart(function: object, *arguments: object) -> object:
    """In a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of a preset")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32100)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--phases", nargs="+", choices=("full", "low"), default=["full", "low"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="with what the compiler kept of earlier runs")
    arguments = parser.parse_args()
    print(machine(1))
    print("| d | layers | phase | blocks | time | first, s | peak, MB | activations, MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for phase in arguments.phases:
        setting = Setting(arguments.hidden, arguments.layers, arguments.vocabulary, phase == "low")
        ways = ["none", *(way for way in arguments.ways if way != "none")]
        ratios = apart(together, setting, ways, arguments.rounds)
        for way in ways:
            with tempfile.TemporaryDirectory() as empty:
                if not arguments.warm:
                    os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
                first, peak, added = apart(alone, setting, way)
            cells = [setting.hidden, setting.layers, phase, way, f"{ratios[way]:.3f}", f"{first:.1f}"]
            print("|", " | ".join(map(str, [*cells, f"{peak / MB:.0f}", f"{added / MB:.0f}"])), "|", flush=True)


if __name__ == "__main__":
    main()
