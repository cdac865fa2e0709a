"""Configurations, a finished run and prepared folders for the tests of the command line."""

import json
from pathlib import Path

import pytest
import yaml
from tests.cli.terminal import done, settings


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    """A configuration whose run folder is `tmp_path / "run"`."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(prepared, tmp_path / "run")))
    return path


@pytest.fixture(scope="session")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that has ended; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(prepared, folder / "run")))
    assert "held-out perplexity" in done("pretrain", folder / "config.yaml")
    return folder / "run"


@pytest.fixture
def finetuning_config(finished: Path, tmp_path: Path) -> Path:
    """A configuration that fine-tunes the finished run on four records."""
    records = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {
        "task": "instruct",
        "output_dir": str(tmp_path / "tuned"),
        "model": {"path": str(finished)},
        "data": {"train": str(tmp_path / "records.jsonl"), "sequence_length": 64, "validation_share": 0.4},
        "schedule": {"total_steps": 2},
        "batch": {"sequences": 2, "micro_sequences": 1},
    }
    (tmp_path / "finetuning.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "finetuning.yaml"


@pytest.fixture(scope="session")
def other_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders with another tokenizer than that of `prepared`."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"{name}: the cat sat on the mat, and so did the other cat. " * 20)
    done("prepare", folder, "--out", folder / "out", "--train-tokenizer", 280, "--validation", "50%")
    return folder / "out"
