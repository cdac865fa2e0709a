"""Defaults that a variant gives to keys that are not given."""

from typing import Any

import pytest

from relora.config import RunConfig
from relora.config.reading import parse_config
from relora.errors import UserError

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"preset": "llama-9m"},
    "data": {"train": "train", "validation": "validation"},
    "schedule": {"total_steps": 9000},
}


def settled(config: RunConfig) -> dict[str, object]:
    """Return the keys that a variant decides on."""
    restart = config.restart
    return {
        "factors": config.optimizer.factors,
        "takeover": config.warm_start.takeover,
        "restart": (restart.every_steps, restart.init, restart.optimizer, restart.warmup_steps, restart.retain),
    }


RENEWING = {"factors": "muon", "takeover": True, "restart": (20, "balanced", "project", 0, 0.75)}
BALANCED = {"factors": "adamw", "takeover": False, "restart": (1000, "balanced", "keep", 0, 0.0)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RENEWING),
        ({"warm_start": "auto"}, RENEWING),
        ({"warm_start": {"steps": 0}}, RENEWING | {"takeover": False}),
        ({"warm_start": {"takeover": False}}, RENEWING | {"takeover": False}),
        ({"restart": {"every_steps": 50}}, RENEWING | {"restart": (50, "balanced", "project", 0, 0.75)}),
        ({"restart": {"stagger": "layers"}}, RENEWING),
        # where one part is ruled out, the restarts are those that go with the rest
        ({"optimizer": {"factors": "adamw"}}, BALANCED),
        ({"optimizer": {"name": "adamw-8bit"}}, BALANCED),
        ({"lowrank": {"residual": {"scale": 1.0}}}, BALANCED),
        (
            {"restart": {"init": "orthogonal"}},
            BALANCED | {"restart": (1000, "orthogonal", "keep", 0, 0.0)},
        ),
        ({"restart": {"retain": 0}}, BALANCED),
        ({"restart": {"adaptive": True}}, BALANCED),
        ({"restart": {"stagger": "ranks"}}, BALANCED),
        ({"lowrank": {"r": 1}}, BALANCED),
        ({"restart": {"optimizer": "zero"}}, BALANCED | {"restart": (1000, "balanced", "zero", 0, 0.0)}),
        # other methods
        ({"variant": "paper"}, {"factors": "adamw", "takeover": False, "restart": (1000, "kaiming", "zero", 50, 0.0)}),
        ({"method": "lora"}, {"factors": "muon", "takeover": False, "restart": (1000, "kaiming", "zero", 50, 0.0)}),
        ({"method": "full"}, {"factors": "adamw", "takeover": False, "restart": (1000, "kaiming", "zero", 50, 0.0)}),
    ],
)
def test_keys_that_are_not_given(changes: dict[str, Any], expected: dict[str, object]) -> None:
    assert settled(parse_config(MINIMAL | changes)) == expected


@pytest.mark.parametrize("section", ["restart", "optimizer", "warm_start", "lowrank"])
def test_a_section_that_is_none_is_named(section: str) -> None:
    with pytest.raises(UserError, match=section):
        parse_config(MINIMAL | {section: 3})
