"""Importance with its uncertainty, and what is said about it."""

import math
import random
from pathlib import Path

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from tests.paths import ROOT

from relora.config import load_any_config
from relora.experiments.tune.advice import advice
from relora.experiments.tune.charts import charts
from relora.experiments.tune.importance import Effects, effects_of
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.spaces import Space, read_space
from relora.experiments.tune.study import Study

RUNGS = (0.5, 1.0)
DISTRIBUTIONS = {
    "optimizer.lowrank_lr": FloatDistribution(0.1, 10, log=True),
    "lowrank.r": CategoricalDistribution((2, 4, 8, 16)),
    "lowrank.lora_dropout": CategoricalDistribution((0, 0.1)),
}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    tree = {
        "optimizer.lowrank_lr": {"low": 0.1, "high": 10, "log": True, "of": "optimizer.lowrank_lr"},
        "lowrank.r": [2, 4, 8, 16],
        "lowrank.lora_dropout": [0, 0.1],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_space(tmp_path / "space.yaml", load_any_config(ROOT / "configs/finetune/lora.yaml"))


def filled(folder: Path, count: int, seed: int, rate: float = 3.0, rank: float = 1.0) -> Study:
    """A study in which the rate matters most and is best at the top, and a rank beyond 8 brings nothing."""
    folder.mkdir()
    draws = random.Random(seed)
    study = Study(folder, f"journal:{folder / 'log'}", {"data": {"fingerprint": ""}})
    for number in range(count):
        parameters = {
            "optimizer.lowrank_lr": 10.0 if number == 1 else 10 ** draws.uniform(-1, 1),
            "lowrank.r": draws.choice([2, 4, 8, 16]),
            "lowrank.lora_dropout": draws.choice([0, 0.1]),
        }
        loss = (
            5
            - rate * math.log10(parameters["optimizer.lowrank_lr"])
            - rank * min(math.log2(parameters["lowrank.r"]), 3)
        )
        study.add(Trial(0, "running", parameters, parameters), DISTRIBUTIONS)
        study.report(number, 50, loss, {})
        study.report(number, 100, loss, {})
        study.complete(number, loss)
    return study


@pytest.mark.parametrize("seed", range(3))
def test_what_matters_most_is_first_and_what_does_nothing_last(tmp_path: Path, space: Space, seed: int) -> None:
    study = filled(tmp_path / "study", 24, seed)
    effects = effects_of(study.trials(), space, study, RUNGS)
    rate, rank, dropout = (effects.importance[key] for key in space.settings)
    assert rate[0] > rank[0] > dropout[0]
    assert rate[0] > 0.3 and dropout[0] < 0.1 and 0 < rate[1] < 0.3
    ranks = effects.by_choice["lowrank.r"]
    assert ranks[2][0] > ranks[8][0] and ranks[2][0] > ranks[16][0]


def test_it_is_said_in_words(tmp_path: Path, space: Space) -> None:
    study = filled(tmp_path / "study", 32, 1)
    trials = study.trials()
    effects = effects_of(trials, space, study, RUNGS)
    words = "\n".join(advice(trials, space, effects, RUNGS))
    assert "optimizer.lowrank_lr matters most" in words
    assert "below that of the configuration itself (trial 0)" in words
    assert "lowrank.lora_dropout" in next(line for line in words.splitlines() if line.startswith("No effect"))
    titles = [chart.title for chart in charts(trials, space, effects, RUNGS)]
    assert titles[:3] == ["Held-out loss of each trial", "Settings of each trial", "optimizer.lowrank_lr"]


def test_a_rank_that_brings_nothing_is_named(space: Space) -> None:
    by_choice = {"lowrank.r": {2: (0.9, 0.05), 4: (0.6, 0.05), 8: (0.3, 0.05), 16: (0.29, 0.05)}}
    effects = Effects({"lowrank.r": (0.5, 0.1), "optimizer.lowrank_lr": (0.2, 0.1)}, by_choice)
    trials = [Trial(0, "complete", {"lowrank.r": 8, "optimizer.lowrank_lr": 1.0}, losses={100: 1.0}, target=1)]
    words = advice(trials, space, effects, RUNGS)
    assert "lowrank.r beyond 8 brings nothing here." in words
    assert any("Nothing better than the values of the configuration" in line for line in words)


@pytest.mark.parametrize(("spread", "said"), [(0.05, "matters most"), (0.25, "No setting stands out yet")])
def test_a_share_within_its_uncertainty_is_no_finding(space: Space, spread: float, said: str) -> None:
    effects = Effects({"optimizer.lowrank_lr": (0.3, spread), "lowrank.r": (0.1, 0.1)}, {})
    trials = [Trial(0, "complete", {"lowrank.r": 8, "optimizer.lowrank_lr": 1.0}, losses={100: 1.0}, target=1)]
    assert any(said in line for line in advice(trials, space, effects, RUNGS))


@pytest.mark.parametrize(("multiple", "end"), [(9.9, "upper"), (0.101, "lower"), (1.0, None)])
def test_a_best_value_at_the_end_of_its_range_is_named(space: Space, multiple: float, end: str | None) -> None:
    trials = [
        Trial(0, "complete", {"lowrank.r": 8, "optimizer.lowrank_lr": 1.0}, losses={100: 1.0}, target=1),
        Trial(1, "complete", {"lowrank.r": 8, "optimizer.lowrank_lr": multiple}, losses={100: 0.5}, target=1),
    ]
    said = [line for line in advice(trials, space, Effects(), RUNGS) if "end of its range; widen it" in line]
    assert said == (
        [] if end is None else [f"optimizer.lowrank_lr: the best value lies at the {end} end of its range; widen it."]
    )


def test_too_few_or_equal_trials_say_nothing(tmp_path: Path, space: Space) -> None:
    few = filled(tmp_path / "few", 4, 0)
    assert effects_of(few.trials(), space, few, RUNGS) == Effects()
    assert any("Too few trials" in line for line in advice(few.trials(), space, Effects(), RUNGS))
    equal = filled(tmp_path / "equal", 10, 0, rate=0.0, rank=0.0)
    assert effects_of(equal.trials(), space, equal, RUNGS) == Effects()
