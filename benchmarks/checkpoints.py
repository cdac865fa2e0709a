"""What a checkpoint costs: stall, slower steps while it is written, bytes, and the way back from it.

    relora prepare corpus --out prepared/quickstart --train-tokenizer 4096 --validation 3%
    python benchmarks/checkpoints.py llama-20m/4096 llama-60m/4096 llama-60m

A model (`preset` or `preset/vocab_size`) trains in its low-rank phase, by the loop that every run takes, in blocks of
`--block` steps. By turns a block begins with a checkpoint that is written in the background, with one that is written
before training goes on, and with none. Medians over the rounds:

    stall     from the end of a step until the next one begins, with all that saving does in the loop
    overhead  stall, and how much longer the steps of its block take than those of the block without a checkpoint of
              the same round; as a share of the default interval between checkpoints
    of CPU    the same of the CPU time of all threads: what it takes where the writer has no core of its own

The batches are tiny, so the share is a high one: a checkpoint costs the same beside larger batches. Then a run is
continued: how fast its checkpoint is verified, and what passes, imports aside, until its first step is done. Training
takes one thread and the writer another.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from relora.config import CheckpointSettings, RunConfig, parse_config
from relora.recipes.from_settings import lowrank_of
from relora.recipes.job import assemble
from relora.recipes.pretrain import job_of
from relora.recipes.pretraining_inputs import gather_pretraining
from relora.recipes.resume import Start
from relora.report.console import Console
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import FROZEN, SavedState, Tensors
from relora.train.loop import train
from relora.train.run import Run, restore
from relora.train.step import Batch

PREPARED = Path("prepared/quickstart")
KINDS = ("none", "background", "synchronous")
DEFAULT_INTERVAL = CheckpointSettings().every_steps
MB = 1e6


@dataclass
class Block:
    """A save, or one that was left out, and the steps after it; seconds."""

    kind: str
    stall: float
    cpu_begun: float
    cpu: float = 0.0
    """Of all threads, from before the save to the end of the last step."""
    steps: list[float] = field(default_factory=list)


class Turns(Checkpoints):
    """Saves in the background, at once and not at all, by turns, and measures the blocks of steps in between."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._by_kind = {
            "background": Checkpoints(folder / "background"),
            "synchronous": Checkpoints(folder / "synchronous", background=False),
        }
        self._mark = self._cpu_mark = 0.0
        self.blocks: list[Block] = []

    def step_ended(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        if self.blocks:
            self.blocks[-1].steps.append(now - self._mark)
            self.blocks[-1].cpu = cpu_now - self.blocks[-1].cpu_begun
        self._mark, self._cpu_mark = now, cpu_now

    def save(
        self,
        state: SavedState,
        weights: Tensors,
        frozen: Tensors,
        optimizer: Tensors,
        settings: Mapping[str, str | int],
    ) -> None:
        kind = KINDS[len(self.blocks) % len(KINDS)]
        if kind in self._by_kind:
            self._by_kind[kind].save(state, weights, frozen, optimizer, settings)
        now, cpu_now = time.perf_counter(), time.process_time()
        self.blocks.append(Block(kind, now - self._mark, self._cpu_mark if kind in self._by_kind else cpu_now))
        self._mark = now

    def wait(self) -> None:
        self._by_kind["background"].wait()

    def check(self) -> None:
        self._by_kind["background"].check()


class Clock(Reporter):
    """Tells the blocks of every step that ends."""

    def __init__(self, folder: Path, turns: Turns) -> None:
        super().__init__(folder, 0, [], Console(quiet=True))
        self._turns = turns

    def progress(self, step: int) -> None:
        self._turns.step_ended()


class FirstStepDoneError(Exception):
    """Ends a continued run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="preset[/vocab_size]")
    parser.add_argument("--block", type=int, default=20, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            config = configuration(model, arguments.block, arguments.rounds, Path(folder))
            print_costs(config, measure(config))
            print_way_back(config)
    print(f"{os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them ours; torch {torch.__version__}")


def configuration(model: str, block: int, rounds: int, folder: Path) -> RunConfig:
    """Low rank from the first step on, and nothing but steps and checkpoints."""
    preset, _, vocab_size = model.partition("/")
    steps = block * (len(KINDS) * rounds + 1)  # the first block warms up
    return parse_config(
        {
            "output_dir": str(folder),
            "model": {"preset": preset, **({"vocab_size": int(vocab_size)} if vocab_size else {})},
            "data": {
                "train": str(PREPARED / "train"),
                "validation": str(PREPARED / "validation"),
                "sequence_length": 64,
            },
            "method": "lora",
            "lowrank": {"r": 64},
            "warm_start": {"steps": 0},
            "schedule": {"total_steps": steps, "warmup_steps": 1},
            "batch": {"sequences": 2, "micro_sequences": 2},
            "checkpoint": {"every_steps": block},
            "evaluate": {"every_steps": steps, "tokens": 64},
            "precision": {"dtype": "fp32"},
            "log": {"every_steps": steps, "trackers": []},
        }
    )


def measure(config: RunConfig) -> list[Block]:
    """A whole run; its blocks, the last of each kind complete."""
    turns = Turns(Path(config.output_dir))
    parts = gather_pretraining(config)
    print(f"\n{config.model.preset}, {sum(p.numel() for p in parts.model.parameters()) / MB:.1f} million parameters")
    with Clock(turns.folder, turns) as reporter:
        run = assemble(job_of(config, parts), Start(None, lowrank_of(config), {}, []), reporter, turns)
        train(run, restore(run, None))
    return [block for block in turns.blocks if block.steps]


def print_costs(config: RunConfig, blocks: list[Block]) -> None:
    """Seconds and shares, by kind."""
    none, *others = ([block for block in blocks if block.kind == kind] for kind in KINDS)
    step = statistics.median(seconds for block in none for seconds in block.steps)
    step_cpu = statistics.median(block.cpu / len(block.steps) for block in none)
    print(f"  a step takes {step:.3f} s, {step_cpu:.3f} s of CPU")
    for saved in others:
        stall = statistics.median(block.stall for block in saved)
        more = statistics.median(
            block.stall + sum(block.steps) - sum(without.steps) for block, without in zip(saved, none, strict=True)
        )
        cpu = statistics.median(block.cpu - without.cpu for block, without in zip(saved, none, strict=True))
        wall_share, cpu_share = (f"{x / DEFAULT_INTERVAL:.2%}" for x in (more / step, cpu / step_cpu))
        print(f"  {saved[0].kind:<11}  stall {stall:.3f} s, overhead {more:.3f} s, {cpu:.3f} s of CPU")
        print(f"  {'':<11}  at every {DEFAULT_INTERVAL} steps {wall_share}, {cpu_share} of CPU")
    newest = max((Path(config.output_dir) / "background").iterdir())
    sizes = {file.name: file.stat().st_size for file in newest.iterdir()}
    linked = sizes[FROZEN] if (newest / FROZEN).stat().st_nlink > 1 else 0
    total = sum(sizes.values())
    print(f"  {total / MB:.1f} MB a checkpoint, of which {linked / MB:.1f} MB are a link and not written again")


def print_way_back(config: RunConfig) -> None:
    """Seconds from the start of a continued run to its first step."""
    times = [time.perf_counter()]
    parts = gather_pretraining(config)
    times.append(time.perf_counter())
    checkpoints = Checkpoints(Path(config.output_dir) / "background")
    checkpoint = checkpoints.open(max(step for step in checkpoints.steps() if step < config.total_steps))
    times.append(time.perf_counter())
    with Reporter(Path(config.output_dir), 0, [], Console(quiet=True)) as reporter:
        start = Start(checkpoint, lowrank_of(config), {}, [])
        run = stopping(assemble(job_of(config, parts), start, reporter, checkpoints), checkpoint.step)
        progress = restore(run, checkpoint)
        times.append(time.perf_counter())
        try:
            train(run, progress)
        except FirstStepDoneError:
            times.append(time.perf_counter())
    opened, verified, loaded, stepped = (later - earlier for earlier, later in itertools.pairwise(times))
    size = sum(file.stat().st_size for file in checkpoint.folder.iterdir())
    speed = f"{size / MB:.0f} MB at {size / verified / 1e9:.2f} GB/s"
    print(f"  continued: first step done {times[-1] - times[0]:.2f} s after the start, of which")
    print(
        f"    model and data {opened:.2f}, verifying {verified:.2f} ({speed}), loading {loaded:.2f}, step {stepped:.2f}"
    )


def stopping(run: Run, step: int) -> Run:
    """The same run, that ends when the step after `step` updates is done."""

    def batch_at(number: int) -> Batch:
        if number > step:
            raise FirstStepDoneError
        return run.batch_at(number)

    return dataclasses.replace(run, batch_at=batch_at)


if __name__ == "__main__":
    main()
