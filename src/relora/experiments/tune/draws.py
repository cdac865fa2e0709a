"""One draw from a space: what was chosen for each setting, and the configuration that it makes.

A draw is kept as what was chosen (`parameters`, which optuna learns from) and as what that means (`values`: key of the
configuration -> value). The values are written as overrides, as a person would type them after the configuration, so
that what a configuration leaves to the defaults follows what is drawn.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from relora.config import FinetuneConfig, RunConfig, load_any_config
from relora.errors import UserError
from relora.experiments.tune.spaces import Config, Setting, Space, configured, is_whole, reference
from relora.files.untrusted import parse_yaml

Parameter = float | int | str | bool | None


class Chooser(Protocol):
    """Chooses a value for one setting after the other."""

    def number(self, key: str, low: float, high: float, *, log: bool, whole: bool) -> float:
        """Choose a number from `low` to `high`."""

    def choice(self, key: str, choices: Sequence[Parameter]) -> Parameter:
        """Choose one of `choices`."""


@dataclass(frozen=True)
class Base:
    """The configuration that a search starts from, as a person gives it."""

    path: Path
    overrides: tuple[str, ...]

    def with_values(self, values: Mapping[str, Any], *further: str) -> Config:
        """Return the configuration with drawn values, and further overrides.

        Raises:
            UserError: the values do not go together.
        """
        return load_any_config(self.path, [*self.overrides, *as_overrides(values), *further])


@dataclass
class Draw:
    """Settings that were drawn."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    """Key -> what was chosen; choices that are no plain values are JSON."""
    values: dict[str, Any] = field(default_factory=dict)
    """Key of the configuration -> value."""


def draw(space: Space, config: Config, chooser: Chooser) -> Draw:
    """Draw every setting of a space for which its conditions hold.

    Raises:
        UserError: a setting refers to a number that the configuration does not have.
    """
    drawn = Draw()
    for key, setting in space.settings.items():
        if not _holds(setting.when, config, drawn.values):
            continue
        whole = is_whole(key, type(config))
        if setting.choices is not None:
            choices = plain(setting.choices)
            chosen = chooser.choice(key, choices)
            value = setting.choices[choices.index(chosen)]
        else:
            assert setting.low is not None and setting.high is not None
            only_whole = whole and setting.of is None
            value = chosen = chooser.number(key, setting.low, setting.high, log=setting.log, whole=only_whole)
        if setting.of is not None:
            value = _scaled(value, reference(setting.of, config, drawn.values), whole)
        drawn.parameters[key], drawn.values[key] = chosen, value
    return drawn


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Write values as `key=value`, as they are typed after a configuration."""
    return [f"{key}={_written(value)}" for key, value in values.items()]


def completed(values: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return drawn values with those of other keys that have to follow them.

    A rank keeps the scale of the update, a batch the tokens of the run and micro-batches that divide it.
    """
    found, lowrank = dict(values), config.lowrank
    if "lowrank.r" in found and "lowrank.lora_alpha" not in found:
        ratio = found["lowrank.r"] / lowrank.r
        found["lowrank.lora_alpha"] = lowrank.lora_alpha * (math.sqrt(ratio) if lowrank.rslora else ratio)
    if "batch.sequences" in found and "batch.micro_sequences" not in found:
        found["batch.micro_sequences"] = math.gcd(found["batch.sequences"], config.batch.micro_sequences)
    lengths = {"schedule.total_steps", "schedule.total_tokens"} & found.keys()
    if "batch.sequences" in found and isinstance(config, RunConfig) and not lengths:
        found["schedule.total_steps"] = None
        found["schedule.total_tokens"] = config.schedule.total_tokens or config.total_steps * config.batch_tokens
    return found


class OwnValues:
    """Chooses what the configuration itself has, or what is nearest to it in the space.

    Args:
        config: the configuration.
        space: the space that is drawn from.
    """

    def __init__(self, config: Config, space: Space) -> None:
        self._config, self._space = config, space

    def number(self, key: str, low: float, high: float, *, log: bool, whole: bool) -> float:
        """Choose the configured number, or the end of the range that is nearer to it."""
        own = self._own(key, self._space.settings[key])
        return low if own is None else min(max(int(own) if whole else float(own), low), high)

    def choice(self, key: str, choices: Sequence[Parameter]) -> Parameter:
        """Choose the configured value; of numbers the nearest, and the first where it is not among them."""
        setting = self._space.settings[key]
        own, given = self._own(key, setting), list(setting.choices or ())
        if own in given:
            return choices[given.index(own)]
        if isinstance(own, int | float) and all(isinstance(one, int | float) for one in given):
            return choices[min(range(len(given)), key=lambda index: abs(given[index] - own))]
        return choices[0]

    def _own(self, key: str, setting: Setting) -> Any:
        """Return the configured value as the space writes it: relative to that of another key, if it says so."""
        own = configured(key, self._config)
        if setting.of is None or not isinstance(own, int | float):
            return own
        return own / reference(setting.of, self._config, {})


def plain(choices: Sequence[Any]) -> list[Parameter]:
    """Return choices as optuna can keep them: plain values as they are, lists and sections as JSON."""
    return [json.dumps(one) if isinstance(one, list | tuple | dict) else one for one in choices]


def _written(value: Any) -> str:
    """Write a value so that YAML reads the same one: plain text as it is, anything else as JSON."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        return value if parse_yaml(value, "value") == value else json.dumps(value)
    except UserError:
        return json.dumps(value)


def _holds(when: Mapping[str, Sequence[Any]], config: FinetuneConfig | RunConfig, drawn: Mapping[str, Any]) -> bool:
    """Whether every key has one of the values that a condition asks for."""
    return all(drawn.get(key, configured(key, config)) in values for key, values in when.items())


def _scaled(value: Any, factor: float, whole: bool) -> Any:
    """Multiply a number, or each number of a mapping; whole numbers are at least 1 unless they are 0."""
    if isinstance(value, dict):
        return {key: _scaled(one, factor, whole) for key, one in value.items()}
    if not whole:
        return float(f"{value * factor:.6g}")
    return max(round(value * factor), 1) if value else 0
