"""Models that train on some lengths alone, as Reformer on multiples of its chunks, get these or are refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.command import call
from tests.zoo.stages import Bench
from tests.zoo.tiny_models import make_tiny_model

CHUNK = 16
"""Length of the chunks of the tiny Reformer."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(make_tiny_model("reformer", tmp_path / "model"), tmp_path / "work")


def with_length(file: Path, length: int) -> Path:
    tree: dict[str, Any] = yaml.safe_load(file.read_text())
    tree["data"]["sequence_length"] = length
    file.write_text(yaml.safe_dump(tree))
    return file


def test_pretraining_on_a_length_that_the_model_does_not_take_is_refused(bench: Bench) -> None:
    ended = call("pretrain", with_length(bench.config, CHUNK + CHUNK // 2))
    assert ended.complaint(2, "data.sequence_length: a reformer model does not train on 24 positions: ") is None
    assert not bench.run.exists()


def test_rows_of_examples_are_padded_to_what_the_model_takes(bench: Bench) -> None:
    """The examples are of different lengths, most no multiple of the chunks."""
    assert call("finetune", bench.finetune_config, "--quiet").complaint(0) is None
    assert (bench.tuned / "adapter").is_dir()


def test_fine_tuning_on_rows_cut_to_another_length_is_refused(bench: Bench) -> None:
    ended = call("finetune", with_length(bench.finetune_config, 3 * CHUNK - 4))
    assert ended.complaint(2, "data.sequence_length (44) must be a multiple of 16 for a reformer model") is None
    assert not bench.tuned.exists()
