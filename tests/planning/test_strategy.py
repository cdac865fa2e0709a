"""Choice of a strategy: the model stays whole where its predicted peak fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from relora.config import RunConfig, parse_config
from relora.distributed.group import ALONE
from relora.planning.strategy import fits_whole, settled_strategy

CPU = torch.device("cpu")


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"preset": "llama-9m", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64},
        "data": {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 16},
        "lowrank": {"r": 4},
        "warm_start": {"steps": 2},
        "restart": {"every_steps": 4, "warmup_steps": 1},
        "schedule": {"total_steps": 8, "warmup_steps": 1},
        "batch": {"sequences": 4, "micro_sequences": 2},
    }
    return parse_config(tree)


def test_it_is_the_limit_that_decides(config: RunConfig) -> None:
    assert fits_whole(config, CPU, world=2, limit=2**50)
    assert not fits_whole(config, CPU, world=2, limit=2**20)


def test_alone_nothing_is_chosen(config: RunConfig) -> None:
    assert settled_strategy(config, ALONE) is config
