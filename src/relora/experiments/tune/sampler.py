"""Settings to try next, by optuna's samplers.

A sampler is shown the trials as the search sees them, not as the storage has them: one that waits at a rung, or was
given up there, counts with its loss at that rung; one that failed or diverged counts as worse than any other;
repetitions of a trial with other seeds do not count. The seed of a draw is keyed by the number of trials before it, so
a search with one process draws the same trials again.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from relora.experiments.tune.draws import Draw, OwnValues, Parameter, draw
from relora.experiments.tune.rungs import Trial, is_pending
from relora.experiments.tune.spaces import Config, Space
from relora.experiments.tune.storage import import_optuna
from relora.seeding import keyed_seed

SAMPLERS = ("tpe", "random")
RANDOM_TRIALS = 8
"""Trials before TPE begins to learn from them."""


class _Suggestions:
    """Chooses what a trial of optuna suggests."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def number(self, key: str, low: float, high: float, *, log: bool, whole: bool) -> float:
        """Suggest a number; see `relora.experiments.tune.draws.Chooser`."""
        if whole:
            return int(self._trial.suggest_int(key, int(low), int(high), log=log))
        return float(self._trial.suggest_float(key, low, high, log=log))

    def choice(self, key: str, choices: Sequence[Parameter]) -> Parameter:
        """Suggest one of `choices`."""
        value: Parameter = self._trial.suggest_categorical(key, list(choices))
        return value


def suggest(
    space: Space,
    config: Config,
    trials: Sequence[Trial],
    distributions: Sequence[Mapping[str, Any]],
    rungs: Sequence[float],
    *,
    sampler: str,
    seed: int,
    attempt: int,
) -> tuple[Draw, dict[str, Any]]:
    """Draw the settings of a new trial; the first trial of a study has the configuration's own.

    Args:
        distributions: optuna's distributions of the parameters of each trial.
        attempt: number of draws for this trial before, which could not be used.

    Returns:
        The draw, and optuna's distributions of its parameters.
    """
    optuna = import_optuna()
    key = keyed_seed(seed, "tune", len(trials), attempt) % 2**32
    with _quiet():
        if sampler == "random":
            chosen = optuna.samplers.RandomSampler(seed=key)
        else:
            chosen = optuna.samplers.TPESampler(
                seed=key, multivariate=True, group=True, n_startup_trials=RANDOM_TRIALS, constant_liar=True
            )
        view = optuna.create_study(direction="minimize", sampler=chosen)
        for trial, own in zip(trials, distributions, strict=True):
            if trial.repeats is None:
                view.add_trial(_as_seen(optuna, trial, own, rungs))
        if not trials and not attempt:
            view.enqueue_trial(draw(space, config, OwnValues(config, space)).parameters)
        suggested = view.ask()
        drawn = draw(space, config, _Suggestions(suggested))
        return drawn, dict(suggested.distributions)


def _as_seen(optuna: Any, trial: Trial, distributions: Mapping[str, Any], rungs: Sequence[float]) -> Any:
    """Return a trial as the sampler is to see it."""
    states = optuna.trial.TrialState
    losses = {} if trial.diverged or trial.state == "failed" else trial.losses
    state = states.PRUNED
    if is_pending(trial, rungs) and not losses:
        state = states.RUNNING
    elif trial.state == "complete" and losses:
        state = states.COMPLETE
    return optuna.trial.create_trial(
        state=state,
        value=trial.loss if state == states.COMPLETE else None,
        params=trial.parameters,
        distributions=dict(distributions),
        intermediate_values=dict(losses),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide optuna's notes on arguments that it calls experimental."""
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
