"""A sharded model brought together on rank 0, in files that are mapped, for what writes it or generates with it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from relora.distributed.group import Group
from relora.distributed.sharding import sharded_of
from relora.lowrank import low_rank_layers
from relora.lowrank.divided_layer import gathered_storage
from relora.lowrank.division import part_of


@contextmanager
def whole_on_first(model: nn.Module, scratch: Path, group: Group) -> Iterator[None]:
    """Let rank 0 have the whole model inside the block, in main memory; other ranks only send. All ranks call this.

    One tensor at a time is brought together and written to a file of a temporary folder in `scratch`, which is mapped.
    So what rank 0 needs beside one tensor is space on the disk, and memory only as far as there is some.
    """
    sharded = sharded_of(model)
    if sharded is None:
        yield
        return
    sharded.drop_shells()
    with ExitStack() as undo:
        place = Path(undo.enter_context(TemporaryDirectory(prefix=".whole-", dir=scratch))) if group.is_first else None
        for number, (owner, name, whole) in enumerate(_whole_tensors(model)):
            if place is not None:
                _replace(undo, owner, name, _mapped(whole, place / str(number)))
        if place is not None:
            _forget_division(undo, model)
        yield


def _whole_tensors(model: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """Bring one tensor after the other together; yield its owner, its name there and the whole."""
    for layer in low_rank_layers(model).values():
        yield from gathered_storage(layer)
    for parameter in model.parameters():
        if (part := part_of(parameter)) is not None:
            yield parameter, "data", part.gathered(parameter.data)


def _mapped(whole: Tensor, path: Path) -> Tensor:
    """Write a tensor to a file and return it as a map of that file."""
    if not whole.numel():
        return whole.cpu()
    mapped = torch.from_file(str(path), shared=True, size=whole.numel(), dtype=whole.dtype)
    return mapped.view(whole.shape).copy_(whole)


def _forget_division(undo: ExitStack, model: nn.Module) -> None:
    """Let the model look like one that was never divided, until `undo` is closed."""
    for layer in low_rank_layers(model).values():
        if layer.division is not None:
            _replace(undo, layer, "division", None)
            _replace(undo, layer.base, "shape", layer.base.of_rows(layer.out_features))
    for parameter in model.parameters():
        if part_of(parameter) is not None:
            _replace(undo, parameter, "part", None)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "cpu":
                _replace(undo, module, name, buffer.cpu())


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and set it back when `undo` is closed."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
