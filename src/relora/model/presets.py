"""The shapes of the LLaMA models in the ReLoRA paper (arXiv 2307.05695, section 4), as the authors published them.

All have untied embeddings, as many key-value heads as heads, and the 32,100 ids of T5's tokenizer. Unlike in the
published configurations, no padding id is set: with theirs, -1, `nn.Embedding` takes the last row for padding, which
then is zero and never trains.
"""

import difflib
from typing import NamedTuple

from relora.errors import UserError


class Shape(NamedTuple):
    """The settings in which the presets differ, under their names in `transformers.LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024


PRESETS = {
    #                    hidden  ffn  layers heads
    "llama-9m": Shape(128, 352, 4, 4),
    "llama-20m": Shape(256, 688, 4, 4),
    "llama-35m": Shape(384, 1024, 6, 8),
    "llama-40m": Shape(416, 1024, 8, 8),
    "llama-60m": Shape(512, 1376, 8, 8),
    "llama-71m": Shape(512, 1368, 12, 8),
    "llama-100m": Shape(640, 1708, 12, 10),
    "llama-130m": Shape(768, 2048, 12, 12),
    "llama-250m": Shape(768, 2560, 24, 16),
    "llama-350m": Shape(1024, 2736, 24, 16),
    "llama-1b": Shape(2048, 5461, 24, 32),
    "llama-3b": Shape(2560, 6848, 32, 32),
    "llama-7b": Shape(4096, 11008, 32, 32, 2048),
}


def preset_settings(preset: str) -> dict[str, int | float | bool | None]:
    """Return the arguments for `transformers.LlamaConfig` that build a preset.

    Raises:
        UserError: there is no such preset; the message names the most similar one.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset.lower(), PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"model.preset: there is no preset `{preset}`; {hint}")
    return {
        **PRESETS[preset]._asdict(),
        "vocab_size": 32100,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
