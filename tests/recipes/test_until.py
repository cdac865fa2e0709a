"""Runs that stop at a step of their schedule and go on later: the same bits and figures as a run that went through."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.command import call

from relora.config import RunConfig, load_config
from relora.recipes.pretrain import pretrain
from relora.report.metrics import read_json_lines

TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}


@pytest.fixture
def path(prepared: Path, tmp_path: Path) -> Path:
    """A run of 12 steps: warm start of 3, restarts before steps 6 and 9, dropout, a checkpoint every 5 steps."""
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
        },
        "data": {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 16},
        "lowrank": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.1},
        "warm_start": {"steps": 3},
        "restart": {"every_steps": 3, "warmup_steps": 1},
        "schedule": {"total_steps": 12, "warmup_steps": 2},
        "batch": {"sequences": 4, "micro_sequences": 4},
        "checkpoint": {"every_steps": 5},
        "evaluate": {"every_steps": 5, "tokens": 300},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 2},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def figures(config: RunConfig, file: str) -> list[dict[str, Any]]:
    lines = read_json_lines(Path(config.output_dir) / file)
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def last_weights(config: RunConfig) -> dict[str, bytes]:
    newest = max((Path(config.output_dir) / "checkpoints").glob("step-*"))
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


@pytest.mark.parametrize("stops", [(1,), (3, 3, 6), (2, 5, 7, 9, 11, 12)])
def test_a_run_that_stopped_on_its_way_ends_in_the_same_bits(
    path: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    through = load_config(path, [f"output_dir={tmp_path / 'through'}"])
    whole = pretrain(through, quiet=True)
    config = load_config(path)
    for step in stops:
        part = pretrain(config, until=step, quiet=True)
        assert part.steps == step
        assert (Path(config.output_dir) / "model").is_dir() == (step == 12)
        measured = [
            line["validation_loss"]
            for line in figures(config, "metrics.jsonl")
            if line["step"] == step and line["kind"] == "evaluation"
        ]
        assert part.evaluation.loss in measured if step < 12 else part.evaluation.loss == whole.evaluation.loss
    ended = pretrain(config, quiet=True)
    assert ended.evaluation == whole.evaluation
    assert last_weights(config) == last_weights(through)
    for file in ("metrics.jsonl", "restarts.jsonl"):
        assert figures(config, file) == figures(through, file)


def test_the_schedule_of_a_part_is_that_of_the_whole_run(path: Path, tmp_path: Path) -> None:
    part = load_config(path, [f"output_dir={tmp_path / 'part'}"])
    short = load_config(path, [f"output_dir={tmp_path / 'short'}", "schedule.total_steps=6"])
    whole = load_config(path, [f"output_dir={tmp_path / 'whole'}"])
    pretrain(part, until=6, quiet=True)
    pretrain(short, quiet=True)
    pretrain(whole, quiet=True)
    rates = {
        name: [line["lr"] for line in figures(config, "metrics.jsonl") if line["kind"] == "train"][:6]
        for name, config in (("part", part), ("short", short), ("whole", whole))
    }
    assert rates["part"] == rates["whole"] != rates["short"]


@pytest.mark.parametrize("step", ["0", "13", "-1"])
def test_a_step_that_is_not_there_is_refused_before_anything_is_written(path: Path, tmp_path: Path, step: str) -> None:
    assert not (complaint := call("pretrain", path, "--until", step).complaint(2, "--until", "12 steps")), complaint
    assert not (tmp_path / "run").exists()


def test_a_step_that_has_passed_is_refused(path: Path) -> None:
    assert call("pretrain", path, "--until", "5", "--quiet").status == 0
    assert not (complaint := call("pretrain", path, "--until", "4").complaint(2, "5 are done")), complaint
