"""Language models: LLaMA shapes to build, any Hugging Face causal LM to open, check and save."""

from relora.model.load import (
    build_model,
    check_fit,
    dtype_named,
    max_positions,
    model_folder,
    open_model,
    save_model,
)
from relora.model.presets import PRESETS, preset_settings

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
