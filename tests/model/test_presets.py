"""The published shapes: parameter counts as the paper's sizes have them, and no preset that trains a dead row."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from relora.errors import UserError
from relora.model.presets import PRESETS, preset_settings

# Millions of parameters in matrices, embeddings untied: the sizes of the paper's tables.
PUBLISHED = {"llama-60m": 58.2, "llama-130m": 134.2, "llama-250m": 247.5, "llama-350m": 368.1, "llama-1b": 1339}


def matrix_parameters(preset: str) -> int:
    """Number of parameters in matrices; the vectors of the norms are less than 0.1 % of all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**preset_settings(preset)))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize(("preset", "millions"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(preset: str, millions: float) -> None:
    digits = 0 if isinstance(millions, int) else 1
    assert round(matrix_parameters(preset) / 1e6, digits) == millions


@pytest.mark.parametrize("preset", PRESETS)
def test_every_shape_can_be_built(preset: str) -> None:
    settings = preset_settings(preset)
    assert settings["hidden_size"] % settings["num_attention_heads"] == 0
    assert settings["hidden_size"] // settings["num_attention_heads"] % 2 == 0
    assert LlamaConfig(**settings).pad_token_id is None
    assert settings["max_position_embeddings"] == (2048 if preset == "llama-7b" else 1024)


def test_sizes_grow_in_the_order_of_the_table() -> None:
    counts = [matrix_parameters(preset) for preset in list(PRESETS)[:10]]
    assert counts == sorted(counts)


@pytest.mark.parametrize(("typed", "meant"), [("llama-60M", "llama-60m"), ("llama60m", "llama-60m"), ("1b", "llama-")])
def test_an_unknown_preset_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"no preset `{typed}`.*{meant}"):
        preset_settings(typed)
