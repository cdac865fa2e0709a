"""A run of ten steps on a small network that records what it does, and in which order."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.train.small import SETTINGS, Net, Sequences, batch, loss
from torch import nn

from relora.lowrank import low_rank_layers
from relora.measure import Evaluation, evaluating
from relora.report.console import Console
from relora.report.metrics import read_json_lines
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.run import Progress, Run, restore
from relora.train.schedule import Schedule

TEN_STEPS = {"total_steps": 10, "warm_start_steps": 3, "restart_every_steps": 3, "restart_warmup_steps": 1}
"""Full rank before step 3, restarts before steps 6 and 9; the first step of a cycle has learning rate 0."""


def rank_state(model: nn.Module) -> str:
    """`full` without factors, `fresh` with factors whose product is zero, `moved` with others."""
    layers = low_rank_layers(model).values()
    if not layers:
        return "full"
    return "moved" if any(layer.delta().any() for layer in layers) else "fresh"


class Stage:
    """A run in a folder with a list of its events: ("batch", step, rank state) and ("evaluate", rank state)."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.events: list[tuple[object, ...]] = []
        folder.mkdir(exist_ok=True)
        self.folder, self.model = folder, Net()
        self.reporter = Reporter(folder, 10, [], Console(quiet=True))
        settings = SETTINGS | {
            "model": self.model,
            "schedule": Schedule(**TEN_STEPS),
            "batch_at": self.batch_at,
            "loss": loss,
            "evaluate": self.evaluate,
            "reporter": self.reporter,
            "checkpoints": Checkpoints(folder / "checkpoints"),
        }
        self.run = Run(**(settings | changes))
        self.progress: Progress | None = None

    def batch_at(self, step: int) -> Sequences:
        self.events.append(("batch", step, rank_state(self.model)))
        return batch(step)

    def evaluate(self, model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        each_batch()
        self.events.append(("evaluate", rank_state(model)))
        with evaluating(model):
            summed, tokens = loss(model, *batch(-1))
        return Evaluation.of(summed.item(), int(tokens), None)

    def play(self) -> "Stage":
        try:
            self.progress = restore(self.run, self.run.checkpoints.latest()[0])
            train(self.run, self.progress)
        finally:
            self.run.checkpoints.__exit__(None, None, None)
            self.reporter.close()
        return self

    def until(self, step: int, act: Callable[[], object]) -> "Stage":
        """Call `act` when the run requests the batch of `step`."""

        def batch_at(t: int) -> Sequences:
            if t == step:
                act()
            return self.batch_at(t)

        self.run = dataclasses.replace(self.run, batch_at=batch_at)
        return self

    def lines(self, file: str = "metrics.jsonl", kind: str | None = None) -> list[dict[str, object]]:
        return [line for line in read_json_lines(self.folder / file) if kind in (None, line.get("kind"))]


class Killed(Exception):
    """Stands for SIGKILL: the package never catches it."""


def kill() -> None:
    raise Killed
