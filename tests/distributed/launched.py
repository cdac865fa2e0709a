"""Real processes under torchrun: a tiny run of 30 steps, with a warm start and two restarts, on any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from relora.train.checkpoint import Checkpoints

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
STEPS = 30


def settings(prepared: Path, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run with a warm start of 8 steps and restarts before steps 17 and 26; sections are merged into it."""
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
        "data": {
            "train": str(prepared / "train"),
            "validation": str(prepared / "validation"),
            "sequence_length": 16,
        },
        "lowrank": {"r": 4, "lora_alpha": 4},
        "warm_start": {"steps": 8},
        "restart": {"every_steps": 9, "warmup_steps": 1},
        "schedule": {"total_steps": STEPS, "warmup_steps": 2},
        "optimizer": {"lr": 5e-3},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"every_steps": 10},
        "evaluate": {"every_steps": 15, "tokens": 300},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 4},
        "distributed": {"timeout_seconds": 20},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(tree.get(name), dict) else section
    return tree


def torchrun(ranks: int, *arguments: object, restarts: int = 0, **variables: str) -> "subprocess.Popen[str]":
    """Start `torchrun` on this machine with one thread a rank; `arguments` are a script or `-m relora ...`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def play(
    ranks: int, scenes: list[dict[str, Any]], place: Path, worker: Path = WORKER
) -> dict[str, list[dict[str, Any]]]:
    """Let `ranks` processes play scenes one after the other (see `worker`); what each rank met, by the scene's name."""
    place.mkdir(parents=True)
    (place / "scenes.json").write_text(json.dumps(scenes))
    process = torchrun(ranks, worker, place)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return {
        scene["name"]: [json.loads((place / f"{scene['name']}-{rank}.json").read_text()) for rank in range(ranks)]
        for scene in scenes
    }


def tensors_of(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    checkpoint, broken = Checkpoints(folder / "checkpoints").latest()
    assert checkpoint is not None and not broken
    assert checkpoint.step == steps
    return {**checkpoint.weights(), **checkpoint.optimizer()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of any entry of two runs' weights, without their moments."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if ":" not in name)


def written(tree: dict[str, Any], path: Path) -> Path:
    """Write a configuration as YAML."""
    path.write_text(yaml.safe_dump(tree))
    return path
