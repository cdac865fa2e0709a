"""Findings of a search in words: which settings matter, which choices bring nothing, where to look further."""

import math
from collections.abc import Sequence
from typing import Any

from relora.experiments.tune.importance import LEAST_TRIALS, Effects
from relora.experiments.tune.rungs import Trial, percent
from relora.experiments.tune.spaces import Setting, Space
from relora.experiments.tune.standing import best_trials

WORTH_NAMING = 0.1
"""Share of the variation from which a setting is named as one that matters."""
NEAR_END = 0.05
"""Share of a range within which a value counts as lying at its end."""


def advice(trials: Sequence[Trial], space: Space, effects: Effects, rungs: Sequence[float]) -> list[str]:
    """Return sentences for a person, the most important first."""
    own = [trial for trial in trials if trial.repeats is None]
    best = best_trials(trials)[0]
    lines = [*_gain(own, best), *_importance(own, effects)]
    for key, setting in space.settings.items():
        lines += _plateau(key, setting, effects)
        lines += _edge(key, setting, best)
    return [*lines, *_divergence(own)]


def _gain(own: Sequence[Trial], best: Trial) -> list[str]:
    """Compare the best trial with the first one, which has the configuration's own values, where both were measured."""
    first = min(own, key=lambda trial: trial.number)
    common = first.losses.keys() & best.losses.keys()
    if not common or first.diverged:
        return []
    at = max(common)
    if first.number == best.number:
        return [f"Nothing better than the values of the configuration itself was found (trial {best.number})."]
    change = 100 * (math.exp(best.losses[at] - first.losses[at]) - 1)
    return [
        f"Trial {best.number} is the best: at {at}% of the run its held-out perplexity is {abs(change):.1f}% "
        f"{'below' if change < 0 else 'above'} that of the configuration itself (trial {first.number})."
    ]


def _importance(own: Sequence[Trial], effects: Effects) -> list[str]:
    """Name the setting that matters most, the others that matter, and those without a visible effect."""
    if not effects.importance:
        return [f"Too few trials to say which setting matters: {len(own)}, and {LEAST_TRIALS} are needed."]
    ranked = sorted(effects.importance.items(), key=lambda item: -item[1][0])
    (first, (share, spread)), others = ranked[0], ranked[1:]
    lines = [f"{first} matters most: {_share(share, spread)} of the variation between trials."]
    if share - spread < WORTH_NAMING:
        lines = [f"No setting stands out yet; {first} comes first, with {_share(share, spread)} of the variation."]
    if second := [f"{key} ({_share(*one)})" for key, one in others if one[0] >= WORTH_NAMING]:
        lines.append(f"Then {', '.join(second)}.")
    if idle := [key for key, (mean, deviation) in others if mean < WORTH_NAMING and mean - deviation <= 0.02]:
        lines.append(f"No effect is seen of {', '.join(idle)}.")
    return lines


def _plateau(key: str, setting: Setting, effects: Effects) -> list[str]:
    """Name the choice of a number beyond which larger ones bring nothing, or of another setting the better one."""
    found = effects.by_choice.get(key, {})
    numbers = sorted(one for one in found if isinstance(one, int | float) and not isinstance(one, bool))
    if effects.importance.get(key, (0.0, 0.0))[0] < 0.02 or len(found) < 2:
        return []
    if len(numbers) == len(found):
        for index, value in enumerate(numbers[:-1]):
            mean, spread = found[value]
            if all(found[more][0] >= mean - spread for more in numbers[index + 1 :]):
                unit = "" if setting.of is None else f" times {'that configured' if setting.of == key else setting.of}"
                return [f"{key} beyond {value:g}{unit} brings nothing here."]
        return [f"{key} helps up to its largest choice, {numbers[-1]:g}; larger ones may help more."]
    best, worst = min(found, key=lambda one: found[one][0]), max(found, key=lambda one: found[one][0])
    if found[worst][0] - found[best][0] > found[best][1] + found[worst][1]:
        return [f"{key}: {best} is better than {worst}."]
    return []


def _edge(key: str, setting: Setting, best: Trial) -> list[str]:
    """Say that the best value lies at an end of its range, so a better one may lie beyond it."""
    value: Any = best.parameters.get(key)
    if setting.low is None or setting.high is None or not isinstance(value, int | float):
        return []
    scale = math.log if setting.log else float
    place = (scale(value) - scale(setting.low)) / (scale(setting.high) - scale(setting.low))
    if NEAR_END < place < 1 - NEAR_END:
        return []
    return [f"{key}: the best value lies at the {'upper' if place > 0.5 else 'lower'} end of its range; widen it."]


def _divergence(own: Sequence[Trial]) -> list[str]:
    """Say how many trials diverged or failed."""
    lines = []
    if diverged := sum(trial.diverged for trial in own):
        lines.append(f"{diverged} of {len(own)} trials diverged; they count as bad values.")
    if failed := [trial for trial in own if trial.state == "failed"]:
        lines.append(f"{len(failed)} of {len(own)} trials failed, the last one: {failed[-1].reason}")
    return lines


def _share(mean: float, spread: float) -> str:
    """Format a share with its uncertainty."""
    return f"{percent(mean)} ± {percent(spread)}%"
