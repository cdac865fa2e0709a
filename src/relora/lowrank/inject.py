"""Injection of low-rank layers into a model, and their removal.

`inject` walks any `nn.Module`, replaces the target modules in place, freezes their weights and reports what it matched.
The rest (embeddings, norms, biases, the head) trains at full rank in pretraining (ReLoRA, arXiv 2307.05695, section 3)
and is frozen in fine-tuning, except for the modules that the configuration names. `merge` is the inverse: it leaves a
plain model with no trace of the factors.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relora.errors import UserError
from relora.lowrank.config import LowRankConfig
from relora.lowrank.divided_layer import divide_layer_, whole_factors
from relora.lowrank.division import gather_, whole_shape
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.targets import choose_targets, full_rank_parameters, is_conv1d
from relora.lowrank.usage import usage_of


@dataclass(frozen=True)
class InjectReport:
    """Result of an injection: what it matched, and how many parameters are frozen or train."""

    targets: dict[str, tuple[int, int]]
    """Path of every replaced layer -> (out, in)."""
    frozen: int
    """Parameters that the optimizer does not train, those of the targets' weights included."""
    low_rank: int
    """Parameters in the factors."""
    full_rank: int
    """Parameters outside the factors that train."""
    moved: int = 0
    """Parameters among the frozen ones that take residual steps, without moments (see `residual`)."""
    notes: tuple[str, ...] = ()
    """Lines on what gets no factors: layers that the settings name and that were left out, and fused experts."""

    @property
    def trainable(self) -> int:
        """The number of parameters that the optimizer trains."""
        return self.low_rank + self.full_rank

    def __str__(self) -> str:
        moved = f", of which {self.moved:,} follow their residual" if self.moved else ""
        return (
            f"{len(self.targets)} low-rank layers; {self.trainable:,} parameters train "
            f"({self.low_rank:,} in factors, {self.full_rank:,} at full rank), {self.frozen:,} are frozen{moved}"
        )


def inject(
    model: nn.Module,
    config: LowRankConfig,
    *,
    seed: int = 0,
    named_exactly: bool = False,
) -> InjectReport:
    """Replace the targets of `config` by `LowRankLinear` in place and freeze their weights; the rest as `config` says.

    Create the optimizer afterwards, because other parameters train than before. Of a model that is divided among
    processes one weight at a time is brought together, stored beside its factors, and divided again.

    Args:
        seed: the run's seed, which together with a layer's path keys the draw of its factors.
        named_exactly: see `choose_targets`.

    Raises:
        UserError: see `choose_targets`, or the model has low-rank layers already. The model has not changed.
    """
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise UserError("the model has low-rank layers already; relora.merge(model) first")
    chosen = choose_targets(model, config, named_exactly=named_exactly)
    full_rank = full_rank_parameters(model, config, chosen.paths)
    usage = usage_of(model) if config.rest == "frozen" and not named_exactly else None
    targets = {}
    for name in chosen.paths:
        module = model.get_submodule(name)
        assert isinstance(module.weight, nn.Parameter)
        division = gather_(module.weight)
        layer = LowRankLinear(module, config, name=name, seed=seed, fan_in_fan_out=is_conv1d(module))
        if division is not None:
            divide_layer_(layer, division)
        layer.train(module.training)
        model.set_submodule(name, layer)
        targets[name] = (layer.out_features, layer.in_features)
    if config.rest == "frozen":
        _freeze_rest(model, full_rank)
    if usage is not None and usage.inside_functions.intersection(targets):
        low_rank_layers(model)[chosen.paths[0]].input_hook = _let_gradients_in(model)
    return _report(model, targets, config, tuple(chosen.notes(config.rest)))


def merge(model: nn.Module) -> None:
    """Merge every update into its weight (in fp32 or better) and put the original layers back, in place.

    This is the inverse of `inject`. A weight that was stored in lower precision comes back as its exact fp32 master.
    Parameters that `inject` froze train again.

    Raises:
        NonFinite: an update is not finite; the message names the layer.
    """
    for layer in low_rank_layers(model).values():
        with whole_factors(layer):
            layer.merge_()
    strip(model)


def strip(model: nn.Module) -> None:
    """Put the original layers back, in place, without merging: the updates in the factors are dropped.

    An initial product that was subtracted from the weight (pissa, gradient-svd) is added back. Parameters that `inject`
    froze train again.
    """
    for name, layer in low_rank_layers(model).items():
        for parameter, required_grad in layer.saved_requires_grad:
            parameter.requires_grad_(required_grad)
        if layer.input_hook is not None:
            layer.input_hook.remove()
        model.set_submodule(name, layer.unwrap())


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return every low-rank layer of the model by its path, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def exact_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that must be saved to continue: parameters and persistent buffers by name.

    Frozen weights are the exact ones. Tied parameters appear once, under their first name. A weight that is stored as
    codes without a master is dequantized into main memory, 4 bytes per parameter.
    """
    exact = {f"{name}.weight": layer.base.exact for name, layer in low_rank_layers(model).items()}
    return _stored_tensors(model) | exact


def load_exact_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors that `exact_tensors` returned into a model of the same structure.

    Raises:
        UserError: a name, a shape or a kind of number (floating point or not) differs. Nothing has been copied.
    """
    layers = low_rank_layers(model)
    own = _stored_tensors(model) | {f"{name}.weight": layer.base.exact_meta for name, layer in layers.items()}
    if own.keys() != tensors.keys():
        differing = ", ".join(sorted(own.keys() ^ tensors.keys())[:4])
        raise UserError(f"the saved tensors are another model's: {differing} are not in both")
    for name, tensor in own.items():
        saved = tensors[name]
        if tensor.shape != saved.shape or tensor.is_floating_point() != saved.is_floating_point():
            kinds = " here, ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (tensor, saved))
            raise UserError(f"the saved tensors are another model's: {name} is {kinds} there")
    for name, tensor in own.items():
        path, _, kind = name.rpartition(".")
        if path in layers and kind == "weight":
            layers[path].base.set_(tensors[name])
        else:
            tensor.copy_(tensors[name])


def _freeze_rest(model: nn.Module, trained: set[int]) -> None:
    """Freeze all parameters except the factors and those whose identities are in `trained`, which are set to train.

    The first low-rank layer remembers which parameters changed, so that `strip` can undo it.
    """
    layers = list(low_rank_layers(model).values())
    of_low_rank_layers = {id(parameter) for layer in layers for parameter in (layer.weight, *layer.factors.values())}
    changed = []
    for parameter in model.parameters():
        trains = id(parameter) in trained
        if id(parameter) not in of_low_rank_layers and parameter.requires_grad != trains:
            changed.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(trains)
            parameter.grad = None
    layers[0].saved_requires_grad = tuple(changed)


def _let_gradients_in(model: nn.Module) -> RemovableHandle | None:
    """Let the output of the input embeddings require a gradient, for blocks inside an autograd function.

    The backward pass of such a function, which computes the gradients of the blocks' factors, runs only if a gradient
    comes to an input of the function, and frozen embeddings ask for none.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Module):
        return None
    return embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, frozen weights in the form in which they are stored."""
    non_persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name not in non_persistent}


def _report(
    model: nn.Module, targets: dict[str, tuple[int, int]], config: LowRankConfig, notes: tuple[str, ...]
) -> InjectReport:
    """Count the parameters of an injected model by how they train."""
    layers = low_rank_layers(model).values()
    low_rank = sum(whole_shape(factor).numel() for layer in layers for factor in layer.factors.values())
    trainable = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(whole_shape(p).numel() for p in model.parameters() if not p.requires_grad)
    for layer in layers:  # nf4 packs two in a byte
        frozen += layer.out_features * layer.in_features - whole_shape(layer.weight).numel()
    moved = sum(math.prod(shape) for shape in targets.values()) if config.residual.scale else 0
    return InjectReport(targets, frozen, low_rank, full_rank=trainable - low_rank, moved=moved, notes=notes)
