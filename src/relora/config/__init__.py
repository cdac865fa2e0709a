"""Configuration of a run: YAML and `key.sub=value` overrides, as frozen, typed settings.

Each section is one class; the string under a field is its documentation (and its text in the JSON schema).
Unknown keys, impossible values and impossible combinations are a `UserError` of one line that names the key, before
anything is loaded.
Nothing here imports torch, so that a misspelt key is reported at once.
"""

from relora.config.finetuning import FinetuneConfig
from relora.config.pretraining import RunConfig
from relora.config.reading import (
    load_any_config,
    load_config,
    load_finetune_config,
    parse_config,
    parse_finetune_config,
    to_yaml,
)
from relora.config.sections import CheckpointSettings
from relora.config.training import TrainingConfig

__all__ = [
    "CheckpointSettings",
    "FinetuneConfig",
    "RunConfig",
    "TrainingConfig",
    "load_any_config",
    "load_config",
    "load_finetune_config",
    "parse_config",
    "parse_finetune_config",
    "to_yaml",
]
