"""A search that takes seconds: fine-tuning of a model of two tiny blocks on 24 records."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from relora.data.tokenizer import load_tokenizer
from relora.model.load import build_model
from relora.model.save import save_model

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def base(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and records."""
    folder = tmp_path_factory.mktemp("tune")
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    save_model(build_model("llama-9m", shape, seed=0, eos_token_id=tokenizer.eos_token_id), folder / "base", tokenizer)
    records = [{"prompt": f"Count to {n}.", "response": ", ".join(map(str, range(n % 5)))} for n in range(1, 25)]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """A configuration of eight steps, and beside it space.yaml with three settings."""
    tree = {
        "output_dir": str(tmp_path / "study"),
        "task": "instruct",
        "model": {"path": str(base / "base")},
        "data": {"train": str(base / "records.json"), "validation_share": 0.2, "template": "plain"},
        "lowrank": {"r": 4, "lora_dropout": 0.1},
        "schedule": {"total_steps": 8, "warmup_steps": 0},
        "optimizer": {"lowrank_lr": 2e-3},
        "batch": {"sequences": 4, "micro_sequences": 4},
        "evaluate": {"every_steps": 100},
        "samples": {"examples": 0},
        "log": {"every_steps": 1, "trackers": []},
    }
    space = {
        "optimizer.lowrank_lr": {"low": 0.1, "high": 10, "log": True, "of": "optimizer.lowrank_lr"},
        "lowrank.r": [2, 4, 8],
        "lowrank.lora_alpha": {"choices": [1, 4], "of": "lowrank.r"},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def launch(config: Path) -> Launch:
    """Start `relora tune` on the configuration, with its space, in a process of its own."""

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", "from relora.cli import main; main()", "tune", str(config)]
        command += ["--space", str(config.with_name("space.yaml")), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start
