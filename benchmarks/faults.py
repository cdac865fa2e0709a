"""Campaigns of faults: how often a run survives what can befall it, as a table.

    python benchmarks/faults.py kills --trials 200 --seed 0

kills       SIGKILL at every named point and at random ones; continued to the same bytes
stops       SIGTERM in every step of a run; continued to the same bytes
signals     SIGTERM and SIGINT at random times, once and twice; SIGUSR1
corruption  flipped bits, zeroed pages, truncated, missing and exchanged files of a checkpoint
disk        a full, failing, read-only or vanished disk
cycles      many saves: what is kept, what is left behind, who may write
drift       memory, threads and open files over a long run
fuzz        odd configurations, folders, sources and command lines
ranks       one of two processes under torchrun killed at a random step; started again by itself, to the same bits
stopped     one of two processes stopped; named, and started again
large       one endless line, one endless word, a million tiny documents

The suite runs a fast part of each. Exit status 1 if anything failed.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CAMPAIGNS = {
    "kills": ("kills", "campaign", 200),
    "stops": ("kills", "stops", 40),
    "signals": ("kills", "signals", 10),
    "corruption": ("corruption", "campaign", 600),
    "disk": ("disk", "campaign", 20),
    "cycles": ("cycles", "campaign", 1000),
    "drift": ("drift", "campaign", 2000),
    "fuzz": ("fuzz", "campaign", 20_000),
    "ranks": ("ranks", "campaign", 20),
    "stopped": ("ranks", "stops", 3),
    "large": ("large", "campaign", 100),
}
"""Name -> module under tests/faults, its function, and how many trials make the figure in docs/reliability.md."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--trials", type=int, help="by default as many as the figures in docs/reliability.md rest on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    module, function, usual = CAMPAIGNS[arguments.campaign]
    trials = usual if arguments.trials is None else arguments.trials
    torch.set_num_threads(1)  # tiny tensors, and sums must not depend on the machine
    sys.path.insert(0, str(ROOT))
    started = time.monotonic()
    rows = getattr(importlib.import_module(f"tests.faults.{module}"), function)(trials, arguments.seed)
    seconds = time.monotonic() - started
    print_table(rows)
    print(f"{seconds:.0f} s on {os.cpu_count()} cores, torch {torch.__version__}, one thread")
    if any(passed < of for _, passed, of in rows):
        again = f"python benchmarks/faults.py {arguments.campaign} --trials {trials} --seed {arguments.seed}"
        sys.exit(f"failed; again: {again}")


def print_table(rows: list[tuple[str, int, int]]) -> None:
    """What was tried, passed, of; a failed row is marked, the last one is the total."""
    total = ("total", sum(passed for _, passed, _ in rows), sum(of for _, _, of in rows))
    width = max(len(what) for what, _, _ in (*rows, total))
    for what, passed, of in (*rows, total):
        print(f"{what:<{width}}  {passed:>7,} of {of:>7,}{'' if passed == of else '  FAILED'}")


if __name__ == "__main__":
    main()
