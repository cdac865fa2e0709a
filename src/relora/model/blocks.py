"""The decoder blocks of a language model, and how they train: with activation checkpointing, or compiled.

Activation checkpointing saves memory by computing a part of the forward pass again in the backward pass:

    none       every intermediate result is kept for the backward pass
    selective  results of matrix products and of attention are kept; norms, rotations and activation functions are
               computed again (Korthikanti et al. 2022, arXiv 2205.05198, section 5)
    full       the input of each block is kept; its whole forward pass is computed again (Chen et al. 2016, arXiv
               1604.06174)

Blocks are found by the structure of the model, so this works for any architecture. All blocks of one class share one
compiled forward pass, so compilation takes as long as that of one block. Both apply in training only: in eval mode a
block runs its own forward pass, so held-out losses are comparable between settings, and sequences of other lengths
trigger no compilation. The price: checkpointing takes time; compilation takes seconds at the start of each phase, and
its results differ in the last bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig

from relora.errors import UserError
from relora.lowrank.blocks import block_lists

Checkpointing = Literal["none", "selective", "full"]
"""Kinds of activation checkpointing; see the module."""
Forward = Callable[..., Any]
"""A forward pass as a function whose first argument is the block."""

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten._int_mm.default}
"""Products of two matrices; their results are kept if they have a row for each token."""
_ATTENTION_PRODUCTS = {
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
"""Attention and batched products; their results are always kept, unless they draw dropout."""


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
    """Count the parameters of all blocks together."""
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
    """Return a context in which the decoder blocks train checkpointed or compiled; afterwards they are as before.

    Modules, names and state do not change: the context replaces the `forward` of each block. Modules inside the blocks
    may be replaced within the context (as `inject` does), at the price of one more compilation.

    Args:
        backend: backend of `torch.compile`.

    Raises:
        UserError: the model has no blocks, or the machine cannot compile. It is raised by the call, not by entering the
            context.
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
    return _replaced_forwards(blocks, checkpointing, backend if compiled else None)


def _check_compiler(device: torch.device, backend: str) -> None:
    """Compile a trivial function; `UserError` if that fails."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # of many classes: no compiler, no headers, no space for the files
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        needed = "a C++ compiler and the headers of Python" if device.type == "cpu" else "a working Triton"
        raise UserError(f"compile: needs {needed} ({reason}); install them or set `compile: false`") from None


@contextmanager
def _replaced_forwards(blocks: list[nn.Module], checkpointing: Checkpointing, backend: str | None) -> Iterator[None]:
    """Replace the `forward` of the blocks within the context; `backend` is None to compile nothing."""
    classes = {type(block) for block in blocks}
    forwards = {
        block_class: _checkpointed_forward(block_class, checkpointing, compiled=backend is not None)
        for block_class in classes
    }
    if backend:
        # Blocks that read their own index (some scale by it) are compiled one by one: twice each for the two phases,
        # and three times with a residual that is not due in every step.
        limit = max(8, 3 * len(blocks))
        settings: dict[str, Any] = {"dynamic": False, "recompile_limit": limit, "isolate_recompiles": True}
        forwards = {
            block_class: torch.compile(forward, backend=backend, **settings)
            for block_class, forward in forwards.items()
        }
    for block in blocks:
        block.forward = partial(_forward, block, forwards[type(block)])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _forward(block: nn.Module, training_forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run the block's forward pass: `training_forward` in training mode, its own in eval mode."""
    forward = training_forward if block.training else type(block).forward
    return forward(block, *args, **kwargs)


def _checkpointed_forward(block_class: type[nn.Module], checkpointing: Checkpointing, *, compiled: bool) -> Forward:
    """Return the forward pass of a class of blocks with activation checkpointing."""
    if checkpointing == "none":
        return block_class.forward
    if checkpointing == "full":
        return partial(checkpoint, block_class.forward, use_reentrant=False)

    def selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))  # [..., width]
        policy = partial(_selective_policy, hidden.shape[:-1].numel())
        contexts = partial(_selective_contexts, policy, compiled=compiled)
        return checkpoint(block_class.forward, block, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return selective


def _selective_contexts(
    policy: Any, *, compiled: bool
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed block's forward pass and of its second one, in the backward pass."""
    forward, again = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    if compiled:  # the compiler turns what is done in place into new tensors
        return forward, again
    # The outer one sees an operation last, so its copies are not among the operations that the inner one counts.
    return _both(_CopyBeforeChange(forward.storage), forward), again


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter two contexts."""
    with outer, inner:
        yield


class _CopyBeforeChange(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a kept result before an operation changes it in place, as Falcon's blocks do: `mlp_output += attention`.

    The copy is kept instead, so the second forward pass gets the result as it was, and changes it likewise. Without
    this, torch raises an error in the backward pass.

    Args:
        kept: what `create_selective_checkpoint_contexts` keeps: operator -> number of its call -> its results.
    """

    def __init__(self, kept: dict[Any, dict[int, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self._copy(value)
        for argument in function._schema.arguments:
            if argument.is_write and isinstance(value := kwargs.get(argument.name), Tensor):
                self._copy(value)
        return function(*args, **kwargs)

    def _copy(self, changed: Tensor) -> None:
        """Replace every kept result that shares its memory with a tensor by a copy."""
        address = changed.untyped_storage()._cdata
        for calls in self._kept.values():
            for entry in tree_leaves(list(calls.values())):
                kept = getattr(entry, "val", None)
                if isinstance(kept, Tensor) and kept.untyped_storage()._cdata == address:
                    entry.val = kept.clone()
                    entry.version = entry.val._version


def _selective_policy(
    tokens: int, context: object, operation: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Decide whether the result of an operator is kept: it is for attention and for products with a row for each token.

    Attention with dropout is computed again, because it draws random numbers inside the operator: if the operator did
    not run again, the random stream would not advance, and everything that draws after it in the block would draw other
    numbers than in the forward pass. A product of weights alone (W + s B A) has as many entries as a weight and is
    cheap, so it is computed again. The operators of this package are products, whatever else they do inside.
    """
    keep = (
        (operation in _ATTENTION_PRODUCTS and not _has_dropout(operation, args, kwargs))
        or operation.namespace == "relora"
        or (operation in _MATRIX_PRODUCTS and args[-2].shape[0] == tokens)
    )
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _has_dropout(operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of an operator has a `dropout_p` above 0."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))
