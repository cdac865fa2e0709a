"""What a step costs beside its matrix products: gradients of embeddings, norm, clip, AdamW.

    python benchmarks/optimizer.py                       # parts, for tables of llama-60m and llama-350m
    python benchmarks/optimizer.py --whole llama-60m     # whole ReLoRA steps, too

The parts are timed on the input embedding alone (vocabulary x d, fp32), each beside the way it replaces, by turns:
medians, and the median of the ratios. Whole steps take the low-rank phase of a preset at r = 128 with random tokens,
2,048 of them per step in 1 and in 8 micro-batches, with embedding gradients as autograd makes them and as ours do. One
thread. What a first touch of fresh memory costs depends on the machine; THP_MEM_ALLOC_ENABLE=1 has torch ask for huge
pages.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from relora.data.pretraining.batches import Batch
from relora.device import peak_memory_bytes
from relora.lowrank import LowRankConfig, inject
from relora.measure import token_loss
from relora.model.load import build_model
from relora.model.presets import PRESETS
from relora.train import step as stepping
from relora.train.embeddings import rows_added_in_place
from relora.train.optim import OptimizerConfig, build_optimizer

VOCABULARY = 32_100
TOKENS = 2_048
SEQUENCE = 256
WIDTHS = {"llama-60m": 512, "llama-350m": 1024}

Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", choices=sorted(PRESETS), help="whole steps of this preset, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        preset, micro, side = arguments.peak
        print(peak_mib(preset, int(micro), side))
        return
    pages = "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "pages as they come"
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {pages}\n")
    print("| one way; another | ms | ms | ratio |\n|---|---|---|---|")
    for preset, width in WIDTHS.items():
        for name, one, other in parts(width):
            row(f"{preset}: {name}", one, other, arguments.rounds)
    if arguments.whole:
        for micro_batches in (1, 8):
            take = {side: steps(arguments.whole, micro_batches, side) for side in SIDES}
            name = f"{arguments.whole}: whole step, {micro_batches} micro-batches"
            row(
                f"{name}: autograd; in place",
                *(partial(next, take[side]) for side in SIDES),
                max(3, arguments.rounds // 2),
            )
            peaks = [peak_of(arguments.whole, micro_batches, side) for side in SIDES]
            print(f"| {name}: peak MiB | {peaks[0]} | {peaks[1]} | {peaks[1] / peaks[0]:.3f} |")


def row(name: str, one: Work, other: Work, rounds: int) -> None:
    """Both by turns, after one turn that does not count."""
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        seconds.append((timed(one), timed(other)))
    medians = [statistics.median(column) * 1e3 for column in zip(*seconds[1:], strict=True)]
    ratio = statistics.median(later / earlier for earlier, later in seconds[1:])
    print(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {ratio:.3f} |", flush=True)


def timed(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parts(width: int) -> Iterator[tuple[str, Work, Work]]:
    """Names, and two pieces of work to compare."""
    torch.manual_seed(0)
    table = nn.Embedding(VOCABULARY, width)
    ids, upstream = torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS, width)

    def backward(place: Callable[[nn.Module], AbstractContextManager[None]], first: bool) -> Work:
        def work() -> None:
            if first:
                table.weight.grad = None
            with place(table):
                table(ids).backward(upstream)

        return work

    yield (
        "gradient of the first micro-batch: autograd; in place",
        backward(autograds, True),
        backward(rows_added_in_place, True),
    )
    yield (
        "gradient of each that follows: autograd; in place",
        backward(autograds, False),
        backward(rows_added_in_place, False),
    )
    gradient = torch.randn(VOCABULARY, width) * 1e-3
    table.weight.grad = gradient
    norm = nn.utils.get_total_norm([gradient])
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-6, fused=True)

    def clipped_then_stepped() -> None:
        nn.utils.clip_grads_with_norm_(table.parameters(), 1e9, norm)
        optimizer.step()

    def clipped_within() -> None:
        optimizer.grad_scale = torch.clamp((norm + 1e-6) / 1e9, min=1.0)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale  # type: ignore[attr-defined]

    yield "AdamW; clip and AdamW", optimizer.step, clipped_then_stepped
    yield "clip and AdamW; clip within AdamW, by grad_scale (not taken)", clipped_then_stepped, clipped_within
    yield "AdamW; gradient norm", optimizer.step, lambda: nn.utils.get_total_norm([gradient])
    if importlib.util.find_spec("bitsandbytes"):
        small = build_optimizer(table, OptimizerConfig(name="adamw-8bit", lr=1e-6, lowrank_lr=1e-6))
        yield "AdamW; AdamW in 8 bits", optimizer.step, small.step


def autograds(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


SIDES = {"autograd": autograds, "in place": rows_added_in_place}


def steps(preset: str, micro_batches: int, side: str) -> Iterator[None]:
    """Endless ReLoRA steps, embedding gradients made by one side."""
    model = build_model(preset, {"vocab_size": VOCABULARY}, seed=0).train()
    inject(model, LowRankConfig(r=128), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4, lowrank_lr=1e-4))
    tokens = torch.randint(0, VOCABULARY, (TOKENS // SEQUENCE, SEQUENCE + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    while True:
        stepping.rows_added_in_place = SIDES[side]  # type: ignore[assignment]
        stepping.train_step(
            model,
            optimizer,
            batch,
            token_loss,
            seed=0,
            step=0,
            micro_sequences=len(tokens) // micro_batches,
            clip_grad_norm=1.0,
            autocast=None,
            check_gradients=False,
        )
        yield


def peak_of(preset: str, micro_batches: int, side: str) -> int:
    """Peak resident memory of a process of its own that takes two steps, MiB."""
    command = [sys.executable, str(Path(__file__)), "--peak", preset, str(micro_batches), side]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_mib(preset: str, micro_batches: int, side: str) -> int:
    take = steps(preset, micro_batches, side)
    next(take)
    next(take)
    return peak_memory_bytes(torch.device("cpu")) // 2**20


if __name__ == "__main__":
    main()
