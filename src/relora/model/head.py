"""Separation of a causal LM into its body and its output head, to compute a loss without the logits of a whole batch.

    logits = W_head hidden        hidden [batch, length, in_features] is returned; the loss multiplies it in chunks

The model's own forward pass runs, with two hooks on the head. The first keeps the head's input and passes on an input
of no positions, so that the head computes nothing. The second keeps the head's output. Each pass checks that the model
returns exactly this output tensor and has not written to it. So no list of architectures is needed, and a model that
caps or scales its logits after the head is recognised, and its loss is computed from whole logits.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

IGNORED = -100
"""Label of positions that are not scored by a loss; the default `ignore_index` of `F.cross_entropy`."""

_REASONS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""Results of `whole_logits_reason` by model, so that each is tried only once; no computed number depends on them."""


def whole_logits_reason(model: nn.Module) -> str | None:
    """Return the reason, in words, why the loss of a model needs the logits of a whole batch; None if it does not.

    The first call for a model runs it on one token, uncompiled. Training modes and random streams do not change.
    """
    if model not in _REASONS:
        device = next(model.parameters()).device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        uncompiled = torch.compiler.set_stance("force_eager")
        try:
            with torch.inference_mode(False), torch.no_grad(), forked, uncompiled:
                result = _run_without_head(model, torch.zeros(1, 1, dtype=torch.long, device=device))
        except Exception as error:  # any error: models differ in what they do with an empty output of the head
            result = f"it does not run without its head: {error}"
        _REASONS[model] = result if isinstance(result, str) else None
    return _REASONS[model]


def head_input(model: nn.Module, input_ids: Tensor, **others: Tensor) -> tuple[Tensor, nn.Linear, Any] | None:
    """Run the model without its head.

    Args:
        input_ids: [batch, length].
        others: further arguments of the model's forward pass.

    Returns:
        The head's input [batch, length, in_features], the head, and what the model returned, with logits of no
        positions; None if whole logits are needed (see `whole_logits_reason`).
    """
    if whole_logits_reason(model) is not None:
        return None
    result = _run_without_head(model, input_ids, **others)
    if isinstance(result, str):  # the model has changed since `whole_logits_reason` tried it
        _REASONS[model] = result
        return None
    return result


def _run_without_head(model: nn.Module, input_ids: Tensor, **others: Tensor) -> tuple[Tensor, nn.Linear, Any] | str:
    """Run one forward pass without the head's product.

    Returns:
        The head's input, the head and the model's output, or the reason why the logits cannot be computed from them.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        return "it does not tell its head"
    if not isinstance(head, nn.Linear) or getattr(head.forward, "__func__", None) is not nn.Linear.forward:
        return f"its head is a {type(head).__name__} with a forward pass of its own"
    inputs: list[Tensor] = []
    outputs: list[tuple[Tensor, int]] = []

    def keep_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        inputs.append(arguments[0])
        return arguments[0][..., :0, :]  # no positions

    def keep_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((output, _version(output)))

    # among all hooks of the head, the first is called last before it, and the second is called first after it
    with head.register_forward_pre_hook(keep_input), head.register_forward_hook(keep_output, prepend=True):
        returned = model(input_ids=input_ids, use_cache=False, **others)
    if len(inputs) != 1:
        return f"it calls its head {len(inputs)} times"
    output, version = outputs[0]
    if returned.logits is not output or _version(output) != version:
        return "it changes what its head returns, as by a cap or a scale"
    if inputs[0].shape[:-1] != input_ids.shape:
        return "its head sees other positions than the tokens'"
    return inputs[0], head, returned


def _version(tensor: Tensor) -> int:
    """Return a tensor's version, which every in-place change increases, even of no elements; 0 in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
