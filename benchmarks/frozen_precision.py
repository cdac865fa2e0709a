"""Held-out loss with frozen products in fp32, bf16 and int8: the quickstart's model and data, several seeds.

    relora prepare corpus --out prepared/quickstart --train-tokenizer 4096 --validation 3%
    python benchmarks/frozen_precision.py --seeds 5 --steps 820 --jobs 2

configs/quickstart.yaml with `precision.frozen` set to each and nothing else changed; the same seeds, hence the same
initial weights, batches and draws. A run of other length than 820 steps keeps the shares of warm start and cycles.
What is scored is always the merged model of the run folder, opened in fp32, on the whole validation folder. Finished
runs are kept under runs/frozen and not repeated. Every run takes one thread.

`change` is the loss less that of fp32 with the same seed, in per cent of the latter: mean, standard deviation over the
seeds, and each.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from methods import relora
from sides.machine import machine

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RUNS = Path("runs/frozen")
VALIDATION = Path("prepared/quickstart/validation")
STEPS = 820
TIMES = {
    "schedule.total_steps": STEPS,
    "schedule.warmup_steps": 60,
    "warm_start.steps": 220,
    "restart.every_steps": 120,
    "restart.warmup_steps": 10,
    "checkpoint.every_steps": STEPS,
    "evaluate.every_steps": STEPS,
}
"""The quickstart's own; it is saved and evaluated at the end only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8"], help="the first is the reference")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    trials = [(precision, seed) for seed in range(arguments.seeds) for precision in arguments.precisions]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = dict(zip(trials, pool.map(lambda trial: loss(*trial, arguments.steps), trials), strict=True))
    print_table(arguments.precisions, range(arguments.seeds), scores)
    print(f"\n{arguments.steps} steps; {machine(threads=1)}")


def loss(precision: str, seed: int, steps: int) -> float:
    """Train one run, unless its score is there, and return its held-out loss in nats per token."""
    folder = RUNS / f"{precision}-{seed}-{steps}"
    result = folder / "score.json"
    if not result.exists():
        times = [f"{key}={usual * steps // STEPS}" for key, usual in TIMES.items()]
        quiet = ["log.trackers=[]", "samples.max_new_tokens=1", "--quiet"]
        trial = [f"precision.frozen={precision}", f"seed={seed}", f"output_dir={folder}"]
        relora("pretrain", str(CONFIG), *trial, *times, *quiet)
        result.write_text(relora("evaluate", str(folder), "--data", str(VALIDATION), "--json"))
        print(f"{folder.name}: {result.read_text()}", file=sys.stderr, flush=True)
    value: float = json.loads(result.read_text())[0]["loss"]
    return value


def print_table(precisions: list[str], seeds: range, scores: dict[tuple[str, int], float]) -> None:
    """Markdown: the loss, and its change from the first precision with the same seed."""
    reference = [scores[precisions[0], seed] for seed in seeds]
    print("| frozen products | held-out loss, mean (sd) | change, mean (sd) | by seed |")
    print("|---|---|---|---|")
    for precision in precisions:
        losses = [scores[precision, seed] for seed in seeds]
        changes = [100 * (a / b - 1) for a, b in zip(losses, reference, strict=True)]
        by_seed = ", ".join(f"{change:+.2f}" for change in changes)
        change = f"{statistics.mean(changes):+.3f}% ({spread(changes):.3f})"
        print(f"| {precision} | {statistics.mean(losses):.4f} ({spread(losses):.4f}) | {change} | {by_seed} |")


def spread(values: list[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
