"""Where a causal LM ends and its head begins, so that a loss can be taken without the logits of a whole batch.

The model's own forward pass runs, and only its head is given nothing to do: a hook keeps what enters it and hands it
none of the positions. That the model returns what its head does, untouched, is seen in every pass: the very tensor
comes back, and nothing was written to it. So no list of families is needed, and one that caps or scales its logits
cannot be mistaken.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

IGNORED = -100
"""The label of a position that no loss scores, as `torch.nn.functional.cross_entropy` has it."""

_REASONS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""What was found of a model that is alive, so that it is tried only once; no number depends on it."""


def whole_logits_reason(model: nn.Module) -> str | None:
    """Why the loss of a model needs the logits of a whole batch, for a person; None where it does not.

    A model that was not seen before runs on one token, uncompiled; modes and random streams stay as they are.
    """
    if model not in _REASONS:
        device = next(model.parameters()).device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        uncompiled = torch.compiler.set_stance("force_eager")
        try:
            with torch.inference_mode(False), torch.no_grad(), forked, uncompiled:
                found = _separated(model, torch.zeros(1, 1, dtype=torch.long, device=device))
        except Exception as error:  # whatever a model makes of a head that returns nothing
            found = f"it does not run without its head: {error}"
        _REASONS[model] = found if isinstance(found, str) else None
    return _REASONS[model]


def head_input(model: nn.Module, input_ids: Tensor, **others: Tensor) -> tuple[Tensor, nn.Linear] | None:
    """What the head would multiply, [batch, length, in_features], and the head; None: see `whole_logits_reason`.

    `others` is what else the model is given.
    """
    if whole_logits_reason(model) is not None:
        return None
    found = _separated(model, input_ids, **others)
    if isinstance(found, str):  # the model was changed since it was first seen
        _REASONS[model] = found
        return None
    return found


def _separated(model: nn.Module, input_ids: Tensor, **others: Tensor) -> tuple[Tensor, nn.Linear] | str:
    """One forward pass without the head's product, or why it tells nothing of the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        return "it does not tell its head"
    if not isinstance(head, nn.Linear) or getattr(head.forward, "__func__", None) is not nn.Linear.forward:
        return f"its head is a {type(head).__name__} with a forward pass of its own"
    inputs: list[Tensor] = []
    outputs: list[tuple[Tensor, int]] = []

    def stand_aside(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        inputs.append(arguments[0])
        return arguments[0][..., :0, :]

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((output, _version(output)))

    # ours is the last to see the input and the first to see the output, whoever else looks on
    with head.register_forward_pre_hook(stand_aside), head.register_forward_hook(keep, prepend=True):
        logits = model(input_ids=input_ids, use_cache=False, **others).logits
    if len(inputs) != 1:
        return f"it calls its head {len(inputs)} times"
    output, version = outputs[0]
    if logits is not output or _version(output) != version:
        return "it changes what its head returns, as by a cap or a scale"
    if inputs[0].shape[:-1] != input_ids.shape:
        return "its head sees other positions than the tokens'"
    return inputs[0], head


def _version(tensor: Tensor) -> int:
    """Goes up with every change in place, of no elements too; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
