"""Commands as users give them, and checks of how they end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.command import Ended, call

NO_HUB = "no/such/place"
"""Neither a folder nor a valid hub id, so that the hub is not asked."""


def done(*arguments: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    ended = call(*arguments)
    assert ended.status == 0, ended.err
    return ended.out


def assert_refused(ended: Ended, *words: str) -> None:
    """Check for status 2 and nothing but one line on stderr, which has all of `words`."""
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("relora: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err, ended.err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the modification time of all that is in a folder, by path."""
    return {
        str(path): (path.read_bytes() if path.is_file() and not path.is_symlink() else b"", path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def settings(prepared: Path, output_dir: Path) -> dict[str, object]:
    """Return the settings of eight steps: two of warm start, then restarts before steps 4 and 6."""
    return {
        "output_dir": str(output_dir),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "train": str(prepared / "train"),
            "validation": str(prepared / "validation"),
            "sequence_length": 16,
        },
        "lowrank": {"r": 4, "lora_alpha": 4},
        "warm_start": {"steps": 2},
        "restart": {"every_steps": 2, "warmup_steps": 1},
        "schedule": {"total_steps": 8, "warmup_steps": 1},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 4, "tokens": 200},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 4},
    }


LONG_PHASES = ["restart.every_steps=20", "checkpoint.every_steps=10", "evaluate.every_steps=50"]
"""Overrides for runs of many steps, most of which do nothing but train."""


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `relora pretrain` in a process of its own."""
    script = "from relora.cli import main; main()"
    command = [sys.executable, "-c", script, "pretrain", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never logged")
