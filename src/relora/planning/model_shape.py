"""The model of a configuration without its numbers, and what follows from its shapes before a run."""

from typing import TypeVar

import torch
from transformers import PreTrainedModel

from relora.config import FinetuneConfig, RunConfig
from relora.device import choose_device
from relora.model.load import open_model
from relora.recipes.finetuning_inputs import base_folder
from relora.recipes.precision import settle_dtype
from relora.recipes.pretraining_inputs import open_configured_model

Config = TypeVar("Config", bound=RunConfig | FinetuneConfig)


def shape_of(config: RunConfig | FinetuneConfig) -> PreTrainedModel:
    """Return the model of a configuration; on the meta device, where it takes no memory."""
    trust = config.model.trust_remote_code
    with torch.device("meta"):
        if isinstance(config, RunConfig):
            return open_configured_model(config, trust_remote_code=trust)
        return open_model(base_folder(config), trust_remote_code=trust)


def with_settled_dtype(config: Config) -> Config:
    """Return the configuration with the dtype that `precision.dtype: auto` stands for on the device that it names.

    Runs that are compared get one dtype in this way, and it is part of the name by which a run is found again.
    """
    return settle_dtype(config, choose_device(config.device), lambda: shape_of(config))[0]
