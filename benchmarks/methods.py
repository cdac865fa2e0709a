"""Full-rank training, LoRA, LoRA with warm start and ReLoRA at equal tokens: held-out perplexity over three seeds.

    python benchmarks/methods.py --corpus FOLDER --held-out FOLDER

The same model, tokens and data order for every method (benchmarks/methods.yaml). Each gets the same budget for its
learning rate: three full-length runs at seed 0, the best of which is repeated at seeds 1 and 2. The score is the
perplexity of the whole held-out folder. Finished runs are kept under runs/methods and not repeated. Every run takes
one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/methods")
PREPARED = Path("prepared/methods")
RATES = {"full": (1.5e-3, 3e-3, 6e-3), "low-rank": (3e-3, 6e-3, 1.2e-2)}
"""Learning rates to choose from: of everything in full-rank training, of the factors in the others."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    overrides: tuple[str, ...]
    rate_key: str = "optimizer.lowrank_lr"

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES["full" if self.rate_key == "optimizer.lr" else "low-rank"]


METHODS = {
    "full": Method("full rank", ("method=full",), "optimizer.lr"),
    "lora": Method("LoRA", ("method=lora", "warm_start.steps=0")),
    "lora-warm": Method("LoRA, warm start 24%", ("method=lora",)),
    "relora": Method("ReLoRA, warm start 24%, 4 restarts", ("method=relora",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="texts to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="texts to score")
    parser.add_argument("--documents", type=int, default=200, help="of every file in the corpus")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    prepare(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        trials = [(name, rate, 0) for name, method in METHODS.items() for rate in method.rates]
        losses = dict(zip(trials, pool.map(score, trials), strict=True))
        best = {name: min(method.rates, key=lambda rate: losses[name, rate, 0]) for name, method in METHODS.items()}
        repeats = [(name, best[name], seed) for name in METHODS for seed in range(1, arguments.seeds)]
        losses |= dict(zip(repeats, pool.map(score, repeats), strict=True))
    print_table(losses, best, arguments.seeds)


def prepare(arguments: argparse.Namespace) -> None:
    """Token files of both corpora, with one tokenizer."""
    files = sorted(str(path) for path in arguments.corpus.iterdir() if ".jsonl" in path.name)
    train = ["--take", str(arguments.documents), "--train-tokenizer", "4096", "--validation", "0"]
    relora("prepare", *files, "--out", str(PREPARED), *train)
    tokenizer = str(PREPARED / "train" / "tokenizer")
    held_out = str(PREPARED / "held-out")
    relora("prepare", str(arguments.held_out), "--out", held_out, "--tokenizer", tokenizer, "--validation", "0")


def score(trial: tuple[str, float, int]) -> float:
    """Train one run, unless its score is there, and return its held-out perplexity."""
    name, rate, seed = trial
    method, folder = METHODS[name], RUNS / f"{name}-{rate:g}-{seed}"
    result = folder / "score.json"
    if not result.exists():
        settings = (*method.overrides, f"{method.rate_key}={rate}", f"seed={seed}", f"output_dir={folder}")
        relora("pretrain", str(HERE / "methods.yaml"), *settings, "--quiet")
        result.write_text(relora("evaluate", str(folder), "--data", str(PREPARED / "held-out" / "train"), "--json"))
    perplexity: float = json.loads(result.read_text())[0]["perplexity"]
    print(f"{name} at {rate:g}, seed {seed}: {perplexity:.2f}", file=sys.stderr, flush=True)
    return perplexity


def relora(*arguments: str) -> str:
    """One call of the command line on one thread; its standard output."""
    command = [sys.executable, "-c", "from relora.cli import main; main()", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"relora {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def print_table(losses: dict[tuple[str, float, int], float], best: dict[str, float], seeds: int) -> None:
    """Markdown: mean and spread (lowest to highest) over the seeds, and the ratio to full rank."""
    scores = {name: [losses[name, rate, seed] for seed in range(seeds)] for name, rate in best.items()}
    reference = statistics.mean(scores["full"])
    print("| method | held-out perplexity (lowest - highest) | ratio to full rank | learning rate |")
    print("|---|---|---|---|")
    for name, values in scores.items():
        mean = statistics.mean(values)
        spread = f"{min(values):.2f} - {max(values):.2f}"
        print(f"| {METHODS[name].title} | {mean:.2f} ({spread}) | {mean / reference:.3f} | {best[name]:g} |")


if __name__ == "__main__":
    main()
