"""The head and the loss, forward and backward: time and memory of ours, of torch's chunked one and of plain logits.

    python benchmarks/loss.py --threads 1 --json loss.json

plain    F.cross_entropy of F.linear: the logits of all tokens
torch    F.linear_cross_entropy, in chunks as large as ours; `default`: in those that it chooses by itself
ours     relora.measure.head_loss

`time` is that of a side over plain's within the same round, median (quartiles), all in one process. `memory` is what a
side adds to the peak resident set of a process of its own (Linux), in MB, the two gradients included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sides.machine import machine
from torch import Tensor

from relora.measure import CHUNK_TOKENS, head_loss
from relora.model.head import IGNORED

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = ("512x4096x512", "2048x4096x512", "512x32100x512", "2048x32100x512", "8192x32100x512", "2048x32100x1024")
"""Tokens x vocabulary x width."""


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED, reduction="sum")


def chunked(chunk: int | None) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", ignore_index=IGNORED, options=options
        ).float()

    return loss


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return head_loss(hidden, weight, None, labels)


SIDES: dict[str, Loss] = {
    "plain": plain,
    "ours": ours,
    "torch": chunked(CHUNK_TOKENS["cpu"]),
    "default": chunked(None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="TxVxD", help="tokens x vocabulary x width")
    parser.add_argument("--sides", nargs="+", default=["ours", "torch", "default"], choices=list(SIDES)[1:])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)  # how this script calls itself
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_bytes(SIDES[arguments.peak], *sizes(arguments.shapes[0])))
        return
    print(machine(arguments.threads))
    print(f"\n{'tokens':>6} {'vocab.':>6} {'width':>5}  {'side':<8} {'seconds':>7}  {'time':<18} {'memory':>8}")
    rows = [row for shape in arguments.shapes for row in compare(shape, ["plain", *arguments.sides], arguments)]
    if arguments.json:
        record = {"machine": machine(arguments.threads), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def compare(shape: str, names: list[str], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measures and prints the sides at one shape."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    given = tensors(*sizes(shape))
    for turn in range(arguments.rounds + 1):  # the first is a warm-up
        for name in names:
            taken = step_seconds(SIDES[name], *given)
            if turn:
                seconds[name].append(taken)
    rows: list[dict[str, object]] = []
    for name in names:
        ratios = [one / whole for one, whole in zip(seconds[name], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median, memory = statistics.median(seconds[name]), peak_of(name, shape, arguments.threads)
        tokens, vocabulary, width = sizes(shape)
        spread = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        print(f"{tokens:>6} {vocabulary:>6} {width:>5}  {name:<8} {median:>7.3f}  {spread:<18} {memory / 1e6:>8.1f}")
        sys.stdout.flush()
        row = {"tokens": tokens, "vocabulary": vocabulary, "width": width, "side": name, "seconds": median}
        rows.append(row | {"time": middle, "low": low, "high": high, "memory_bytes": memory})
    return rows


def sizes(shape: str) -> tuple[int, int, int]:
    tokens, vocabulary, width = map(int, shape.split("x"))
    return tokens, vocabulary, width


def tensors(tokens: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).requires_grad_()
    weight = torch.empty(vocabulary, width).normal_(0, 0.02, generator=draw).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=draw)


def step_seconds(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Of a loss and its gradients, none of which were there before."""
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    (loss(hidden, weight, labels) / len(labels)).backward()
    return time.perf_counter() - start


def peak_of(name: str, shape: str, threads: int) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--shapes", shape, "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_bytes(loss: Loss, tokens: int, vocabulary: int, width: int) -> int:
    """What the first step adds to the resident set at its highest; libraries are warmed up on a step of a few bytes."""
    step_seconds(loss, *tensors(8, 64, 16))
    given = tensors(tokens, vocabulary, width)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
    before = resident_bytes("VmRSS")
    step_seconds(loss, *given)
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """VmRSS: now; VmHWM: at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
