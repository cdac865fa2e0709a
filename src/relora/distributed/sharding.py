"""A model sharded over processes: FSDP2 for the passes, plain tensors of own rows at rest.

    at rest      every parameter is a plain tensor with this process's own rows (`lowrank.division`), so the optimizer,
                 restarts and checkpoints are the code of one process, on fewer rows
    in a pass    FSDP2's parameters stand in their place: `fully_shard` brings the rows of one block together just
                 before the block computes, and adds up and divides its gradient just after its backward pass

Both share their memory. Each block is a group of its own, and everything outside of the blocks is one more. FSDP2 fixes
its groups once, while the switch to low rank puts other layers into the blocks; therefore `fully_shard` is applied to a
shell around each block that is not part of the model, and when the layers have changed the shells are thrown away and
new ones are made. Scalars, which FSDP2 cannot divide, stay whole on every process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from relora.lowrank.division import Division, divide_, part_of, whole_shape
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.storage.nf4 import BLOCK
from relora.lowrank.targets import is_conv1d

_SHARDED: "WeakKeyDictionary[nn.Module, ShardedModel]" = WeakKeyDictionary()
"""The sharded models of this process."""


def sharded_of(model: nn.Module) -> "ShardedModel | None":
    """Return how this process shares a model with others; None for a model that it has whole."""
    return _SHARDED.get(model)


@contextmanager
def passes(model: nn.Module) -> Iterator[bool]:
    """Run passes of a model inside the block; yield whether all processes must take the same number of them."""
    sharded = _SHARDED.get(model)
    if sharded is None:
        yield False
        return
    with sharded.passes():
        yield True


class _Shell(nn.Module):
    """Runs a module's own forward pass; `fully_shard` hangs its hooks on this shell and not on the module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any], inner: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.module, self.inner = module, nn.ModuleList(inner)
        self._run = (run,)  # in a tuple, so that it is no attribute that `nn.Module` looks into

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward pass."""
        return self._run[0](*args, **kwargs)


@dataclass
class _Placed:
    """One tensor of the model in its two forms, and every place that it has."""

    rows: Tensor
    """Own rows, at rest: a parameter, or a buffer of a low-rank layer."""
    places: list[tuple[nn.Module, str]]
    sharded: Any
    """The parameter that FSDP2 works with, a `DTensor`; it shares the memory of `rows`."""
    address: int = 0
    """Where in memory the rows lie."""

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer at rest; FSDP2 divides parameters alone."""
        return not isinstance(self.rows, nn.Parameter)


class ShardedModel:
    """A model of which this process holds its own rows.

    Args:
        model: the whole model; it is divided in place.
        blocks: its repeated blocks.
        mesh: one dimension, or two: replicas of the model, and the processes that share one of them.
        device: where the own rows are kept and computed with.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, device: torch.device) -> None:
        self.model, self.blocks, self.mesh, self.device = model, blocks, mesh, device
        self._group = mesh.get_group(mesh.ndim - 1)
        self.division = Division(
            rank=mesh.get_local_rank(mesh.ndim - 1),
            count=mesh.size(mesh.ndim - 1),
            gather=self._gather,
            sum_=self._sum,
            passes=self.passes,
        )
        self._placed: list[_Placed] = []
        self._root: nn.Module | None = None
        self._of_modules: tuple[int, ...] = ()
        self._forwards: list[_Forward] = []
        self._divide()
        _SHARDED[model] = self

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Run forward and backward passes inside the block; gradients are there, as own rows, when it ends.

        Every process must take the same number of passes.
        """
        self._settle_shells()
        for one in self._placed:
            _put(one, one.sharded.requires_grad_(one.rows.requires_grad))
        root: Any = self._root
        try:
            yield
        except BaseException:
            root.reset_iter_state()
            self._rest(drop_gradients=True)
            raise
        root.reshard()  # without a backward pass it has stayed whole
        self._rest(drop_gradients=False)

    def _rest(self, *, drop_gradients: bool) -> None:
        """Put the plain tensors back, with the gradients of the passes."""
        for one in self._placed:
            gradient: Any = one.sharded.grad
            one.sharded.grad = None
            if gradient is not None and not drop_gradients:
                one.rows.grad = gradient.to_local()
            _put(one, one.rows)

    @torch.no_grad()
    def _divide(self) -> None:
        """Keep the own rows of every parameter, on the device."""
        seen: set[int] = set()
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                divide_(parameter, self.division, dim=1 if name == "weight" and is_conv1d(module) else 0)
                parameter.data = parameter.data.to(self.device)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _settle_shells(self) -> None:
        """Make the shells anew if the model has other layers than before."""
        modules = tuple(map(id, self.model.modules()))
        if modules != self._of_modules or not all(one.is_in_place for one in self._forwards):
            self.drop_shells()
            self._make_shells()
            self._of_modules = modules
        elif any(one.rows.data_ptr() != one.address for one in self._placed):
            raise AssertionError("own rows lie elsewhere than those that FSDP2 computes with")

    def drop_shells(self) -> None:
        """Forget the shells, until the next pass, and give every module its own forward pass back."""
        for forward in self._forwards:
            forward.take_back()
        for one in self._placed:
            for module, _ in one.places:
                module._load_state_dict_post_hooks.clear()  # FSDP2's, which would keep the old rows in memory
        self._placed, self._forwards, self._root, self._of_modules = [], [], None, ()

    def _make_shells(self) -> None:
        """Apply `fully_shard` to a shell around each block and one around the model, on the memory of the own rows."""
        tensors = self._tensors()
        sharded: dict[int, nn.Parameter] = {}
        for key, (rows, places) in tensors.items():
            whole = torch.empty(self._whole_shape(rows, places), dtype=rows.dtype, device="meta")
            sharded[key] = nn.Parameter(whole, requires_grad=rows.requires_grad)
            _put_in(places, sharded[key], rows)
        scalars = {parameter for parameter in self.model.parameters() if parameter.ndim == 0}
        parts = {id(sharded[key]): part_of(rows) for key, (rows, _) in tensors.items()}
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "shard_placement_fn": lambda parameter: Shard(part.dim if (part := parts[id(parameter)]) else 0),
        }
        self._forwards = [_Forward(block) for block in self.blocks]
        shells = [forward.shell for forward in self._forwards]
        for shell in shells:
            fully_shard(shell, ignored_params=scalars, **settings)
        inside = {parameter for block in self.blocks for parameter in block.parameters()}
        self._forwards.append(_Forward(self.model, shells))
        root = self._root = self._forwards[-1].shell
        fully_shard(root, ignored_params=scalars | inside, **settings)
        for rows, places in tensors.values():
            module, name = places[0]
            parameter = self._sharded(rows, module._parameters[name])
            _put_in(places, parameter, rows)
            self._placed.append(_Placed(rows, places, parameter))
        for shell in (root, *shells):
            assert isinstance(shell, FSDPModule)
            shell.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes: a sum is due
            shell.set_force_sum_reduction_for_comms(True)
            shell.set_reduce_scatter_unused_params(True)
            shell.unshard()  # lets FSDP2 take up the rows that it was given, with room for uneven ones
            shell.reshard()
        for one in self._placed:
            module, name = one.places[0]
            one.sharded = module._parameters[name]
            one.rows.data = one.sharded.to_local().view(one.rows.shape)
            one.address = one.rows.data_ptr()
            _put(one, one.rows)

    def _tensors(self) -> dict[int, tuple[Tensor, list[tuple[nn.Module, str]]]]:
        """Return by identity every tensor that is divided, with all places that it has in the model."""
        found: dict[int, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and part_of(parameter) is not None:
                    found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
        for layer in low_rank_layers(self.model).values():
            for name in layer.divided_buffers:
                if (buffer := getattr(layer, name)) is not None:
                    found[id(buffer)] = (buffer, [(layer, name)])
        return found

    def _whole_shape(self, rows: Tensor, places: list[tuple[nn.Module, str]]) -> torch.Size:
        """Return the shape that FSDP2 sees: for scales of nf4, one row for each output where blocks end with rows."""
        if part_of(rows) is not None:
            return whole_shape(rows)
        out_features, in_features = int(places[0][0].out_features), int(places[0][0].in_features)  # type: ignore[arg-type]
        if rows.ndim == 2:
            return torch.Size((out_features, rows.shape[1]))
        if in_features % BLOCK == 0:
            return torch.Size((out_features, in_features // BLOCK))
        return torch.Size((rows.numel() * self.division.count,))

    def _sharded(self, rows: Tensor, placed: Any) -> nn.Parameter:
        """Build FSDP2's parameter on the memory of the own rows, in the place of one without memory."""
        tensor = DTensor.from_local(
            rows.detach().view(placed.to_local().shape),
            self.mesh,
            placed.placements,
            run_check=False,
            shape=placed.shape,
            stride=placed.stride(),
        )
        return nn.Parameter(tensor, requires_grad=rows.requires_grad)

    def _gather(self, own: Tensor, dim: int, size: int) -> Tensor:
        """Bring the parts of a tensor together; they may differ in length."""
        chunk = -(-size // self.division.count)
        first = own.movedim(dim, 0)
        padded = first.new_zeros(chunk, *first.shape[1:])
        padded[: len(first)] = first
        gathered = padded.new_empty(self.division.count * chunk, *first.shape[1:])
        device = self.device if own.device.type == "cpu" else own.device
        self._all_gather(gathered, padded, device)
        return gathered[:size].movedim(0, dim).contiguous()

    def _all_gather(self, gathered: Tensor, padded: Tensor, device: torch.device) -> None:
        """Gather, by way of the device where the process group works there and the tensor is in main memory."""
        if padded.device == device:
            dist.all_gather_single(gathered, padded, group=self._group)
            return
        on_device = gathered.to(device)
        dist.all_gather_single(on_device, padded.to(device), group=self._group)
        gathered.copy_(on_device)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Add up over the processes, in place."""
        if tensor.device.type == "cpu" and self.device.type != "cpu":
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device, group=self._group)
            return tensor.copy_(on_device)
        dist.all_reduce(tensor, group=self._group)
        return tensor


class _Forward:
    """The way from a module to the shell around it: calls of the module go through the shell."""

    def __init__(self, module: nn.Module, inner: Sequence[nn.Module] = ()) -> None:
        self.module = module
        self.before = vars(module).get("forward")
        """Forward pass that stood in place of the class's own, as that with activation checkpointing does."""
        self.shell = _Shell(module, module.forward, inner)
        call = self.shell.__call__

        def forward(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        forward.__wrapped__ = module.forward  # type: ignore[attr-defined]  # so that its signature is still seen
        self.forward = forward
        module.forward = forward

    @property
    def is_in_place(self) -> bool:
        """Whether calls of the module still go through the shell."""
        return vars(self.module).get("forward") is self.forward

    def take_back(self) -> None:
        """Let the module run as before, unless somebody else has given it another forward pass by now."""
        if self.is_in_place:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before


def _put(one: _Placed, tensor: Tensor) -> None:
    """Register a tensor in all of its places."""
    _put_in(one.places, tensor, one.rows)


def _put_in(places: list[tuple[nn.Module, str]], tensor: Tensor, rows: Tensor) -> None:
    """Register a tensor in places where `rows` is at rest: in those of a buffer as a parameter while it is sharded."""
    is_buffer = not isinstance(rows, nn.Parameter)
    for module, name in places:
        if not is_buffer:
            module._parameters[name] = tensor  # type: ignore[assignment]
        elif tensor is rows:
            module._parameters.pop(name, None)
            module._buffers[name] = tensor
        else:
            module._buffers.pop(name, None)
            module._parameters[name] = tensor  # type: ignore[assignment]
