"""Put low-rank layers into a model, and take them out again.

`inject` walks any `nn.Module`, swaps the targets in place, freezes their weights and reports what it matched. The rest
(embeddings, norms, biases, the head) trains at full rank in pretraining (ReLoRA, arXiv 2307.05695, section 3) and is
frozen in fine-tuning, but for modules that are named. `merge` is the way back: a plain model with no trace of the
factors.
"""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank.config import LowRankConfig, check_target
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.patterns import at_the_end, compiled
from relora.lowrank.storage.nf4 import check_installed
from relora.messages import short_repr


@dataclass(frozen=True)
class InjectReport:
    """What an injection matched, froze and trains; counts are parameters."""

    targets: dict[str, tuple[int, int]]
    """Path of every replaced layer -> (out, in)."""
    frozen: int
    low_rank: int
    full_rank: int
    moved: int = 0
    """Of the frozen ones, those that follow their gradient without moments (see `residual`)."""

    @property
    def trainable(self) -> int:
        """Parameters that the optimizer trains."""
        return self.low_rank + self.full_rank

    def __str__(self) -> str:
        moved = f", of which {self.moved:,} follow their residual" if self.moved else ""
        return (
            f"{len(self.targets)} low-rank layers; {self.trainable:,} parameters train "
            f"({self.low_rank:,} in factors, {self.full_rank:,} at full rank), {self.frozen:,} are frozen{moved}"
        )


def inject(model: nn.Module, config: LowRankConfig, *, seed: int = 0) -> InjectReport:
    """Replace the targets of `config` by `LowRankLinear` in place, freeze their weights, and the rest if it says so.

    Build the optimizer afterwards: what trains has changed.

    Raises:
        UserError: see `find_targets`, or the model has low-rank layers already. The model is left untouched.
    """
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise UserError("the model has low-rank layers already; relora.merge(model) first")
    paths = find_targets(model, config)
    in_full = _trained_in_full(model, config, paths)
    targets = {}
    for name in paths:
        module = model.get_submodule(name)
        layer = LowRankLinear(module, config, name=name, seed=seed, fan_in_fan_out=is_conv1d(module))
        layer.train(module.training)
        model.set_submodule(name, layer)
        targets[name] = (layer.out_features, layer.in_features)
    if config.rest == "frozen":
        _switch_rest(model, in_full)
    return _report(model, targets, config)


def merge(model: nn.Module) -> None:
    """Merge every factor into its weight (fp32 or better) and put the plain layers back, in place; inverse of `inject`.

    A weight that was stored coarsely comes back as its exact fp32 master; what was frozen trains again.

    Raises:
        NonFinite: an update is not finite; it names the layer.
    """
    for layer in low_rank_layers(model).values():
        layer.merge_()
    strip(model)


def strip(model: nn.Module) -> None:
    """Put the plain layers back, in place, with their weights as they are; what the factors hold is dropped.

    Factors that began with a part of the weight give that back. What `inject` froze trains again.
    """
    for name, layer in low_rank_layers(model).items():
        for parameter, trained in layer.switched:
            parameter.requires_grad_(trained)
        model.set_submodule(name, layer.plain())


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Every low-rank layer by its path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def exact_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that must be saved to continue: parameters and persistent buffers by name, frozen weights unrounded.

    Tied parameters appear once, under their first name. Of a weight that is codes alone, what they stand for is made in
    main memory, 4 bytes a parameter.
    """
    exact = {f"{name}.weight": layer.base.exact for name, layer in low_rank_layers(model).items()}
    return _stored_tensors(model) | exact


def load_exact_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `exact_tensors` into a model of the same structure.

    Raises:
        UserError: names, a shape or a type differ. Nothing was copied.
    """
    layers = low_rank_layers(model)
    own = _stored_tensors(model) | {f"{name}.weight": layer.base.outline for name, layer in layers.items()}
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
    """Paths of the layers that `config.target_modules` names, in model order; nothing is changed.

    `all-linear` takes every linear layer inside the repeated blocks (those in an `nn.ModuleList`), or, in a model
    without such, every linear layer that is not tied and not the output head.

    Raises:
        UserError: a pattern matches nothing, a target shares its weight with another module or is to train in full, r
            is too large for one, or the library that stores the base is not installed.
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
        out, inn = model.get_parameter(f"{name}.weight").shape[:: -1 if is_conv1d(linears[name]) else 1]
        check_target(config, name, out, inn)
    _trained_in_full(model, config, found)
    if config.base == "nf4":
        check_installed()
    return found


def _linear_layers_of_blocks(model: nn.Module, linears: dict[str, nn.Module], shared: set[int]) -> list[str]:
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    in_blocks = [name for name in linears if name.startswith(lists)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    free = [name for name, layer in linears.items() if id(layer.weight) not in shared and layer is not head]
    if not (in_blocks or free):
        raise UserError("lowrank.target_modules: `all-linear` matches nothing; the model has no linear layer to train")
    return in_blocks or free


def _matching(linears: dict[str, nn.Module], patterns: str | tuple[str, ...]) -> list[str]:
    """Names matched by one regular expression on whole paths, or by any of a list of path endings."""
    if isinstance(patterns, str):
        expression = compiled(patterns, "lowrank.target_modules")
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
    """A pattern that matches no target is a mistake, and would go unseen."""
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            expression = at_the_end(pattern, f"lowrank.{setting}")
            if not any(expression.match(name) for name in targets):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise UserError(f"lowrank.{setting}: {short_repr(pattern)} matches no target; the targets are {known}")


def _trained_in_full(model: nn.Module, config: LowRankConfig, targets: list[str]) -> set[int]:
    """Identities of the parameters in `config.trained_modules`: a tied one trains wherever it stands."""
    found: set[int] = set()
    for pattern in config.trained_modules:
        expression = at_the_end(pattern, "lowrank.trained_modules")
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


def _switch_rest(model: nn.Module, trained: set[int]) -> None:
    """Let train what is in `trained`, and nothing else beside the factors; the first layer keeps what was changed."""
    layers = list(low_rank_layers(model).values())
    of_updates = {id(p) for layer in layers for p in (layer.weight, *layer.factors.values())}
    changed = []
    for parameter in model.parameters():
        wanted = id(parameter) in trained
        if id(parameter) not in of_updates and parameter.requires_grad != wanted:
            changed.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(wanted)
            parameter.grad = None
    layers[0].switched = tuple(changed)


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, frozen weights as they are stored."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`: a linear layer whose weight is [in, out]. By name, so that this wing needs no model library."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of the weights that more than one module holds."""
    counts = Counter(
        id(weight) for module in model.modules() if (weight := getattr(module, "weight", None)) is not None
    )
    return {identity for identity, count in counts.items() if count > 1}


def _report(model: nn.Module, targets: dict[str, tuple[int, int]], config: LowRankConfig) -> InjectReport:
    layers = low_rank_layers(model).values()
    low_rank = sum(factor.numel() for layer in layers for factor in layer.factors.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    packed = sum(layer.base.shape.numel() - layer.weight.numel() for layer in layers)  # nf4: two in a byte
    moved = sum(out * inn for out, inn in targets.values()) if config.residual.scale else 0
    return InjectReport(
        targets=targets, frozen=frozen + packed, low_rank=low_rank, full_rank=trainable - low_rank, moved=moved
    )
