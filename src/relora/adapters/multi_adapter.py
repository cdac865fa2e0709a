"""Several adapters on one base model in memory: one of them for the whole batch, or one for each row of it.

    y_i = W x_i + s B_a A_a x_i        row i of the batch, with its adapter a = a(i); rows are grouped by adapter
    y_i = m_a / |W + s B_a A_a| (W x_i + s B_a A_a x_i)        with DoRA; the quotient is computed once, at loading

Forward hooks add the update to what the base's own layers return. No weight of the base changes, so after the last
adapter is removed the model is the plain one, bit for bit. This is for inference alone; `load_adapter` is for training.
The price: each adapter takes its own size in memory, and each forward pass the products with A and B. A merged model
has neither cost, but it has one adapter only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.compatibility import all_tensors, check_fits, tied_names, warn_of_notes
from relora.adapters.peft_format import read_adapter
from relora.adapters.whole_tensors import settled
from relora.errors import UserError
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.targets import is_conv1d

Which = str | None | Sequence[str | None]
"""Selection of adapters: one name for all rows, None for the plain model, or a sequence of these, one for each row."""


class Adapters:
    """The LoRA adapters of one model in memory; the model itself is called as without adapters.

    adapters = Adapters(model.eval())
    adapters.load("fr", "adapters/french")
    adapters.use("fr")                    # or: adapters.use(["fr", None, "de"]), for batches of three rows
    model.generate(...)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooked: dict[str, _HookedModule] = {}
        self._sizes: dict[str, int] = {}
        self._selection = _Selection()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order of loading."""
        return list(self._sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes that each adapter takes in memory, by its name."""
        return dict(self._sizes)

    def load(self, name: str, folder: str | Path) -> None:
        """Read the adapter in `folder` into memory under a name; it has no effect until `use` selects it.

        Raises:
            UserError: an adapter of this name is loaded, the folder holds no adapter, or the adapter is for another
                base or replaces a tensor of a module that has children. Nothing has changed.
        """
        adapter = read_adapter(folder)
        self.add(name, adapter, folder)
        warn_of_notes(folder, adapter, self._model)

    def add(self, name: str, adapter: Adapter, folder: str | Path) -> None:
        """Take an adapter that was read from `folder`; see `load`."""
        if name in self._sizes:
            raise UserError(f"{name}: an adapter of this name is loaded; remove it first, or give another name")
        check_fits(adapter, self._model, folder)
        tensors = all_tensors(self._model)
        adapter = settled(adapter, lambda key: tensors[key].detach(), lambda key: tied_names(self._model, key), folder)
        updates: dict[str, _Update] = {}
        for path, factors in adapter.layers.items():
            replaced = adapter.others.get(f"{path}.weight")
            updates[path] = _low_rank_update(self._model.get_submodule(path), factors, replaced)
        for key, tensor in adapter.others.items():
            path, _, parameter = key.rpartition(".")
            module = self._model.get_submodule(path)
            if any(module.children()):
                raise UserError(f"{folder}: `{key}` belongs to no innermost module, so it cannot be switched")
            like = module.get_parameter(parameter) if parameter in module._parameters else module.get_buffer(parameter)
            updates.setdefault(path, _Update()).tensors[parameter] = tensor.to(like.device, like.dtype, copy=True)
        for path, update in updates.items():
            if path not in self._hooked:
                self._hooked[path] = _HookedModule(self._model.get_submodule(path), self._selection)
            self._hooked[path].updates[name] = update
        self._sizes[name] = sum(update.bytes for update in updates.values())

    def use(self, which: Which) -> None:
        """Select the adapter for all rows of the following batches, none of them (None), or one for each row.

        Raises:
            UserError: an adapter is not loaded, or the sequence is empty. Nothing has changed.
        """
        rows = [which] if which is None or isinstance(which, str) else list(which)
        if not rows:
            raise UserError("give the name of an adapter, None, or one of these for each row of the batch")
        for name in rows:
            if name is not None and name not in self._sizes:
                raise UserError(f"{name}: no such adapter is loaded; loaded are {', '.join(self._sizes) or 'none'}")
        self._selection.row_count = None if which is None or isinstance(which, str) else len(rows)
        self._selection.rows_by_adapter = {
            name: [i for i, row in enumerate(rows) if row == name] for name in rows if name
        }

    def remove(self, name: str) -> None:
        """Unload an adapter and free its memory; if it is in use, the plain model is in use from now on.

        Raises:
            UserError: no adapter of this name is loaded.
        """
        if name not in self._sizes:
            raise UserError(f"{name}: no such adapter is loaded; loaded are {', '.join(self._sizes) or 'none'}")
        if name in self._selection.rows_by_adapter:
            self.use(None)
        del self._sizes[name]
        for path, hooked in list(self._hooked.items()):
            hooked.updates.pop(name, None)
            if not hooked.updates:
                hooked.handle.remove()
                del self._hooked[path]


@dataclass
class _Selection:
    """The adapters in use; one object that all hooked modules share."""

    rows_by_adapter: dict[str, list[int]] = field(default_factory=dict)
    """Rows of the batch by the name of their adapter; rows of the plain model are left out."""
    row_count: int | None = None
    """Number of rows that a batch must have, if adapters were selected row by row; None if one is for all rows."""


@dataclass
class _Update:
    """The part of one adapter that belongs to one module: low-rank factors, replaced tensors, or both."""

    factors: Factors | None = None
    row_scale: Tensor | None = None
    """m / |W + s B A| [out] with DoRA; None without."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that were trained in full and replace the module's own, by name."""

    @property
    def bytes(self) -> int:
        """Size in memory."""
        tensors = list(self.tensors.values())
        if self.factors is not None:
            tensors += self.factors.tensors
        if self.row_scale is not None:
            tensors.append(self.row_scale)
        return sum(tensor.nbytes for tensor in tensors)

    def apply(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the module's output for the input x with this adapter; y is its output without an adapter."""
        if self.tensors:
            y = _forward_with(module, self.tensors, x)
        if self.factors is None:
            return y
        dtype = torch.promote_types(y.dtype, self.factors.lora_A.dtype)
        update = self.factors.scaling * F.linear(
            F.linear(x.to(dtype), self.factors.lora_A.to(dtype)), self.factors.lora_B.to(dtype)
        )
        if self.row_scale is None:
            return (y.to(dtype) + update).to(y.dtype)
        bias = self.tensors.get("bias", module.bias)
        if not isinstance(bias, Tensor):
            return (self.row_scale * (y.to(dtype) + update)).to(y.dtype)
        return (self.row_scale * (y.to(dtype) - bias + update) + bias).to(y.dtype)


class _HookedModule:
    """One module, the updates that the loaded adapters have for it, and the forward hook that applies them."""

    def __init__(self, module: nn.Module, selection: _Selection) -> None:
        self.updates: dict[str, _Update] = {}
        self._selection = selection
        self.handle: RemovableHandle = module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Replace the module's output y by that with the selected adapters; rows without an adapter keep theirs."""
        groups = {name: rows for name, rows in self._selection.rows_by_adapter.items() if name in self.updates}
        if not groups:
            return y
        if module.training:
            raise UserError("several adapters serve inference alone: call model.eval(), or train with load_adapter")
        x = arguments[0]
        row_count = self._selection.row_count
        if row_count is None:
            (name,) = groups
            return self.updates[name].apply(module, x, y)
        if len(x) != row_count:
            raise UserError(f"adapters were named for {row_count} rows, but the batch has {len(x)}")
        mixed = y.clone()
        for name, rows in groups.items():
            index = torch.tensor(rows, device=x.device)
            mixed[index] = self.updates[name].apply(module, x[index], y[index])
        return mixed


@torch.no_grad()
def _low_rank_update(module: nn.Module, factors: Factors, replaced: Tensor | None) -> _Update:
    """Copy an adapter's factors to a layer's device, in fp32 or the layer's own precision if that is higher.

    Args:
        replaced: the weight that the adapter puts into the place of the layer's own, if any.
    """
    weight = _effective_weight(module)
    if replaced is not None:
        weight = (replaced.T if is_conv1d(module) else replaced).to(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_A, lora_B = (tensor.to(weight.device, dtype, copy=True) for tensor in (factors.lora_A, factors.lora_B))
    copied = Factors(lora_A, lora_B, factors.scaling)
    if factors.magnitude is None:
        return _Update(copied)
    with_magnitude = replace(copied, magnitude=factors.magnitude.to(weight.device))
    return _Update(copied, row_scale=with_magnitude.row_scale(copied.delta(dtype) + weight))


def _effective_weight(module: nn.Module) -> Tensor:
    """Return the weight [out, in] that a linear layer multiplies by; of a low-rank layer, W + s B A."""
    if isinstance(module, LowRankLinear):
        exact = module.base.exact.to(module.weight.device)
        return module.base.reorient(exact + module.delta().to(exact))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_conv1d(module) else weight


def _forward_with(module: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Run a module's forward pass on x with other parameters and buffers; afterwards it has its own again."""
    registries = {name: module._parameters if name in module._parameters else module._buffers for name in tensors}
    own_tensors = {name: registries[name][name] for name in tensors}
    try:
        for name, tensor in tensors.items():
            registries[name][name] = tensor  # type: ignore[assignment]
        output: Tensor = module.forward(x)
        return output
    finally:
        for name, own_tensor in own_tensors.items():
            registries[name][name] = own_tensor  # type: ignore[assignment]
