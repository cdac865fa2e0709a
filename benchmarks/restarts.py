"""What a restart costs: time against one optimizer step, extra peak memory against the largest layer.

    python benchmarks/restarts.py --hidden 512 1024 --layers 6 --threads 2

Steps and restarts by turns in one process. `extra` is how far the resident set rises above what it was before the
restart (the high-water mark of Linux, reset before), `largest layer` the fp32 bytes of the largest frozen weight.
"""

import argparse
import statistics

from sides.machine import machine
from sides.processes import SIDES, Setting, Worker
from steps import add_common, rank_of, shape_of

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--ranks", nargs="+", default=["64", "d/4"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--sides", nargs="+", default=["ours", "ours-int8"], choices=[s for s in SIDES if "ours" in s])
    parser.add_argument("--rounds", type=int, default=5)
    add_common(parser)
    arguments = parser.parse_args()
    print(machine(arguments.threads))
    print(
        "| d | layers | r | side | step, s | restart, s | in steps | extra, MB | largest layer, MB | extra in layers |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for hidden in arguments.hidden:
        shape = shape_of(hidden, arguments.tokens, arguments.layers, arguments.vocabulary)
        for rank in (rank_of(rank, hidden) for rank in arguments.ranks):
            for side in arguments.sides:
                worker = Worker(side, Setting(shape, rank, arguments.tokens, arguments.threads))
                worker.ask("restart")  # the first loads LAPACK
                steps, restarts = [], []
                for _ in range(arguments.rounds):
                    steps.append(worker.step())
                    restarts.append(worker.ask("restart"))
                worker.stop()
                ratio = statistics.median(r["seconds"] / step for r, step in zip(restarts, steps, strict=True))
                seconds = statistics.median(restart["seconds"] for restart in restarts)
                extra, largest = max(r["extra_bytes"] for r in restarts), restarts[0]["largest_layer_bytes"]
                cells = [hidden, shape.layers, rank, side, f"{statistics.median(steps):.3f}", f"{seconds:.3f}"]
                cells += [f"{ratio:.3f}", f"{extra / MB:.1f}", f"{largest / MB:.1f}", f"{extra / largest:.2f}"]
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
