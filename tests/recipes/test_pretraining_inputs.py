"""What a configuration leaves open is settled by what the machine can do, and stays settled."""

from pathlib import Path

import pytest

from relora.config import RunConfig, parse_config
from relora.lowrank.calibrate import from_json
from relora.lowrank.costs import NOMINAL_RATES, Rates
from relora.recipes.from_settings import frozen_arithmetic, lowrank_of
from relora.recipes.pretrain import pretrain
from relora.recipes.pretraining_inputs import open_configured_model
from relora.train.checkpoint import Checkpoints

FAST_INT8 = Rates(fp32=((8, 2e10), (64, 8e10), (1024, 9e10)), bf16=2e11, int8=4e11, bandwidth=1e10)


def configured(folder: Path, prepared: Path, width: int = 32, **precision: str) -> RunConfig:
    return parse_config(
        {
            "output_dir": str(folder),
            "model": {
                "preset": "llama-9m",
                "vocab_size": 512,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": 1,
            },
            "data": {
                "train": str(prepared / "train"),
                "validation": str(prepared / "validation"),
                "sequence_length": 32,
            },
            "lowrank": {"r": 4},
            "warm_start": {"steps": 1},
            "restart": {"every_steps": 2, "warmup_steps": 1},
            "schedule": {"total_steps": 4, "warmup_steps": 1},
            "batch": {"sequences": 64, "micro_sequences": 64},
            "precision": {"dtype": "fp32", **precision},
            "checkpoint": {"every_steps": 2},
            "evaluate": {"tokens": 64},
            "log": {"trackers": []},
        }
    )


@pytest.mark.parametrize(
    ("precision", "rates", "width", "expected"),
    [
        ({}, FAST_INT8, 1024, "int8"),  # wide layers on a machine with fast int8 products
        ({}, FAST_INT8, 32, "native"),  # quantizing takes longer than the product
        ({}, NOMINAL_RATES, 1024, "native"),  # no int8 products
        ({"frozen": "fp32"}, FAST_INT8, 1024, "native"),
        ({"frozen": "int8"}, NOMINAL_RATES, 32, "int8"),
        ({"frozen": "bf16"}, NOMINAL_RATES, 32, "bf16"),
        ({"dtype": "bf16-mixed"}, FAST_INT8, 1024, "int8"),
    ],
)
def test_frozen_products(
    tmp_path: Path, prepared: Path, precision: dict[str, str], rates: Rates, width: int, expected: str
) -> None:
    config = configured(tmp_path, prepared, width, **precision)
    assert frozen_arithmetic(config, open_configured_model(config), rates) == expected


def test_full_rank_has_no_frozen_product(tmp_path: Path, prepared: Path) -> None:
    config = configured(tmp_path, prepared).model_copy(update={"method": "full"})
    assert frozen_arithmetic(config, open_configured_model(config), FAST_INT8) == "native"
    assert lowrank_of(config).rates is None


def test_a_run_keeps_the_rates_that_it_began_with(tmp_path: Path, prepared: Path) -> None:
    """Another machine, or another measurement of this one, must not change how a run is computed."""
    config = configured(tmp_path / "run", prepared, frozen="int8")
    pretrain(config, quiet=True)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep_last=2) as checkpoints:
        settings = checkpoints.open(2).manifest.settings
    assert settings["frozen"] == "int8"
    assert from_json(str(settings["rates"])) is not None
