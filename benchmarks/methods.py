"""Full-rank training, LoRA, LoRA with warm start and ReLoRA at equal tokens: held-out perplexity over three seeds.

    python benchmarks/methods.py --corpus TRAIN.jsonl.gz ... --held-out VALID.jsonl.gz ...

The same model, tokens and data order for every method (benchmarks/methods.yaml). Each gets the same budget for its
learning rate: three full-length runs at seed 0, the best of which is repeated at seeds 1 and 2. For full rank that is
the rate of everything; the others train what they train at full rank at the rate that was best there, and choose the
rate of their factors. The score is the perplexity of the whole held-out folder. Finished runs are kept under
runs/methods and not repeated. Every run takes one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/methods")
PREPARED = Path("prepared/methods")
RATES = (1e-3, 2e-3, 4e-3)
"""Learning rates to choose from at full rank."""
RATIOS = (0.5, 1.0, 2.0)
"""Rates of the factors to choose from, in multiples of the best full rate."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    lr: float
    lowrank_lr: float
    seed: int = 0

    @property
    def settings(self) -> tuple[str, ...]:
        """Overrides of benchmarks/methods.yaml."""
        rates = (f"optimizer.lr={self.lr}", f"optimizer.lowrank_lr={self.lowrank_lr}")
        return (*METHODS[self.method].overrides, *rates, f"seed={self.seed}", f"output_dir={self.folder}")

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.method}-{self.lr:g}-{self.lowrank_lr:g}-{self.seed}"


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    overrides: tuple[str, ...]


METHODS = {
    "full": Method("full rank", ("method=full",)),
    "lora": Method("LoRA", ("method=lora", "warm_start.steps=0")),
    "lora-warm": Method("LoRA, warm start 25%", ("method=lora",)),
    "relora": Method("ReLoRA, warm start 25%, 4 restarts", ("method=relora",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, help="texts to train on")
    parser.add_argument("--held-out", nargs="+", required=True, help="texts to score")
    parser.add_argument("--documents", type=int, default=600, help="of every file in the corpus")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    prepare(arguments)
    seeds = range(1, arguments.seeds)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        full = best(pool, [Trial("full", rate, rate) for rate in RATES])
        others = [[Trial(name, full.lr, ratio * full.lr) for ratio in RATIOS] for name in METHODS if name != "full"]
        list(pool.map(score, (trial for trials in others for trial in trials)))  # all at once: no core stands idle
        chosen = [full, *(best(pool, trials) for trials in others)]
        repeats = {trial: [replace(trial, seed=seed) for seed in seeds] for trial in chosen}
        list(pool.map(score, (trial for trials in repeats.values() for trial in trials)))
    print_table({trial: [score(run) for run in (trial, *more)] for trial, more in repeats.items()})


def best(pool: ThreadPoolExecutor, trials: list[Trial]) -> Trial:
    """The trial of the lowest perplexity."""
    return min(zip(pool.map(score, trials), trials, strict=True), key=lambda pair: pair[0])[1]


def prepare(arguments: argparse.Namespace) -> None:
    """Token files of both corpora, with one tokenizer."""
    train = ["--take", str(arguments.documents), "--train-tokenizer", "4096", "--validation", "0"]
    relora("prepare", *arguments.corpus, "--out", str(PREPARED), *train)
    tokenizer = str(PREPARED / "train" / "tokenizer")
    held_out = str(PREPARED / "held-out")
    relora("prepare", *arguments.held_out, "--out", held_out, "--tokenizer", tokenizer, "--validation", "0")


def score(trial: Trial) -> float:
    """Train one run, unless its score is there, and return its held-out perplexity."""
    result = trial.folder / "score.json"
    if not result.exists():
        relora("pretrain", str(HERE / "methods.yaml"), *trial.settings, "--quiet")
        result.write_text(
            relora("evaluate", str(trial.folder), "--data", str(PREPARED / "held-out" / "train"), "--json")
        )
        print(f"{trial.folder.name}: {result.read_text()}", file=sys.stderr, flush=True)
    perplexity: float = json.loads(result.read_text())[0]["perplexity"]
    return perplexity


def relora(*arguments: str) -> str:
    """One call of the command line on one thread; its standard output."""
    command = [sys.executable, "-c", "from relora.cli import main; main()", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"relora {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def print_table(scores: dict[Trial, list[float]]) -> None:
    """Markdown: mean and spread (lowest to highest) over the seeds, and the ratio to full rank."""
    reference = statistics.mean(next(iter(scores.values())))
    print(
        "| method | held-out perplexity, mean (lowest - highest) | ratio to full rank | learning rate: rest / factors |"
    )
    print("|---|---|---|---|")
    for trial, values in scores.items():
        mean, spread = statistics.mean(values), f"{min(values):.1f} - {max(values):.1f}"
        rates = f"{trial.lr:g}" + (f" / {trial.lowrank_lr:g}" if trial.method != "full" else "")
        print(f"| {METHODS[trial.method].title} | {mean:.1f} ({spread}) | {mean / reference:.3f} | {rates} |")


if __name__ == "__main__":
    main()
