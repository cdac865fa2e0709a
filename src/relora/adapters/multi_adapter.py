"""Several adapters on one base model, without loading anything twice: one at a time, or another one for every row.

    y_i = W x_i + s B_a A_a x_i        row i of the batch, with its adapter a(i); rows are grouped by adapter
    y_i = m_a / |W + s B_a A_a| (W x_i + s B_a A_a x_i)        with DoRA; the quotient is computed once, at loading

Forward hooks add to what the base's own layers return, so the base is never touched: what is left after the last
adapter is removed is the plain model, bit for bit. For inference alone (`load_adapter` is for training). An adapter
costs its own size, and a step of it the thin products; a merged model costs neither and has one adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relora.adapters.peft_format import Factors, read_adapter
from relora.adapters.save_load import check_fits
from relora.errors import UserError
from relora.lowrank.inject import is_conv1d
from relora.lowrank.linear import LowRankLinear

Which = str | None | Sequence[str | None]
"""An adapter's name for all rows, None for the plain model, or one of these for each row of the batch."""


class Adapters:
    """The adapters of one model in memory; the model itself is called as always.

    adapters = Adapters(model.eval())
    adapters.load("fr", "adapters/french")
    adapters.use("fr")                    # or: adapters.use(["fr", None, "de"]), for batches of three rows
    model.generate(...)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites: dict[str, _Site] = {}
        self._sizes: dict[str, int] = {}
        self._active = _Active()

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded, in the order of loading."""
        return list(self._sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes that each adapter takes in memory."""
        return dict(self._sizes)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter; it acts from the next `use` of it on.

        Raises:
            UserError: the name is taken, it is no adapter, or that of another base. Nothing has changed.
        """
        if name in self._sizes:
            raise UserError(f"{name}: an adapter of this name is loaded; remove it first, or give another name")
        adapter = read_adapter(folder)
        check_fits(adapter, self._model, folder)
        updates: dict[str, _Update] = {}
        for path, factors in adapter.layers.items():
            updates[path] = _update(self._model.get_submodule(path), factors)
        for key, tensor in adapter.others.items():
            path, _, parameter = key.rpartition(".")
            module = self._model.get_submodule(path)
            if any(module.children()):
                raise UserError(f"{folder}: `{key}` belongs to no innermost module, so it cannot be switched")
            like = module.get_parameter(parameter) if parameter in module._parameters else module.get_buffer(parameter)
            updates.setdefault(path, _Update()).tensors[parameter] = tensor.to(like.device, like.dtype, copy=True)
        for path, update in updates.items():
            if path not in self._sites:
                self._sites[path] = _Site(self._model.get_submodule(path), self._active)
            self._sites[path].updates[name] = update
        self._sizes[name] = sum(update.bytes for update in updates.values())

    def use(self, which: Which) -> None:
        """Let an adapter act on all rows, none (None), or for each row of the batches to come the one named for it.

        Raises:
            UserError: an adapter that is not loaded, or an empty list. Nothing has changed.
        """
        rows = [which] if which is None or isinstance(which, str) else list(which)
        if not rows:
            raise UserError("give the name of an adapter, None, or one of these for each row of the batch")
        for name in rows:
            if name is not None and name not in self._sizes:
                raise UserError(f"{name}: no such adapter is loaded; loaded are {', '.join(self._sizes) or 'none'}")
        self._active.rows = None if which is None or isinstance(which, str) else len(rows)
        self._active.groups = {name: [i for i, row in enumerate(rows) if row == name] for name in rows if name}

    def remove(self, name: str) -> None:
        """Forget an adapter and free its memory; where it is in use, no adapter is from now on."""
        if name not in self._sizes:
            raise UserError(f"{name}: no such adapter is loaded; loaded are {', '.join(self._sizes) or 'none'}")
        if name in self._active.groups:
            self.use(None)
        del self._sizes[name]
        for path, site in list(self._sites.items()):
            site.updates.pop(name, None)
            if not site.updates:
                site.handle.remove()
                del self._sites[path]


@dataclass
class _Active:
    """What all sites look at."""

    groups: dict[str, list[int]] = field(default_factory=dict)
    """Rows of the batch by adapter."""
    rows: int | None = None
    """Of a batch, where they were named one by one; None if one adapter is for all."""


@dataclass
class _Update:
    """What one adapter does at one module."""

    factors: Factors | None = None
    row_scale: Tensor | None = None
    """m / |W + s B A| [out] with DoRA."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """In place of the module's own."""

    @property
    def bytes(self) -> int:
        tensors = [*self.tensors.values(), *(self.factors.tensors if self.factors else ())]
        return sum(tensor.nbytes for tensor in (*tensors, *([] if self.row_scale is None else [self.row_scale])))

    def of(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output for input x, of which the base makes y."""
        if self.tensors:
            y = _with(module, self.tensors, x)
        if self.factors is None:
            return y
        low = torch.promote_types(y.dtype, self.factors.lora_A.dtype)
        update = self.factors.scaling * F.linear(
            F.linear(x.to(low), self.factors.lora_A.to(low)), self.factors.lora_B.to(low)
        )
        if self.row_scale is None:
            return (y.to(low) + update).to(y.dtype)
        bias = self.tensors.get("bias", module.bias)
        if not isinstance(bias, Tensor):
            return (self.row_scale * (y.to(low) + update)).to(y.dtype)
        return (self.row_scale * (y.to(low) - bias + update) + bias).to(y.dtype)


class _Site:
    """One module and what the adapters do there, as a hook on its forward."""

    def __init__(self, module: nn.Module, active: _Active) -> None:
        self.updates: dict[str, _Update] = {}
        self._active = active
        self.handle: RemovableHandle = module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        groups = {name: rows for name, rows in self._active.groups.items() if name in self.updates}
        if not groups:
            return y
        if module.training:
            raise UserError("several adapters serve inference alone: call model.eval(), or train with load_adapter")
        x = arguments[0]
        if self._active.rows is None:
            (name,) = groups
            return self.updates[name].of(module, x, y)
        if len(x) != self._active.rows:
            raise UserError(f"adapters were named for {self._active.rows} rows, but the batch has {len(x)}")
        mixed = y.clone()
        for name, rows in groups.items():
            index = torch.tensor(rows, device=x.device)
            mixed[index] = self.updates[name].of(module, x[index], y[index])
        return mixed


@torch.no_grad()
def _update(module: nn.Module, factors: Factors) -> _Update:
    """An adapter's factors beside a layer: on its device, in fp32 or the layer's finer precision."""
    weight = _weight(module)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (tensor.to(weight.device, dtype, copy=True) for tensor in (factors.lora_A, factors.lora_B))
    if factors.magnitude is None:
        return _Update(Factors(a, b, factors.scaling))
    near = Factors(a, b, factors.scaling, factors.magnitude.to(weight.device))
    return _Update(Factors(a, b, factors.scaling), row_scale=near.row_scale(near.delta(dtype) + weight))


def _weight(module: nn.Module) -> Tensor:
    """What a linear layer of any kind multiplies by [out, in]."""
    if isinstance(module, LowRankLinear):
        exact = module.base.exact.to(module.weight.device)
        return module.base.reorient(exact + module.delta().to(exact))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def _with(module: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The module's output for x with other parameters; its own are back afterwards."""
    places = {name: module._parameters if name in module._parameters else module._buffers for name in tensors}
    own = {name: places[name][name] for name in tensors}
    try:
        for name, tensor in tensors.items():
            places[name][name] = tensor  # type: ignore[assignment]
        output: Tensor = module.forward(x)
        return output
    finally:
        for name, mine in own.items():
            places[name][name] = mine  # type: ignore[assignment]
