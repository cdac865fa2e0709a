"""How much each setting matters: fANOVA (Hutter et al. 2014), with its uncertainty over which trials were drawn.

fANOVA fits a forest to the trials and gives each setting the share of the variation that it explains by itself. A
search has few trials, so the shares are uncertain: they are computed for resampled sets of trials (bootstrap), and
given as mean and standard deviation. What a forest predicts for each choice of a setting, over all other settings as
the trials had them, is resampled alike.

- All trials count, by their loss at the first rung, which every trial reached.
- Losses are replaced by their ranks: a few runs at a far too high rate would be most of the variation otherwise.
- A setting that was not drawn in a trial counts as having its first choice, or the lower end of its range.
"""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from relora.experiments.tune.draws import Parameter, plain
from relora.experiments.tune.rungs import Trial, percent
from relora.experiments.tune.spaces import Space
from relora.experiments.tune.storage import import_optuna
from relora.experiments.tune.study import Study
from relora.seeding import keyed_seed

LEAST_TRIALS = 8
"""Trials below which nothing is said."""
SAMPLES = 16
"""Resampled sets of trials."""
TREES = 32

Estimate = tuple[float, float]
"""Mean and standard deviation."""


@dataclass(frozen=True)
class Effects:
    """Findings of the trials about the settings; empty where there are too few of them."""

    importance: dict[str, Estimate] = field(default_factory=dict)
    """Setting -> share of the variation that it explains by itself."""
    by_choice: dict[str, dict[Parameter, Estimate]] = field(default_factory=dict)
    """Setting with choices -> choice -> predicted rank of its trials, from 0 (best) to 1."""


def effects_of(trials: Sequence[Trial], space: Space, study: Study, rungs: Sequence[float]) -> Effects:
    """Estimate the importance of each setting, and the effect of each choice, from the trials of a study."""
    name = percent(rungs[0])
    used = [trial for trial in trials if trial.repeats is None and name in trial.losses]
    ranks = _ranks([trial.losses[name] for trial in used])
    if len(used) < LEAST_TRIALS or len(set(ranks)) < 2:
        return Effects()
    distributions: dict[str, Any] = {}
    for trial in used:
        distributions |= study.distributions(trial.number)
    rows = [_filled(trial.parameters, space, distributions) for trial in used]
    importance: dict[str, list[float]] = {key: [] for key in distributions}
    by_choice: dict[str, dict[Parameter, list[float]]] = {
        key: {one: [] for one in plain(setting.choices)}
        for key, setting in space.settings.items()
        if setting.choices is not None and key in distributions
    }
    for sample in range(SAMPLES):
        draws = random.Random(keyed_seed(0, "bootstrap", sample))
        chosen = [draws.randrange(len(used)) for _ in used]
        some, values = [rows[index] for index in chosen], [ranks[index] for index in chosen]
        if len(set(values)) < 2:
            continue
        for key, share in _fanova(some, values, distributions, sample).items():
            importance[key].append(share)
        for key, found in _by_choice(some, values, by_choice, sample).items():
            for choice, value in found.items():
                by_choice[key][choice].append(value)
    return Effects(
        {key: _estimate(values) for key, values in importance.items() if values},
        {key: {one: _estimate(values) for one, values in found.items() if values} for key, found in by_choice.items()},
    )


def _ranks(losses: Sequence[float]) -> list[float]:
    """Return the rank of each loss, from 0 (lowest) to 1; equal losses have their mean rank."""
    order = sorted(range(len(losses)), key=lambda index: losses[index])
    places: dict[float, list[int]] = {}
    for place, index in enumerate(order):
        places.setdefault(losses[index], []).append(place)
    return [fmean(places[loss]) / max(len(losses) - 1, 1) for loss in losses]


def _filled(parameters: Mapping[str, Any], space: Space, distributions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters with a value for those that it was not given."""
    found = {}
    for key, distribution in distributions.items():
        setting = space.settings[key]
        first = plain(setting.choices)[0] if setting.choices is not None else distribution.low
        found[key] = parameters.get(key, first)
    return found


def _fanova(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float], distributions: Mapping[str, Any], seed: int
) -> dict[str, float]:
    """Return setting -> share of the variation, by optuna's fANOVA."""
    optuna = import_optuna()
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(value=value, params=dict(row), distributions=dict(distributions))
            for row, value in zip(rows, values, strict=True)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    return {key: share if math.isfinite(share) else 0.0 for key, share in found.items()}


def _by_choice(
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    choices: Mapping[str, Mapping[Parameter, Any]],
    seed: int,
) -> dict[str, dict[Parameter, float]]:
    """Return setting -> choice -> rank that a forest predicts for it, as a mean over the trials."""
    from sklearn.ensemble import RandomForestRegressor

    numbers = [key for key in rows[0] if key not in choices]
    flags = [(key, one) for key in rows[0] if key in choices for one in choices[key]]

    def encoded(row: Mapping[str, Any]) -> list[float]:
        return [*(float(row[key]) for key in numbers), *(float(row[key] == one) for key, one in flags)]

    forest = RandomForestRegressor(n_estimators=TREES, random_state=seed, min_samples_leaf=2)
    forest.fit([encoded(row) for row in rows], list(values))
    return {
        key: {one: float(forest.predict([encoded({**row, key: one}) for row in rows]).mean()) for one in found}
        for key, found in choices.items()
        if len(found) > 1
    }


def _estimate(values: Sequence[float]) -> Estimate:
    """Return mean and standard deviation."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
