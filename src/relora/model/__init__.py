"""Language models: build a LLaMA of a preset shape; open, check and save any causal LM of Hugging Face."""

from relora.model.load import (
    build_model,
    check_fit,
    dtype_named,
    max_positions,
    model_folder,
    open_model,
)
from relora.model.presets import PRESETS, preset_settings
from relora.model.save import save_model

__all__ = [
    "PRESETS",
    "build_model",
    "check_fit",
    "dtype_named",
    "max_positions",
    "model_folder",
    "open_model",
    "preset_settings",
    "save_model",
]
