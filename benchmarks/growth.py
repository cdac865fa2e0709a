"""Cost against model size and tokens: whether a step grows as the formula says.

    python benchmarks/growth.py --hidden 256 512 1024 --tokens 512 2048 8192 --layers 4 --threads 2

`formula` are the operations of `sides/shape.py`. `per operation` is the step's time divided by them, over the median of
the side's column: it stays at 1.00 where a step grows as the formula does; above it, something else takes its share.
In every round each size does one step.
"""

import argparse
import statistics

from sides.machine import machine
from sides.processes import SIDES, Setting, Worker
from sides.shape import fits
from steps import add_common, rank_of, shape_of

GIGA = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024], help="widths of presets")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="of a step; times of 256")
    parser.add_argument("--rank", default="64", help="a number, or d/N")
    parser.add_argument("--sides", nargs="+", default=["full", "ours", "ours-int8"], choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    add_common(parser)
    parser.set_defaults(layers=4)
    arguments = parser.parse_args()
    print(machine(arguments.threads))
    print("| d | layers | tokens | r | side | step, s | formula, GFLOP | GFLOP/s | per operation |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side in arguments.sides:
        settings = [
            Setting(
                shape_of(hidden, tokens, arguments.layers, arguments.vocabulary),
                rank_of(arguments.rank, hidden),
                tokens,
                arguments.threads,
                arguments.litgpt,
            )
            for hidden in arguments.hidden
            for tokens in arguments.tokens
        ]
        print_growth(side, settings, arguments.rounds)


def print_growth(side: str, settings: list[Setting], rounds: int) -> None:
    """One side at every size; sizes that do not fit into the memory together come one after the other."""
    needed = sum(setting.shape.resident_bytes(side, setting.tokens) for setting in settings)
    largest = max(setting.shape.logit_bytes(setting.tokens) for setting in settings)
    workers = [Worker(side, setting) for setting in settings]
    together = fits(needed + largest)
    turns = [workers] * rounds if together else [[worker] * rounds for worker in workers]
    seconds: dict[int, list[float]] = {id(worker): [] for worker in workers}
    for turn in turns:
        for worker in turn:
            seconds[id(worker)].append(worker.step())
        if not together:
            turn[0].stop()
    for worker in workers:
        worker.stop()
    steps = [statistics.median(seconds[id(worker)]) for worker in workers]
    flops = [setting.shape.flops(side, setting.rank, setting.tokens) for setting in settings]
    usual = statistics.median(step / operations for step, operations in zip(steps, flops, strict=True))
    for setting, step, operations in zip(settings, steps, flops, strict=True):
        cells = [setting.shape.hidden, setting.shape.layers, setting.tokens, setting.rank, side, f"{step:.3f}"]
        cells += [f"{operations / GIGA:.0f}", f"{operations / step / GIGA:.0f}", f"{step / operations / usual:.2f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
