"""Injection of low-rank layers into a model, and their removal.

`inject` walks any `nn.Module`, replaces the target modules in place, freezes their weights and reports what it matched.
The rest (embeddings, norms, biases, the head) trains at full rank in pretraining (ReLoRA, arXiv 2307.05695, section 3)
and is frozen in fine-tuning, except for the modules that the configuration names. `merge` is the inverse: it leaves a
plain model with no trace of the factors.
"""

import math
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank.blocks import block_lists, is_inside
from relora.lowrank.config import LowRankConfig, check_target
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.patterns import compile_end_pattern, compile_pattern
from relora.lowrank.storage.nf4 import check_installed
from relora.messages import short_repr


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


def inject(model: nn.Module, config: LowRankConfig, *, seed: int = 0) -> InjectReport:
    """Replace the targets of `config` by `LowRankLinear` in place and freeze their weights; the rest as `config` says.

    Create the optimizer afterwards, because other parameters train than before.

    Args:
        seed: the run's seed, which together with a layer's path keys the draw of its factors.

    Raises:
        UserError: see `find_targets`, or the model has low-rank layers already. The model has not changed.
    """
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise UserError("the model has low-rank layers already; relora.merge(model) first")
    paths = find_targets(model, config)
    full_rank = _full_rank_parameters(model, config, paths)
    targets = {}
    for name in paths:
        module = model.get_submodule(name)
        layer = LowRankLinear(module, config, name=name, seed=seed, fan_in_fan_out=is_conv1d(module))
        layer.train(module.training)
        model.set_submodule(name, layer)
        targets[name] = (layer.out_features, layer.in_features)
    if config.rest == "frozen":
        _freeze_rest(model, full_rank)
    return _report(model, targets, config)


def merge(model: nn.Module) -> None:
    """Merge every update into its weight (in fp32 or better) and put the original layers back, in place.

    This is the inverse of `inject`. A weight that was stored in lower precision comes back as its exact fp32 master.
    Parameters that `inject` froze train again.

    Raises:
        NonFinite: an update is not finite; the message names the layer.
    """
    for layer in low_rank_layers(model).values():
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


def find_targets(model: nn.Module, config: LowRankConfig) -> list[str]:
    """Find the paths of the layers that `config.target_modules` names, in model order; the model does not change.

    `all-linear` takes every linear layer inside the repeated blocks (those in one of `block_lists`), or, in a model
    without such, every linear layer that is not tied and not the output head.

    Raises:
        UserError: a pattern matches nothing, a target shares its weight with another module or is one of
            `config.trained_modules`, r is too large for a target, or the library for the base's storage is not
            installed.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    shared = _shared_weights(model)
    if config.target_modules == "all-linear":
        found = _linear_layers_of_blocks(model, linears, shared)
    else:
        found = _matching(linears, config.target_modules)
    _check_patterns(config, found)
    for name in found:
        if id(linears[name].weight) in shared:
            raise UserError(
                f"lowrank.target_modules: {name} shares its weight with another module (tied embeddings); leave it out"
            )
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        if is_conv1d(linears[name]):
            out_features, in_features = in_features, out_features
        check_target(config, name, out_features, in_features)
    _full_rank_parameters(model, config, found)
    if config.base == "nf4":
        check_installed()
    return found


def _linear_layers_of_blocks(model: nn.Module, linears: dict[str, nn.Module], shared: set[int]) -> list[str]:
    """Return the paths of the linear layers inside the blocks; in a model without blocks, of all but head and tied.

    Args:
        shared: identities of the weights that several modules hold.
    """
    lists = block_lists(model)
    in_blocks = [name for name in linears if is_inside(name, lists)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    free = [name for name, layer in linears.items() if id(layer.weight) not in shared and layer is not head]
    if not (in_blocks or free):
        raise UserError("lowrank.target_modules: `all-linear` matches nothing; the model has no linear layer to train")
    return in_blocks or free


def _matching(linears: dict[str, nn.Module], patterns: str | tuple[str, ...]) -> list[str]:
    """Return the paths that match: one regular expression for whole paths, or any of several endings of paths."""
    if isinstance(patterns, str):
        expression = compile_pattern(patterns, "lowrank.target_modules")
        found = [name for name in linears if expression.fullmatch(name)]
        missing = [] if found else [patterns]
    else:
        matches = {pattern: [name for name in linears if f".{name}".endswith(f".{pattern}")] for pattern in patterns}
        missing = [pattern for pattern, names in matches.items() if not names]
        found = [name for name in linears if any(name in names for names in matches.values())]
    if missing or not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        what = f"{missing[0]!r} matches no linear layer" if missing else "no pattern given"
        raise UserError(f"lowrank.target_modules: {what}; the model has {known}")
    return found


def _check_patterns(config: LowRankConfig, targets: list[str]) -> None:
    """Raise `UserError` if a pattern for r or lora_alpha matches no target: it would have no effect."""
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            expression = compile_end_pattern(pattern, f"lowrank.{setting}")
            if not any(expression.match(name) for name in targets):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise UserError(f"lowrank.{setting}: {short_repr(pattern)} matches no target; the targets are {known}")


def _full_rank_parameters(model: nn.Module, config: LowRankConfig, targets: list[str]) -> set[int]:
    """Return the identities of the parameters in `config.trained_modules`.

    Identities, not names, since a tied parameter trains in every module that holds it.

    Raises:
        UserError: a pattern matches a target, or no module that has parameters.
    """
    found: set[int] = set()
    for pattern in config.trained_modules:
        expression = compile_end_pattern(pattern, "lowrank.trained_modules")
        matched = {name: module for name, module in model.named_modules() if name and expression.match(name)}
        for name in sorted(matched.keys() & targets):
            raise UserError(
                f"lowrank.trained_modules: {name} is a target of lowrank.target_modules; leave it out of one of the two"
            )
        parameters = {id(parameter) for module in matched.values() for parameter in module.parameters()}
        if not parameters:
            owners = {path.rpartition(".")[0] for path, _ in model.named_parameters()}.difference(targets, ("",))
            raise UserError(
                f"lowrank.trained_modules: {short_repr(pattern)} matches no module that has parameters; "
                f"the model has {', '.join(sorted({path.rpartition('.')[2] for path in owners}))}"
            )
        found |= parameters
    return found


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


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, frozen weights in the form in which they are stored."""
    non_persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name not in non_persistent}


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `Conv1D`, a linear layer whose weight is [in, out].

    It is recognised by its name, so that this package does not need to import a model library.
    """
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the identities of the weights that more than one module holds."""
    counts = Counter(
        id(weight) for module in model.modules() if (weight := getattr(module, "weight", None)) is not None
    )
    return {identity for identity, count in counts.items() if count > 1}


def _report(model: nn.Module, targets: dict[str, tuple[int, int]], config: LowRankConfig) -> InjectReport:
    """Count the parameters of an injected model by how they train."""
    layers = low_rank_layers(model).values()
    low_rank = sum(factor.numel() for layer in layers for factor in layer.factors.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen += sum(layer.base.shape.numel() - layer.weight.numel() for layer in layers)  # nf4 packs two in a byte
    moved = sum(math.prod(shape) for shape in targets.values()) if config.residual.scale else 0
    return InjectReport(targets=targets, frozen=frozen, low_rank=low_rank, full_rank=trainable - low_rank, moved=moved)
