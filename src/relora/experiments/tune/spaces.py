"""The space of a search: which keys of a configuration may take which values.

A space is data, a YAML file in which every key of the configuration has `choices`, or `low` and `high`:

    optimizer.lowrank_lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    lowrank.r: {choices: [2, 4, 8, 16]}
    lowrank.lora_alpha: {choices: [1, 2, 4], of: lowrank.r}               # a multiple of another key's value
    warm_start.steps: {low: 0.05, high: 0.3, of: steps}                   # a share of the run
    restart.retain: {choices: [0, 0.5], when: {restart.init: [balanced]}} # only in some trials

The built-in spaces are the files finetune.yaml and pretrain.yaml beside this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from relora.config import FinetuneConfig, RunConfig
from relora.config.values import Number, Settings, Text
from relora.errors import UserError
from relora.files.untrusted import parse_yaml, read_yaml
from relora.messages import first_mistake, short_name, unknown_key
from relora.recipes.from_settings import FINETUNING_EPOCHS

Config = RunConfig | FinetuneConfig

STEPS = "steps"
"""Name by which `of` refers to the number of steps of the whole run."""
FIXED = ("output_dir", "device", "log", "checkpoint", "samples", "evaluate", "data.validation", "data.validation_share")
"""Keys and sections that cannot be searched: they say where a run is or how it is measured, not how it trains."""


class Setting(Settings):
    """Values that one key may take: `choices`, or every number from `low` to `high`."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Values to choose from."""
    low: Annotated[float, Number] | None = None
    """Smallest value."""
    high: Annotated[float, Number] | None = None
    """Largest value."""
    log: bool = False
    """Draw between `low` and `high` by the logarithm."""
    of: Text | None = None
    """Key whose value the drawn number is multiplied by; `steps` for the steps of the whole run."""
    when: dict[Text, tuple[Any, ...]] = Field(default_factory=dict)
    """Key -> values: the setting is drawn only where each of these keys has one of its values."""

    @model_validator(mode="after")
    def _check_range(self) -> "Setting":
        """Refuse both or neither of `choices` and a range, and a range that is empty or has no logarithm."""
        ranged = self.low is not None or self.high is not None
        if ranged == (self.choices is not None):
            raise ValueError("give either `choices`, or `low` and `high`")
        if self.choices is not None and self.log:
            raise ValueError("`log` is for `low` and `high`")
        if not ranged:
            return self
        if self.low is None or self.high is None:
            raise ValueError(f"`{'low' if self.low is None else 'high'}` is missing")
        if self.low >= self.high:
            raise ValueError(f"`low` ({self.low:g}) must be below `high` ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"`low` ({self.low:g}) must be above 0 with `log: true`")
        return self


@dataclass(frozen=True)
class Space:
    """The settings of a search, in the order in which they are drawn."""

    settings: Mapping[str, Setting]
    name: str
    """Name of its file, for messages."""

    def as_tree(self) -> dict[str, Any]:
        """Return the space as plain values, in the form of its file."""
        return {key: one.model_dump(mode="json", exclude_defaults=True) for key, one in self.settings.items()}


def read_space(file: Path | None, config: Config) -> Space:
    """Read a space from a file; without one, the built-in space for this kind of configuration.

    Raises:
        UserError: the file cannot be read, is no space, or names a key that the configuration does not have.
    """
    if file is None:
        name = "pretrain.yaml" if isinstance(config, RunConfig) else "finetune.yaml"
        tree = parse_yaml(files("relora.experiments.tune").joinpath(name).read_text(encoding="utf-8"), name)
        return _checked(tree, f"built-in {name}", config)
    try:
        return _checked(read_yaml(file), str(file), config)
    except OSError as error:
        raise UserError(f"--space {file}: cannot be read: {error.strerror}") from None


def _checked(tree: Any, name: str, config: Config) -> Space:
    """Check every setting and every key of a space."""
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{name}: is an empty space; give keys of the configuration, each with its values")
    settings: dict[str, Setting] = {}
    for key, values in tree.items():
        key = str(key)
        try:
            setting = Setting.model_validate({"choices": values} if isinstance(values, list) else values)
        except ValidationError as error:
            raise UserError(f"{name}: {short_name(key)}: {first_mistake(error, Setting)}") from None
        _check_key(key, name, type(config))
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(f"{name}: {key}: says where a run is or how it is measured, and cannot be searched")
        for other in (*setting.when, *([setting.of] if setting.of not in (None, STEPS) else [])):
            assert other is not None
            _check_key(other, name, type(config))
            if other in tree and other != key and other not in settings:
                raise UserError(f"{name}: {key}: refers to {other}, which must stand above it")
        if setting.of is not None and not all(map(_is_scalable, setting.choices or ())):
            raise UserError(f"{name}: {key}: `of` multiplies numbers, and there is one among `choices` that is none")
        if setting.of is not None and setting.of not in settings:
            reference(setting.of, config, {})
        settings[key] = setting
    return Space(settings, name)


def reference(key: str, config: Config, drawn: Mapping[str, Any]) -> float:
    """Return the number that `of: KEY` stands for: a drawn value, else the configured one.

    Raises:
        UserError: the configuration has no number there.
    """
    if key == STEPS:
        steps = _steps(config, drawn)
        if steps is None:
            raise UserError("space: `of: steps` needs `schedule.total_steps` in the configuration")
        return steps
    value = drawn.get(key, configured(key, config))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"space: `of: {key}`: the configuration has no number there")
    return value


def configured(key: str, config: Config) -> Any:
    """Return the value that a configuration has for a dotted key, with what stands in for one that is not given."""
    stand_ins: dict[str, Any] = {
        "optimizer.lowrank_lr": config.lowrank_lr,
        "optimizer.matrix_lr": config.optimizer.matrix_lr or config.optimizer.lr,
    }
    if isinstance(config, RunConfig):
        stand_ins["lowrank.warmup_steps"] = config.switch_warmup_steps
    else:
        stand_ins["schedule.epochs"] = config.schedule.epochs or FINETUNING_EPOCHS
    if key in stand_ins:
        return stand_ins[key]
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_whole(key: str, kind: type[BaseModel]) -> bool:
    """Whether the values of a key are whole numbers."""
    annotation: Any = kind
    for part in key.split("."):
        model = next((one for one in _flat(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if model is None or part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
    types = _flat(annotation)
    return int in types and float not in types


def _steps(config: Config, drawn: Mapping[str, Any]) -> int | None:
    """Return the steps of a run with the values drawn so far; None where they depend on the number of examples."""
    if isinstance(config, FinetuneConfig):
        return config.schedule.total_steps
    sequences = drawn.get("batch.sequences", config.batch.sequences)
    tokens = config.schedule.total_tokens or config.total_steps * config.batch_tokens
    return -(-tokens // int(sequences * config.data.sequence_length))  # rounded up


def _check_key(key: str, name: str, kind: type[BaseModel]) -> None:
    """Refuse a key that a configuration does not have, and name the nearest that it has."""
    if (mistake := unknown_key(key, kind)) is not None:
        raise UserError(f"{name}: {mistake}")


def _is_scalable(value: Any) -> bool:
    """Whether `of` can multiply a choice: a number, or a mapping to numbers."""
    if isinstance(value, dict):
        return all(map(_is_scalable, value.values()))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(annotation: Any) -> set[Any]:
    """Return a type and the types that it is made of: those of a union, and the one that is annotated."""
    return {annotation, *(part for one in get_args(annotation) for part in _flat(one))}
