"""Draws of a sampler: the configuration first, the same again for the same trials, and learning from every rung."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.paths import ROOT

from relora.config import load_any_config
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.sampler import RANDOM_TRIALS, suggest
from relora.experiments.tune.spaces import Config, Space, read_space

RUNGS = (0.5, 1.0)
CONFIG = ROOT / "configs/finetune/lora.yaml"
SPACE = {
    "optimizer.lowrank_lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "lowrank.r": [4, 8],
    "lowrank.lora_dropout": {"choices": [0, 0.1], "when": {"lowrank.r": [8]}},
}


@pytest.fixture
def config() -> Config:
    return load_any_config(CONFIG)


@pytest.fixture
def space(config: Config, tmp_path: Path) -> Space:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    return read_space(tmp_path / "space.yaml", config)


def played(space: Space, config: Config, count: int, sampler: str = "tpe", seed: int = 0) -> list[Trial]:
    """Draw trials one after the other; the loss is lowest at a rate of 1e-3, and every third trial ends at a half."""
    trials: list[Trial] = []
    distributions: list[dict[str, Any]] = []
    for number in range(count):
        drawn, own = suggest(space, config, trials, distributions, RUNGS, sampler=sampler, seed=seed, attempt=0)
        rate = drawn.values["optimizer.lowrank_lr"]
        loss = math.inf if rate > 0.05 else abs(math.log10(rate) + 3)
        waits = number % 3 == 0 and math.isfinite(loss)
        losses = {50: loss} if waits or math.isinf(loss) else {50: loss, 100: loss}
        state = "running" if waits else "complete"
        trials.append(Trial(number, state, drawn.parameters, drawn.values, losses, target=0 if waits else 1))
        distributions.append(own)
    return trials


def test_the_first_trial_has_the_values_of_the_configuration(space: Space, config: Config) -> None:
    [first] = played(space, config, 1)
    assert first.values == {"optimizer.lowrank_lr": 3e-3, "lowrank.r": 8, "lowrank.lora_dropout": 0}


def test_draws_follow_from_the_seed_and_the_trials(space: Space, config: Config) -> None:
    once, again, other = (played(space, config, 12, seed=seed) for seed in (0, 0, 1))
    assert once == again != other
    assert len({str(trial.parameters) for trial in once}) == 12


def test_a_setting_is_drawn_only_where_its_condition_holds(space: Space, config: Config) -> None:
    trials = played(space, config, 20, "random")
    assert {trial.values["lowrank.r"] for trial in trials} == {4, 8}
    for trial in trials:
        assert ("lowrank.lora_dropout" in trial.values) == (trial.values["lowrank.r"] == 8)


def test_tpe_learns_from_trials_at_all_rungs(space: Space, config: Config) -> None:
    def distance(sampler: str) -> float:
        """Mean distance in decades from the best rate, of trials after those drawn at random."""
        found = [
            abs(math.log10(trial.values["optimizer.lowrank_lr"]) + 3)
            for seed in range(3)
            for trial in played(space, config, 24, sampler, seed)[RANDOM_TRIALS + 4 :]
        ]
        return sum(found) / len(found)

    assert distance("tpe") < 0.85 * distance("random")


def test_a_draw_that_cannot_be_used_is_drawn_anew(space: Space, config: Config) -> None:
    trials = played(space, config, 3)
    drawn = [suggest(space, config, [], [], RUNGS, sampler="tpe", seed=0, attempt=attempt)[0] for attempt in range(4)]
    assert drawn[0].values == trials[0].values
    assert len({str(one.values) for one in drawn}) == 4
