"""Terms that a model's own loss holds beside the cross-entropy of its logits.

Mixtures of experts add a loss that is small if all experts get as many tokens: `router_aux_loss_coef` (JetMoE:
`aux_loss_coef`) times `aux_loss`, where `output_router_logits` is set in their configuration. It is trained here, too,
and held-out losses are without it, so that perplexities are comparable. What else a class adds is not trained, and
`own_loss_note` says so: it finds the difference by letting the model compute its own loss.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names under which a model or its configuration keeps the factor of its auxiliary loss."""
_TRIED_TOKENS = 16
_TOLERANCE = 1e-3
"""Largest difference, relative to the loss, between the model's own loss and the one that is trained."""


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """Return what the model's own loss adds to the mean cross-entropy for its experts' sake; None if it adds nothing.

    Args:
        output: what the model's forward pass returned.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    name, coefficient = _coefficient(model)
    return coefficient * loss if name else None


def own_loss_note(model: PreTrainedModel, *, experts_train: bool) -> str | None:
    """Say what of the model's own loss is trained beside the cross-entropy, and what is not; None if there is nothing.

    The model runs on a few tokens, in eval mode. On the meta device nothing is said.

    Args:
        experts_train: whether to say also that the experts will train without the loss that balances them.
    """
    device = next(model.parameters()).device
    rows = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    if device.type == "meta" or not rows:
        return None
    ids = (torch.arange(_TRIED_TOKENS, device=device) % rows).unsqueeze(0)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        own, logits = float(output.loss), output.logits[0].float()
        trained = float(nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))
        unshifted = float(nn.functional.cross_entropy(logits, ids[0]))  # classes whose callers shift the labels
    except Exception:  # of any kind: a class may take no labels, or want more than token ids to score them
        return None
    finally:
        for module in training:
            module.training = True
    added = auxiliary_loss(model, output)
    extra = 0.0 if added is None else float(added)
    if min(abs(own - trained - extra), abs(own - unshifted - extra)) > _TOLERANCE * abs(own):
        return (
            f"the loss: {type(model).__name__} itself computes another one ({own:.4g} on a few tokens, not "
            f"{trained + extra:.4g}); what it adds to the cross-entropy, or scores otherwise, is not trained"
        )
    name, coefficient = _coefficient(model)
    if added is not None:
        return f"the loss: with {name} ({coefficient:g}) times the experts' auxiliary loss, held-out losses without it"
    if experts_train and coefficient and hasattr(model.config.get_text_config(), "output_router_logits"):
        return (
            f"the loss: without the auxiliary loss that balances the experts ({name} {coefficient:g}), because "
            "output_router_logits is not set in the model's config.json"
        )
    return None


def _coefficient(model: nn.Module) -> tuple[str, float]:
    """Return the factor of the auxiliary loss, and its name; an empty name if there is none."""
    config = getattr(model, "config", None)
    for owner in (model, config, getattr(config, "text_config", None)):
        for name in COEFFICIENTS:
            found = getattr(owner, name, None)
            if isinstance(found, int | float):
                return name, float(found)
    return "", 0.0
