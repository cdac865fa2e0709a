"""How near to the machine's limit a whole step comes, and where the rest goes.

    python benchmarks/roofline.py --hidden 1024 --rank 64 --tokens 2048 --layers 6 --threads 2

In every round each side of `steps.py` does a whole step, and the products of such a step are done bare: the same
shapes and arithmetic, operands and results in memory that is there already. `achieved` are the operations of the step
(6·T·o·i per layer at full rank, 4·T·o·i and the factors at low rank, see `sides/shape.py`; nothing elementwise, no
attention) per second of the step, `peak` the same operations per second of the bare products, and `share` the one over
the other within a round, median (quartiles). The three products of the head are in fp32 on every side.

Then one step of each side runs under torch.profiler: seconds by kind, and how much of them the kernel of the operating
system took (`system`: page faults of fresh memory, mostly; over all threads).
"""

import argparse
import statistics
from typing import Any

from sides.machine import machine
from sides.processes import SIDES, Setting, side_by_side
from sides.products import Seconds, distinct, ideal_seconds
from sides.profiling import KINDS
from sides.shape import Shape
from steps import USUAL, add_common, quartiles, rank_of, shape_of

GIGA = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of a preset")
    parser.add_argument("--rank", default="64", help="a number, or d/N")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step; a multiple of 256")
    parser.add_argument("--sides", nargs="+", default=USUAL, choices=SIDES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--operators", action="store_true", help="also the operators that take most, side by side")
    add_common(parser)
    arguments = parser.parse_args()
    shape = shape_of(arguments.hidden, arguments.tokens, arguments.layers, arguments.vocabulary)
    rank = rank_of(arguments.rank, arguments.hidden)
    setting = Setting(shape, rank, arguments.tokens, arguments.threads, litgpt=arguments.litgpt)
    print(machine(arguments.threads))
    print(f"d = {shape.hidden}, {shape.layers} layers, r = {rank}, {setting.tokens} tokens, {shape.vocabulary} ids\n")
    steps: list[dict[str, list[float]]] = []
    bare: list[Seconds] = []
    with side_by_side(list(arguments.sides), setting) as sides:
        with_products = next(iter(sides.workers.values()))
        for _ in range(arguments.rounds):
            steps.append(sides.step_seconds(1))
            bare.append(with_products.ask("products"))
        profiles = {name: worker.ask("profile") for name, worker in sides.workers.items()}
    print_products(shape, setting.tokens, bare)
    print_shares(setting, {name: [step[name][0] for step in steps] for name in profiles}, bare)
    print_profiles(profiles)
    if arguments.operators:
        print_operators(profiles)


def print_products(shape: Shape, tokens: int, bare: list[Seconds]) -> None:
    """GFLOP/s of every product, by layer and arithmetic."""
    print("| product | out | in | arithmetic | x Wᵀ, GFLOP/s | dY W | dYᵀ x |\n|---|---|---|---|---|---|---|")
    for name, (o, i) in distinct(shape).items():
        for arithmetic, seconds in bare[0][name].items():
            rates = [
                f"{2 * tokens * o * i / statistics.median(b[name][arithmetic][k] for b in bare) / GIGA:.0f}"
                for k in range(len(seconds))
            ]
            print("|", " | ".join([name, str(o), str(i), arithmetic, *rates, *["-"] * (3 - len(rates))]), "|")


def print_shares(setting: Setting, steps: dict[str, list[float]], bare: list[Seconds]) -> None:
    """Achieved and possible GFLOP/s of whole steps."""
    print("\n| side | step, s | GFLOP by formula | achieved, GFLOP/s | peak, GFLOP/s | share of the peak |")
    print("|---|---|---|---|---|---|")
    for name, seconds in steps.items():
        flops = setting.shape.flops(name, setting.rank, setting.tokens)
        ideal = [ideal_seconds(name, setting.shape, setting.rank, setting.tokens, products) for products in bare]
        low, share, high = quartiles([i / s for i, s in zip(ideal, seconds, strict=True)])
        step = statistics.median(seconds)
        cells = [name, f"{step:.3f}", f"{flops / GIGA:.0f}", f"{flops / step / GIGA:.0f}"]
        cells += [f"{flops / statistics.median(ideal) / GIGA:.0f}", f"{share:.1%} ({low:.1%} - {high:.1%})"]
        print("|", " | ".join(cells), "|")


def print_profiles(profiles: dict[str, dict[str, Any]]) -> None:
    """A column for each side: seconds and shares by kind."""
    print("\n| one step under the profiler, s |", " | ".join(profiles), "|\n|---|" + "---|" * len(profiles))
    for kind in KINDS:
        cells = [f"{p['by_kind'][kind]:.3f} ({p['by_kind'][kind] / p['seconds']:.1%})" for p in profiles.values()]
        print(f"| {kind} |", " | ".join(cells), "|")
    print("| sum |", " | ".join(f"{p['seconds']:.3f}" for p in profiles.values()), "|")
    system = [f"{p['system_seconds']:.3f} ({p['page_faults']:,} page faults)" for p in profiles.values()]
    print("| system, of these |", " | ".join(system), "|")


def print_operators(profiles: dict[str, dict[str, Any]]) -> None:
    """The ten that take most, of each side."""
    for name, profile in profiles.items():
        print(f"\n{name}")
        for operator, seconds, calls in profile["top"]:
            print(f"  {seconds:7.3f} s  {calls:5d} x  {operator}")


if __name__ == "__main__":
    main()
