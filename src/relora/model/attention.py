"""How an opened model attends, seen before anything is trained or scored.

    attention_note        the class computes attention by its own code, because transformers has no SDPA for it
    check_causal          a token's logits depend on later tokens, so the model would be trained on its own answers

Which classes are of which kind is not looked up in a list. The price is a forward pass of a few tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from relora.errors import UserError
from relora.messages import first_line

POSITIONS = 8
"""Tokens with which a model is tried."""
LOGIT_TOLERANCE = 1e-5
"""Largest difference between equal logits in fp32, relative to the largest: rows of a batch may be rounded apart."""

_CAUSAL_KEYS = {"is_decoder": True, "causal": True, "is_causal": True, "use_bidirectional_attention": False}
"""Keys of configurations that make attention causal, and the value that does."""


def attention_note(model: PreTrainedModel) -> str | None:
    """Say by which code the attention of a model is computed, if it is not torch's fused one; None if it is."""
    if model.config._attn_implementation == "sdpa":
        return None
    return (
        f"attention: transformers has no SDPA for {type(model).__name__}, so its own code "
        f"({model.config._attn_implementation}) is used; its memory may grow with the square of the sequence length"
    )


def check_causal(model: PreTrainedModel, path: str | Path) -> None:
    """Raise `UserError` if the logits of a token depend on later tokens, or the model cannot be run on tokens alone.

    Two rows that differ in their later half only must have equal logits in the first half.

    Args:
        model: a causal LM; on the meta device nothing is checked.
        path: the model's name for messages.
    """
    if next(model.parameters()).device.type == "meta":
        return
    ids, half = _ordinary_ids(model), POSITIONS // 2
    other = torch.cat([ids[:half], ids[half:].flip(0)])
    try:
        with torch.no_grad(), _undisturbed(model):
            logits: Tensor = model(input_ids=torch.stack([ids, other]), use_cache=False).logits[:, :half].float()
    except Exception as error:  # of any type: the model may want images, sounds or states, and miss them anywhere
        reason = first_line(str(error)) or type(error).__name__
        raise UserError(f"{path}: a {model.config.model_type} model cannot be run on tokens alone: {reason}") from None
    tolerance = max(LOGIT_TOLERANCE, 2 * torch.finfo(model.dtype).eps) * logits.abs().max()
    if (logits[0] - logits[1]).abs().max() > tolerance:
        keys = [f"`{key}: {str(value).lower()}`" for key, value in _causal_keys(model.config)]
        remedy = f"set {' or '.join(keys)} in its config.json, or give" if keys else "give"
        raise UserError(f"{path}: its attention is not causal, each token sees those after it; {remedy} a causal LM")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode within the context; afterwards its modes and the random generators are as before."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _ordinary_ids(model: PreTrainedModel) -> Tensor:
    """Return `POSITIONS` ids of ordinary tokens: those that the configuration names may stand for padding or images."""
    rows: Any = getattr(model.get_input_embeddings(), "num_embeddings", None) or getattr(model.config, "vocab_size", 1)
    special = set(_special_ids(model.config.to_dict()))
    ordinary = [token for token in range(min(rows, POSITIONS + len(special))) if token not in special] or [0]
    ids = [ordinary[place % len(ordinary)] for place in range(POSITIONS)]
    return torch.tensor(ids, device=next(model.parameters()).device)


def _special_ids(tree: dict[Any, Any]) -> Iterator[int]:
    """Yield the ids that a configuration names, at any depth."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


def _causal_keys(config: PreTrainedConfig) -> list[tuple[str, bool]]:
    """Return the keys of a configuration that would make attention causal, with the values that would."""
    return [(key, value) for key, value in _CAUSAL_KEYS.items() if getattr(config, key, value) is not value]
