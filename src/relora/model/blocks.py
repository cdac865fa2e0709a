"""The repeated blocks of a language model while it trains: with less memory for what the backward pass needs, or
compiled.

    none       every intermediate result is kept
    selective  results of matrix products and of attention are kept; norms, rotations and activation functions are
               computed again (Korthikanti et al. 2022, arXiv 2205.05198, section 5)
    full       what enters each block is kept; its whole forward pass is done again (Chen et al. 2016, arXiv 1604.06174)

Blocks are found by structure, so that this works for any architecture. One compiled forward pass serves all blocks that
are alike, which is what keeps compilation short. Only training takes these ways: a block in eval mode computes as
written, so held-out losses compare between settings and texts of any length compile nothing. The price: time for
memory, and for `compile` seconds at the start of each phase and other last bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig

from relora.errors import UserError
from relora.lowrank.blocks import block_lists

Checkpointing = Literal["none", "selective", "full"]
Forward = Callable[..., Any]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten._int_mm.default}
_WHOLE = {
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the decoder blocks of a language model, in their order; an empty list if it has none.

    They are the elements of one of the model's `block_lists`, chosen in two steps. First, if some of the lists are as
    long as the configuration says that the text model is deep (`num_hidden_layers`), only those are considered. Then
    the list with the most parameters is taken. So neither the experts inside a block nor the blocks of an image tower
    count, although their lists may be longer.

    An element without a forward pass of its own (an `nn.ModuleList` or `nn.ModuleDict`, in models whose blocks are
    lists or dictionaries of sub-layers) is replaced by the modules that it holds.
    """
    lists = list(block_lists(model).values())
    depth = _configured_depth(model)
    as_deep = [blocks for blocks in lists if len(blocks) == depth]
    largest = max(as_deep or lists, key=_parameter_count, default=())
    return [module for block in largest for module in _with_forward(block)]


def _configured_depth(model: nn.Module) -> int | None:
    """Return the number of decoder blocks that a transformers model's configuration gives; None if it gives none."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def _parameter_count(blocks: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module itself, or what a container without a forward pass holds."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _with_forward(child)
    else:
        yield module


def training_blocks(
    model: nn.Module, *, checkpointing: Checkpointing = "none", compiled: bool = False, backend: str = "inductor"
) -> AbstractContextManager[None]:
    """Within the context the blocks train in this way; afterwards they are as they were.

    Modules, names and state stay: only `forward` of each block is another. What is inside the blocks may be replaced
    within the context (as `inject` does), at the price of one more compilation. `backend` is torch.compile's.

    Raises:
        UserError: at once, where the model has no blocks or the machine cannot compile.
    """
    if checkpointing == "none" and not compiled:
        return nullcontext()
    blocks = decoder_blocks(model)
    if not blocks:
        raise UserError(
            "the model has no repeated blocks (no nn.ModuleList); set `compile: false` and no checkpointing"
        )
    if compiled:
        _check_compiler(next(model.parameters()).device, backend)
    return _replaced(blocks, checkpointing, backend if compiled else None)


def _check_compiler(device: torch.device, backend: str) -> None:
    """Compile the smallest of functions; `UserError` if that fails."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds: no compiler, no headers, no room for the files
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        needed = "a C++ compiler and the headers of Python" if device.type == "cpu" else "a working Triton"
        raise UserError(f"compile: needs {needed} ({reason}); install them or set `compile: false`") from None


@contextmanager
def _replaced(blocks: list[nn.Module], checkpointing: Checkpointing, backend: str | None) -> Iterator[None]:
    training = {kind: _training_forward(kind, checkpointing) for kind in {type(block) for block in blocks}}
    if backend:
        # blocks that read their own number (some scale by it) are compiled one by one: in both phases that is 2 each,
        # with a residual that is not always due 3
        limit = max(8, 3 * len(blocks))
        settings: dict[str, Any] = {"dynamic": False, "recompile_limit": limit, "isolate_recompiles": True}
        training = {kind: torch.compile(forward, backend=backend, **settings) for kind, forward in training.items()}
    for block in blocks:
        block.forward = partial(_forward, block, training[type(block)])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _forward(block: nn.Module, training: Forward, *args: Any, **kwargs: Any) -> Any:
    return training(block, *args, **kwargs) if block.training else type(block).forward(block, *args, **kwargs)


def _training_forward(kind: type[nn.Module], checkpointing: Checkpointing) -> Forward:
    """`kind.forward`, with what it keeps for the backward pass as asked."""
    if checkpointing == "none":
        return kind.forward
    if checkpointing == "full":
        return partial(checkpoint, kind.forward, use_reentrant=False)

    def selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        contexts = partial(create_selective_checkpoint_contexts, partial(_kept, hidden.shape[:-1].numel()))
        return checkpoint(kind.forward, block, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return selective


def _kept(
    tokens: int, context: object, operation: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Keep what is expensive: attention, and products with a row for each token.

    But not attention that drops: it draws within one operator, and an operator that is not run again would leave the
    stream behind for all that draws after it. A product of weights alone (W + s B A) has as many entries as a weight
    and is cheap. The operators of this package are products that are one operator, whatever they do inside.
    """
    costly = (
        (operation in _WHOLE and not _drops(operation, args, kwargs))
        or operation.namespace == "relora"
        or (operation in _PRODUCTS and args[-2].shape[0] == tokens)
    )
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an operator comes with a `dropout_p`."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))
