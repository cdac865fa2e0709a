"""A small world of good files, to be spoilt: a model, a prepared folder, a run, a configuration; and a way to watch."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tests import command

from relora.data.pretraining.prepare import prepare
from relora.data.tokenizer import load_tokenizer
from relora.model import build_model, save_model

TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
HANGS_SECONDS = 60
TEXT = "The sea was calm and the night was long; the captain said nothing and nobody asked.\n\n"


@dataclass(frozen=True)
class World:
    """Good files in a folder of their own, and a place beside it that nothing may reach."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        """`model`, `prepared`, `run`, `sources`, `outside`, `marker`: the folder or file of that name."""
        return self.root / name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        return max((self.run / "checkpoints").iterdir())

    def copy(self, to: Path) -> "World":
        shutil.copytree(self.root, to)
        other = World(to)
        other.write_config()
        return other

    def write_config(self, **model: Any) -> None:
        """A run of three steps on the prepared folder, into `new`; `model`: that section instead of a preset."""
        tree = {
            "output_dir": str(self.root / "new"),
            "device": "cpu",
            "model": model or {"preset": "llama-9m", **TINY},
            "data": {
                "train": str(self.prepared / "train"),
                "validation": str(self.prepared / "validation"),
                "sequence_length": 16,
            },
            "method": "lora",
            "lowrank": {"r": 2},
            "warm_start": {"steps": 1},
            "schedule": {"total_steps": 3, "warmup_steps": 1},
            "batch": {"sequences": 2, "micro_sequences": 2},
            "checkpoint": {"every_steps": 2},
            "evaluate": {"every_steps": 3, "tokens": 32},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"prompts": ["The"], "max_new_tokens": 2},
        }
        self.config.write_text(yaml.safe_dump(tree))

    # what every verb is called with

    def evaluate(self) -> list[str]:
        return ["evaluate", str(self.model), "--data", str(self.prepared / "validation"), "--tokens", "20"]

    def generate(self) -> list[str]:
        return ["generate", str(self.model), "--prompt", "The", "--max-new-tokens", "2"]

    def prepare(self) -> list[str]:
        return ["prepare", str(self.sources), "--out", str(self.root / "out"), "--tokenizer", str(self.model)]

    def pretrain(self) -> list[str]:
        return ["pretrain", str(self.config), "--quiet"]

    def resume(self) -> list[str]:
        return [*self.pretrain(), f"output_dir={self.run}"]

    def check(self) -> list[str]:
        return ["config", str(self.config)]

    def export(self) -> list[str]:
        return ["export", str(self.run), "--out", str(self.root / "exported")]

    def report(self) -> list[str]:
        return ["report", str(self.run)]

    def doctor(self) -> list[str]:
        return ["doctor"]

    def edit(self, file: str, **changes: Any) -> None:
        """Other values in a JSON file."""
        path = self.root / file
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**tree, **changes}))


def build_world(root: Path) -> World:
    """The good files, made by the package itself."""
    world = World(root)
    world.sources.mkdir(parents=True)
    for number in range(30):
        (world.sources / f"{number:02}.txt").write_text(f"Chapter {number}. {TEXT}")
    prepare([str(world.sources)], world.prepared, train_tokenizer=300, validation=0.3, workers=1)
    tokenizer = load_tokenizer(str(world.prepared / "train" / "tokenizer"))
    save_model(build_model("llama-9m", TINY, seed=0, eos_token_id=0), world.model, tokenizer)
    world.write_config()
    ended = call(["pretrain", str(world.config), "--quiet", f"output_dir={world.run}"])
    assert ended.status == 0, ended.err
    world.outside.mkdir()
    (world.outside / "secret.txt").write_text("the reader's own\n")
    return world


class Measured(NamedTuple):
    """How a command ended, and what it took."""

    status: int
    out: str
    err: str
    cpu_seconds: float
    peak_bytes: int
    """Of memory, above what the process had before."""


def call(arguments: list[str]) -> Measured:
    """`relora ARGUMENTS...` in this process; its processor time and the most memory it had at once."""
    before, begin = _memory("VmRSS"), time.process_time()
    previous_handler = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANGS_SECONDS)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    try:
        ended = command.call(*arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous_handler)
    return Measured(*ended, time.process_time() - begin, _memory("VmHWM") - before)


def _hangs(*_: object) -> None:
    raise TimeoutError(f"still not done after {HANGS_SECONDS} s")


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


@dataclass
class Watch:
    """What this process unpickled, started or wrote while it was watched."""

    allowed: Path
    unpickled: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            self.unpickled.append(".".join(map(str, arguments)))
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            self.started.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._note(arguments[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self._note(arguments[0], arguments[-1])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._note(arguments[1], arguments[-1])

    def _note(self, path: Any, folder_descriptor: int = -1) -> None:
        folder = Path() if folder_descriptor < 0 else Path(f"/proc/self/fd/{folder_descriptor}").readlink()
        real = os.path.realpath(folder / os.fsdecode(path))
        if not real.startswith((f"{os.path.realpath(self.allowed)}/", "/dev/null", f"/proc/{os.getpid()}/")):
            self.written.append(real)


_watches: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch.see(event, arguments)


@contextlib.contextmanager
def watched(allowed: Path) -> Iterator[Watch]:
    """Watch this process; writing below `allowed` is in order. (An audit hook stays for good, so there is only one.)"""
    if not getattr(sys, "_relora_watched", False):
        sys.addaudithook(_hook)
        sys._relora_watched = True  # type: ignore[attr-defined]
    watch = Watch(allowed)
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


class Payload:
    """Unpickled, it makes a folder: what a real one would do is anything at all."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker), protocol=2)
