"""Spaces: the built-in ones fit their configurations, draws become configurations, and mistakes are named in a line."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.paths import ROOT

from relora.config import load_any_config
from relora.errors import UserError
from relora.experiments.tune.draws import Base, Draw, OwnValues, Parameter, as_overrides, completed, draw
from relora.experiments.tune.spaces import Config, Space, configured, read_space
from relora.recipes.from_settings import schedule_of

CONFIGS = [
    "configs/small/d64.yaml",
    "configs/finetune/lora.yaml",
    "configs/quickstart.yaml",
    "configs/finetune/qlora.yaml",
]


class Dice:
    """Chooses at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def number(self, key: str, low: float, high: float, *, log: bool, whole: bool) -> float:
        return self.random.randint(int(low), int(high)) if whole else self.random.uniform(low, high)

    def choice(self, key: str, choices: Sequence[Parameter]) -> Parameter:
        return self.random.choice(choices)


def space_of(tree: object, folder: Path, config: Config) -> Space:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_space(file, config)


def rolled(space: Space, config: Config, seed: int = 0) -> Draw:
    return draw(space, config, Dice(seed))


@pytest.mark.parametrize("path", CONFIGS)
def test_the_first_trial_of_a_built_in_space_is_the_configuration_itself(path: str) -> None:
    base = Base(ROOT / path, ())
    config = base.with_values({})
    space = read_space(None, config)
    own = base.with_values(completed(draw(space, config, OwnValues(config, space)).values, config))
    assert own.lowrank_lr == pytest.approx(config.lowrank_lr)
    keys = [key for key in space.settings if key != "lowrank.rank_pattern"]
    for key in keys:
        assert configured(key, own) == pytest.approx(configured(key, config)), key


@pytest.mark.parametrize("path", CONFIGS)
@given(seed=st.integers(0, 10**6))
def test_a_draw_of_a_built_in_space_is_a_configuration(path: str, seed: int) -> None:
    base = Base(ROOT / path, ())
    config = base.with_values({})
    values = completed(rolled(read_space(None, config), config, seed).values, config)
    try:
        drawn = base.with_values(values)
    except UserError as error:
        assert "must be shorter" in str(error) or "no whole rank" in str(error)  # periods and ranks that do not fit
        return
    for key, value in values.items():
        if value is not None:
            assert configured(key, drawn) == pytest.approx(value), key
    if path == "configs/small/d64.yaml":
        schedule_of(drawn)
        assert drawn.total_steps * drawn.batch_tokens == config.total_steps * config.batch_tokens  # type: ignore[union-attr]
        assert drawn.lowrank.lora_alpha / drawn.lowrank.r == config.lowrank.lora_alpha / config.lowrank.r


def test_conditions_and_references_follow_what_was_drawn(tmp_path: Path) -> None:
    config = load_any_config(ROOT / "configs/finetune/lora.yaml")
    tree = {
        "lowrank.r": [4, 16],
        "lowrank.lora_alpha": {"choices": [2], "of": "lowrank.r"},
        "lowrank.rank_pattern": {"choices": [{"q_proj": 0.5}], "of": "lowrank.r", "when": {"lowrank.r": [16]}},
        "lowrank.lora_dropout": {"choices": [0.1], "when": {"method": ["relora"]}},
    }
    space = space_of(tree, tmp_path, config)
    seen = set()
    for seed in range(20):
        values = rolled(space, config, seed).values
        seen.add(values["lowrank.r"])
        assert values["lowrank.lora_alpha"] == 2 * values["lowrank.r"]
        assert values.get("lowrank.rank_pattern") == ({"q_proj": 8} if values["lowrank.r"] == 16 else None)
        assert "lowrank.lora_dropout" not in values  # the configuration's method is lora
    assert seen == {4, 16}


def test_overrides_are_read_back_as_they_were(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "optimizer.lowrank_lr": 1e-5,
        "lowrank.target_modules": r".*\b(attn|mlp)\..*",
        "lowrank.rank_pattern": {r".*\bup: 'x'": 3},
        "lowrank.init": "pissa",
        "lowrank.dora": True,
        "schedule.epochs": None,
    }
    config = load_any_config(ROOT / "configs/finetune/lora.yaml", as_overrides(values))
    for key, value in values.items():
        assert configured(key, config) == (3.0 if key == "schedule.epochs" else value)
    texts = load_any_config(ROOT / "configs/finetune/lora.yaml", as_overrides({"lowrank.target_modules": "*a: [b"}))
    assert texts.lowrank.target_modules == "*a: [b"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, ["empty space"]),
        ([1], ["empty space"]),
        (
            {"optimizer.lowrnk_lr": [1e-3]},
            ["unknown key `optimizer.lowrnk_lr`", "did you mean `optimizer.lowrank_lr`?"],
        ),
        ({"optimizer.lowrank_lr": {"low": 1e-2, "high": 1e-3}}, ["`low` (0.01) must be below `high` (0.001)"]),
        ({"optimizer.lowrank_lr": {"low": 0, "high": 1, "log": True}}, ["above 0"]),
        ({"optimizer.lowrank_lr": {"low": 1}}, ["`high` is missing"]),
        ({"optimizer.lowrank_lr": {}}, ["either `choices`"]),
        ({"optimizer.lowrank_lr": []}, ["choices"]),
        ({"optimizer.lowrank_lr": {"hight": 1, "low": 0}}, ["unknown key `hight`", "`high`"]),
        ({"optimizer.lowrank_lr": 3}, ["optimizer.lowrank_lr"]),
        ({"lowrank.lora_alpha": {"choices": [1], "of": "lowrank.rank"}}, ["unknown key `lowrank.rank`"]),
        ({"lowrank.lora_alpha": {"choices": [1], "of": "lowrank.r"}, "lowrank.r": [1]}, ["must stand above it"]),
        ({"lowrank.lora_alpha": {"choices": ["a"], "of": "lowrank.r"}}, ["multiplies numbers"]),
        ({"lowrank.lora_alpha": {"choices": [1], "of": "lowrank.init"}}, ["no number"]),
        ({"schedule.warmup_steps": {"low": 0.1, "high": 0.2, "of": "steps"}}, ["schedule.total_steps"]),
        ({"output_dir": ["a", "b"]}, ["cannot be searched"]),
        ({"evaluate.tokens": [1, 2]}, ["cannot be searched"]),
    ],
)
def test_a_mistake_in_a_space_is_named(tree: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        space_of(tree, tmp_path, load_any_config(ROOT / "configs/finetune/lora.yaml"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_space_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--space .*none\.yaml: cannot be read: No such file"):
        read_space(tmp_path / "none.yaml", load_any_config(ROOT / "configs/finetune/lora.yaml"))
