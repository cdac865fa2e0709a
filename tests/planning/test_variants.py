"""Settings that a plan may change, and the configurations that they give."""

from relora.config import RunConfig, parse_config
from relora.planning.variants import BASES, bases_for, halved_ranks, with_changes


def configuration(**lowrank: object) -> RunConfig:
    return parse_config(
        {
            "output_dir": "none",
            "model": {"preset": "llama-9m"},
            "data": {"train": "none", "validation": "none"},
            "lowrank": lowrank,
            "schedule": {"total_steps": 4000},
        }
    )


def test_ranks_are_halved_down_to_eight() -> None:
    assert halved_ranks(64) == (64, 32, 16, 8)
    assert halved_ranks(50) == (50, 25, 12)
    assert halved_ranks(4) == (4,)


def test_weights_that_move_in_every_step_are_stored_exactly() -> None:
    assert bases_for(configuration(r=8)) == BASES
    assert bases_for(configuration(r=8, residual={"scale": 1.0})) == ("fp32",)


def test_changes_keep_the_other_keys_of_a_section() -> None:
    config = configuration(r=8, lora_alpha=4)
    changed = with_changes(config, {"lowrank": {"r": 16}, "method": "lora"})
    assert (changed.method, changed.lowrank.r, changed.lowrank.lora_alpha) == ("lora", 16, 4)
    assert (config.method, config.lowrank.r) == ("relora", 8)
