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

from relora.errors import UserError

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


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in their order: what the `nn.ModuleList` with the most parameters holds.

    Raises:
        UserError: the model has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(
            "the model has no repeated blocks (no nn.ModuleList); set `compile: false` and no checkpointing"
        )

    def size(blocks: Iterable[nn.Module]) -> int:
        return sum(parameter.numel() for block in blocks for parameter in block.parameters())

    return list(max(lists, key=size))


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
    blocks = find_blocks(model)
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
