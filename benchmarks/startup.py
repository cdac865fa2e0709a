"""How long until something happens: `--help` of every verb, and `relora pretrain` to the end of its first step.

    relora prepare corpus --out prepared/quickstart --train-tokenizer 4096 --validation 3%
    python benchmarks/startup.py

Every figure is of a process from its launch on, wall-clock and CPU time of all threads, medians over the rounds after
one that warms the disk cache. The run is that of configs/paper/60m-main.yaml in fp32 on the prepared corpus, one
micro-batch of four sequences, full-rank; it is killed as soon as its first step stands in metrics.jsonl. The evaluation
before the first step is held to 1,024 tokens: how long it takes is `evaluate.tokens`' to say.
"""

import argparse
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERBS = ("", "prepare", "pretrain", "plan", "export", "evaluate", "generate", "report", "doctor", "config")
MAIN = "from relora.cli import main; main()"
EVALUATED_TOKENS = 1024
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3, help="rounds of `relora pretrain`")
    parser.add_argument("--prepared", type=Path, default=Path("prepared/quickstart"))
    arguments = parser.parse_args()
    for verb in VERBS:
        show(f"relora {verb} --help".replace("  ", " "), [*verb.split(), "--help"], arguments.rounds)
    with tempfile.TemporaryDirectory(dir=".") as name:
        run = Path(name) / "run"
        show(
            "to the first step of llama-60m", first_step(arguments.prepared, run), arguments.runs, run / "metrics.jsonl"
        )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")


def first_step(prepared: Path, run: Path) -> list[str]:
    """The arguments of a run that logs its first step."""
    settings = {
        "output_dir": run,
        "data.train": prepared / "train",
        "data.validation": prepared / "validation",
        "batch.sequences": 4,
        "batch.micro_sequences": 4,
        "precision.dtype": "fp32",
        "evaluate.tokens": EVALUATED_TOKENS,
        "log.every_steps": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return ["pretrain", str(ROOT / "configs" / "paper" / "60m-main.yaml"), *overrides, "--fresh", "--quiet"]


def show(what: str, arguments: list[str], rounds: int, until: Path | None = None) -> None:
    """One line of the table."""
    times = [timed(arguments, until) for _ in range(rounds + 1)][1:]
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{what:32} {wall:6.2f} s, {cpu:6.2f} s of CPU", flush=True)


def timed(arguments: list[str], until: Path | None) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one process, to its end or until a line stands in a file."""
    if until is not None:
        until.unlink(missing_ok=True)
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", MAIN, *arguments], stdout=subprocess.DEVNULL)
    while until is not None and process.poll() is None:
        if until.exists() and b'"kind": "train"' in until.read_bytes():
            process.kill()
        time.sleep(0.01)
    status = process.wait()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"status {status}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
