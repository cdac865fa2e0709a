"""Sides side by side: each in a process of its own, one step here, one step there, the others asleep meanwhile."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sides.shape import CPU, Place, Shape, fits

WARMUP = 2
"""Steps before the ones that count: the first makes the optimizer's moments."""
SIDES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("sides.llama", "full", {}),
    "peft": ("sides.llama", "peft", {}),
    "plain": ("sides.llama", "plain", {}),
    "litgpt": ("sides.litgpt_side", "litgpt", {}),
    "ours": ("sides.llama", "ours", {}),
    "ours-bf16": ("sides.llama", "ours", {"frozen": "bf16"}),
    "ours-int8": ("sides.llama", "ours", {"frozen": "int8"}),
    "ours-selective": ("sides.llama", "ours", {"checkpointing": "selective"}),
    "ours-int8-selective": ("sides.llama", "ours", {"frozen": "int8", "checkpointing": "selective"}),
    "ours-compiled": ("sides.llama", "ours", {"compiled": True}),
    "ours-int8-compiled": ("sides.llama", "ours", {"frozen": "int8", "compiled": True}),
    "ours-int8-stored": ("sides.llama", "ours", {"frozen": "int8", "base": "int8"}),
    "ours-residual": ("sides.llama", "ours", {"residual": {"scale": 1.0}}),
    "ours-int8-residual": ("sides.llama", "ours", {"frozen": "int8", "residual": {"scale": 1.0}}),
    "ours-residual-4": ("sides.llama", "ours", {"residual": {"scale": 1.0, "every_steps": 4}}),
}
"""Name -> module, function, and what it is told."""
LITGPT_PYTHON = ".venv-litgpt/bin/python"
"""LitGPT wants an older huggingface-hub than transformers 5 does, so it has an environment of its own."""
EXACT = ("peft", "plain", "litgpt", "ours", "ours-selective", "ours-compiled")
"""Low-rank sides that compute the same in fp32."""


class UnavailableError(Exception):
    """A side that cannot be imported here."""


@dataclass(frozen=True)
class Setting:
    """What all sides of a comparison train, and how."""

    shape: Shape
    rank: int
    tokens: int
    threads: int
    place: Place = CPU
    litgpt: str = LITGPT_PYTHON
    """The interpreter that can import it."""


@dataclass
class Worker:
    """A side's process, started when it is first asked, and again after `stop`."""

    name: str
    setting: Setting
    losses: list[float] = field(default_factory=list)
    """Of every step of the process that was started last."""
    peak_bytes: int = 0
    """The largest resident set of any of its processes that was stopped."""
    process: "subprocess.Popen[str] | None" = None

    def start(self) -> None:
        module, function, options = SIDES[self.name]
        order = asdict(self.setting) | {"module": module, "function": function, "options": options}
        python = self.setting.litgpt if self.name == "litgpt" else sys.executable
        if not Path(python).exists():
            raise UnavailableError(f"{self.name} is left out: there is no {python}")
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.setting.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [python, "-m", "sides.worker", json.dumps(order)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if "unavailable" in (answer := self._answer()):
            self.stop()
            raise UnavailableError(f"{self.name} is left out: {answer['unavailable']}")
        self.losses = []
        for _ in range(WARMUP):
            self.step()

    def ask(self, command: str) -> dict[str, Any]:
        """One command of `sides.worker` and its answer."""
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def step(self) -> float:
        """Seconds of one whole step."""
        answer = self.ask("step")
        self.losses.append(answer["loss"])
        seconds: float = answer["seconds"]
        return seconds

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.peak_bytes = max(self.peak_bytes, self.ask("peak")["bytes"])
        self.process.communicate()
        self.process = None

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class SideBySide:
    """Workers by name. Those that do not fit into the memory together are started anew for every step that counts."""

    workers: dict[str, Worker]
    together: bool

    def step_seconds(self, rounds: int) -> dict[str, list[float]]:
        """In each round one whole step of every side, beginning with another side each time."""
        seconds: dict[str, list[float]] = {name: [] for name in self.workers}
        names = list(self.workers)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(self.workers[name].step())
                if not self.together:
                    self.workers[name].stop()
        self.check_losses()
        return seconds

    def check_losses(self) -> None:
        """The sides compute the same: all of them before the first update, and low rank in fp32 after it as well."""
        rounded = any(worker.setting.place.bf16 for worker in self.workers.values())
        losses = {name: worker.losses for name, worker in self.workers.items()}
        reference = next(iter(losses.values()))[0]
        for name, (first, *_) in losses.items():
            tolerance = 1e-5 if name in ("full", *EXACT) and not rounded else 1e-2
            if abs(first / reference - 1) > tolerance:
                sys.exit(f"{name} begins with the loss {first}, others with {reference}: they are not the same model")
        exact = {name: losses[name] for name in EXACT if name in losses and not rounded}
        for name, values in exact.items():
            for value, other in zip(values, next(iter(exact.values())), strict=False):
                if abs(value / other - 1) > 1e-4:
                    sys.exit(f"{name} goes through the losses {values}, others {exact}: it does not train the same")


@contextmanager
def side_by_side(names: list[str], setting: Setting) -> Iterator[SideBySide]:
    """The sides that can be had here, all warm; stopped in the end."""
    shape, tokens = setting.shape, setting.tokens  # all are there, and one of them is in its step
    needed = sum(shape.resident_bytes(name, tokens) for name in names) + shape.logit_bytes(tokens)
    sides = SideBySide({}, fits(needed))
    try:
        for name in names:
            sides.workers[name] = worker = Worker(name, setting)
            try:
                worker.start()
            except UnavailableError as error:
                print(error, file=sys.stderr)
                del sides.workers[name]
            if not sides.together:
                worker.stop()
        yield sides
    finally:
        for worker in sides.workers.values():
            worker.stop()
