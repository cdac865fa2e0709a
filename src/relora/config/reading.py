"""Read settings from YAML and `key.sub=value` overrides, and write them as YAML.

The first mistake becomes a `UserError` of one line that names the file and the key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from relora.config.finetuning import FinetuneConfig
from relora.config.pretraining import RunConfig
from relora.config.training import TrainingConfig
from relora.errors import UserError
from relora.files.untrusted import DEPTH, parse_yaml, read_yaml
from relora.messages import LONGEST_PATH, first_mistake, short_name, short_repr

T = TypeVar("T", bound=TrainingConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides in order and check the whole; `UserError` on anything wrong."""
    return parse_config(_read_with_overrides(path, overrides), source=str(path))


def load_finetune_config(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read and check a configuration for fine-tuning; otherwise like `load_config`."""
    return parse_finetune_config(_read_with_overrides(path, overrides), source=str(path))


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | FinetuneConfig:
    """Read a configuration of either kind, like `load_config`; one that has a `task` is for fine-tuning."""
    tree = _read_with_overrides(path, overrides)
    return parse_finetune_config(tree, str(path)) if "task" in tree else parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> RunConfig:
    """Check a plain dictionary and return it as settings; `source` names its file in messages."""
    if "task" in tree:
        raise UserError(f"{source}: has a `task`, so it is for `relora finetune`; pretraining has none")
    return _parse(tree, RunConfig, source)


def parse_finetune_config(tree: dict[str, Any], source: str = "config") -> FinetuneConfig:
    """Check a plain dictionary and return it as settings for fine-tuning; otherwise like `parse_config`."""
    if "task" not in tree:
        raise UserError(f"{source}: `task` is missing; fine-tuning wants `task: instruct` or `task: classification`")
    return _parse(tree, FinetuneConfig, source)


def to_yaml(config: TrainingConfig) -> str:
    """Write the configuration as YAML, with every default but no key that is None; it reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _parse(tree: dict[str, Any], kind: type[T], source: str) -> T:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {first_mistake(error, kind)}") from None


def _read_with_overrides(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _read_yaml(path: Path) -> dict[str, Any]:
    name = short_name(str(path), LONGEST_PATH)
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; give the path of a YAML configuration") from None
    except (OSError, ValueError) as error:  # ValueError: a path with NUL in it
        raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: must be a YAML mapping of keys to values")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{short_repr(override)}: an override is written key.sub=value, e.g. optimizer.lr=1e-3")
    *parents, last = key.split(".")
    if len(parents) >= DEPTH:
        raise UserError(f"{short_repr(override)}: more than {DEPTH} levels")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{short_repr(override)}: `{parent}` is not a section")
    tree[last] = parse_yaml(value, short_repr(override))
