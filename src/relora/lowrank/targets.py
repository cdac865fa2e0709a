"""Choice of the layers that get factors, and what is said of those that get none.

`all-linear` takes the linear layers of the repeated blocks that a low-rank layer can replace: the model calls them, a
gradient comes back to them (see `usage`), and r is at most their smaller side. What it leaves out is kept with the
reason. A layer that the user's own pattern names must be one that can have factors, or it is refused.

Experts of a mixture are often one 3-D tensor for all of a block, no linear layers. They get no factors; `Fused` tells
how many of the parameters they are.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from relora.errors import UserError
from relora.lowrank.blocks import block_lists, is_inside
from relora.lowrank.config import LowRankConfig, check_target
from relora.lowrank.division import whole_shape
from relora.lowrank.patterns import compile_end_pattern, compile_pattern
from relora.lowrank.storage.nf4 import check_installed
from relora.lowrank.usage import is_handed_over, usage_of
from relora.messages import short_repr

MOST_KINDS = 3
"""Kinds of layers that a note names."""


@dataclass(frozen=True)
class Fused:
    """Weights in the blocks that belong to no linear layer, such as the fused experts of a mixture."""

    shapes: dict[str, tuple[int, ...]]
    """Name of each such parameter -> its shape."""
    layers: int
    """Number of modules that hold them."""
    share: float
    """Share of the blocks' parameters."""
    experts: bool
    """Whether all of them are experts."""

    def reason(self) -> str:
        """Say that they are no linear layers, and name the first."""
        name, shape = next(iter(self.shapes.items()))
        what = "its experts are fused into tensors" if self.experts else "some weights are 3-D tensors"
        return f"{what} ({name}, {' x '.join(map(str, shape))}), beside which there can be no factors yet"

    def note(self, rest: str) -> str:
        """Say what happens to them; `rest` is that setting of `LowRankConfig`."""
        what = "experts" if self.experts else f"3-D weights ({_kinds(self.shapes)})"
        end = "they train at full rank" if rest == "trained" else "they stay frozen"
        layers = f"{self.layers} layer{'s' if self.layers > 1 else ''}"
        return f"{what} of {layers} ({self.share:.0%} of the blocks' parameters) get no factors: {end}"


@dataclass(frozen=True)
class Targets:
    """Layers of a model that get factors, and what does not."""

    paths: list[str]
    """Paths of the targets, in model order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Path of each other linear layer that the settings name -> the reason why it is left out."""
    fused: Fused | None = None
    """Weights in the blocks that are no linear layers; None if there are none."""

    def notes(self, rest: str) -> list[str]:
        """Say in a line for each reason what gets no factors; `rest` is that setting of `LowRankConfig`."""
        lines = [self.fused.note(rest)] if self.fused else []
        for reason, count in Counter(self.left_out.values()).items():
            kinds = _kinds(path for path, other in self.left_out.items() if other == reason)
            lines.append(f"no factors beside {count} layer{'s' if count > 1 else ''} ({kinds}): {reason}")
        return lines


def find_targets(model: nn.Module, config: LowRankConfig) -> list[str]:
    """Find the paths of the layers that get factors; see `choose_targets`."""
    return choose_targets(model, config).paths


def choose_targets(model: nn.Module, config: LowRankConfig, *, named_exactly: bool = False) -> Targets:
    """Choose the layers that get factors by `config.target_modules`; the model does not change.

    `all-linear` takes the linear layers inside the repeated blocks (those in one of `block_lists`), or, in a model
    without such, all that are not tied and not the output head. It leaves out those that cannot have factors. A pattern
    may name some of those, too, if it also names layers that can.

    Args:
        named_exactly: the patterns are the paths of layers that have factors elsewhere, in an adapter that is read.
            Such layers are taken even if this model would not use their factors.

    Raises:
        UserError: a pattern matches nothing or only layers that cannot have factors, a target shares its weight with
            another module or is one of `config.trained_modules`, r is too large for a target that a pattern names or
            for all of `all-linear`, or the library for the base's storage is not installed.
    """
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) or is_conv1d(one)}
    shared = _shared_weights(model)
    reasons = dict(_unusable(model, linears, only_structure=named_exactly))
    if config.target_modules == "all-linear":
        found, left_out = _all_linear(model, config, linears, shared, reasons)
    else:
        found, left_out = _matching(model, linears, config.target_modules, reasons)
    _check_patterns(config, found)
    for name in found:
        if id(linears[name].weight) in shared:
            raise UserError(
                f"lowrank.target_modules: {name} shares its weight with another module (tied embeddings); leave it out"
            )
        check_target(config, name, *_sides(linears[name]))
    full_rank_parameters(model, config, found)
    if config.base == "nf4":
        check_installed()
    return Targets(found, left_out, _fused(model))


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `Conv1D`, a linear layer whose weight is [in, out].

    It is recognised by its name, so that this package does not need to import a model library.
    """
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def full_rank_parameters(model: nn.Module, config: LowRankConfig, targets: list[str]) -> set[int]:
    """Return the identities of the parameters in `config.trained_modules`.

    Identities, not names, since a tied parameter trains in every module that holds it.

    Raises:
        UserError: a pattern matches a target, no module that has parameters, or only such without a gradient.
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
        if usage := usage_of(model):
            parameters &= {id(parameter) for name, parameter in model.named_parameters() if name in usage.trained}
        if not parameters:
            raise UserError(
                f"lowrank.trained_modules: {min(matched)} never gets a gradient, so it would never train; leave it out"
            )
        found |= parameters
    return found


def _unusable(model: nn.Module, linears: Mapping[str, nn.Module], *, only_structure: bool) -> Iterator[tuple[str, str]]:
    """Yield path and reason of each linear layer that a low-rank layer cannot replace.

    Args:
        only_structure: look at the layers alone, and not at what the model does with them.
    """
    usage = None if only_structure else usage_of(model)
    for name, layer in linears.items():
        parent, _, child = name.rpartition(".")
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            yield name, "its weight is computed from other tensors"
        elif isinstance(layer, nn.Linear) and not _computes_linear(type(layer)):  # type: ignore[arg-type]  # a class is hashable
            yield name, f"a {type(layer).__name__} has a forward pass of its own"
        elif usage is not None and name not in usage.called:
            used = f"{name}.weight" in usage.trained
            yield name, "the model uses its weight without calling it" if used else "the model does not use it"
        elif usage is not None and f"{name}.weight" not in usage.trained:
            yield name, "no gradient comes back to it"
        elif not only_structure and name and is_handed_over(model.get_submodule(parent), child):
            yield name, "fused kernels take its weight and would pass its factors by"


@cache
def _computes_linear(layer_class: Any) -> bool:
    """Tell whether a class of linear layers computes W x + b and nothing else.

    A forward pass of its own (Falcon's, Llama 4's router) is tried on a few numbers, in a layer without attributes of
    its own: a class that needs such computes something else.
    """
    if layer_class.forward is nn.Linear.forward:
        return True
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        layer = nn.Linear(6, 4, dtype=torch.float32)
        x = torch.linspace(-3, 3, 60).view(2, 5, 6) * torch.tensor([1.0, 1000.0]).view(2, 1, 1)
        expected = layer(x)
        layer.__class__ = layer_class
        try:
            found = [layer.train(mode)(x) for mode in (True, False)]
        except Exception:  # of any kind: it needs what a plain layer does not have
            return False
    return all(isinstance(one, Tensor) and torch.allclose(one, expected, rtol=1e-4, atol=1e-4) for one in found)


def _all_linear(
    model: nn.Module,
    config: LowRankConfig,
    linears: Mapping[str, nn.Module],
    shared: set[int],
    reasons: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Return the paths of the linear layers inside the blocks that can have factors, and the others with the reason.

    In a model without blocks, they are all linear layers but the head and tied ones.

    Args:
        shared: identities of the weights that several modules hold.
    """
    lists = block_lists(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    candidates = [name for name in linears if is_inside(name, lists)] or [
        name for name, layer in linears.items() if id(layer.weight) not in shared and layer is not head
    ]
    left_out = {name: reasons[name] for name in candidates if name in reasons}
    for name in candidates:
        if name in left_out:
            continue
        r, smaller = config.of_layer(name).r, min(_sides(linears[name]))
        if id(linears[name].weight) in shared:
            left_out[name] = "another module has the same weight"
        elif r > smaller and r == config.r:  # a rank that a pattern gives this layer is refused
            left_out[name] = f"r ({r}) exceeds its smaller side ({smaller})"
    found = [name for name in candidates if name not in left_out]
    if not found:
        for name in candidates:
            check_target(config, name, *_sides(linears[name]))
        why = f"; {candidates[0]}: {left_out[candidates[0]]}" if candidates else ""
        raise UserError(
            f"lowrank.target_modules: `all-linear` matches nothing; the model has no linear layer to train{why}"
        )
    return found, left_out


def _matching(
    model: nn.Module, linears: Mapping[str, nn.Module], patterns: str | tuple[str, ...], reasons: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the paths that match and can have factors, and those that match and cannot, with the reason.

    The patterns are one regular expression for whole paths, or several endings of paths.
    """
    matches: dict[str, list[str]] = {}
    if isinstance(patterns, str):
        expression = compile_pattern(patterns, "lowrank.target_modules")
        matches[patterns] = [name for name in linears if expression.fullmatch(name)]
    else:
        for pattern in patterns:
            matches[pattern] = [name for name in linears if f".{name}".endswith(f".{pattern}")]
    for pattern, names in matches.items():
        if not names:
            _refuse_fused(model, pattern, is_expression=isinstance(patterns, str))
        if names and all(name in reasons for name in names):
            raise UserError(
                f"lowrank.target_modules: {names[0]} cannot have factors: {reasons[names[0]]}; leave it out"
            )
    missing = [pattern for pattern, names in matches.items() if not names]
    if missing or not matches:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        what = f"{missing[0]!r} matches no linear layer" if missing else "no pattern given"
        fused = _fused(model)
        not_there = f"; {fused.reason()}" if fused else ""
        raise UserError(f"lowrank.target_modules: {what}; the model has {known}{not_there}")
    named = {name for names in matches.values() for name in names}
    found = [name for name in linears if name in named and name not in reasons]
    return found, {name: reason for name, reason in reasons.items() if name in named}


def _refuse_fused(model: nn.Module, pattern: str, *, is_expression: bool) -> None:
    """Raise `UserError` if a pattern that matches no linear layer names a weight that is none, or what holds it."""
    fused = _fused(model)
    for name, shape in (fused.shapes if fused else {}).items():
        for path in (name, name.rpartition(".")[0]):
            if re.fullmatch(pattern, path) if is_expression else f".{path}".endswith(f".{pattern}"):
                what = "fused experts" if fused and fused.experts else "no linear layer"
                raise UserError(
                    f"lowrank.target_modules: {pattern!r} names {what} ({name}, {' x '.join(map(str, shape))}), beside "
                    "which there can be no factors yet; leave it out"
                )


def _fused(model: nn.Module) -> Fused | None:
    """Find the weights in the blocks that are 3-D, or matrices of experts, and are of no linear layer."""
    lists = block_lists(model)
    shapes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, bool] = {}
    total = 0
    for path, module in model.named_modules():
        if not is_inside(path, lists):
            continue
        total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or is_conv1d(module):
            continue
        of_experts = "expert" in f"{path} {type(module).__name__}".lower()
        for name, parameter in module.named_parameters(recurse=False):
            if sum(side > 1 for side in parameter.shape) >= (2 if of_experts else 3):
                shapes[f"{path}.{name}"], experts[path] = tuple(parameter.shape), of_experts
    if not shapes:
        return None
    number = sum(model.get_parameter(name).numel() for name in shapes)
    return Fused(shapes, len(experts), number / total, all(experts.values()))


def _check_patterns(config: LowRankConfig, targets: list[str]) -> None:
    """Raise `UserError` if a pattern for r or lora_alpha matches no target: it would have no effect."""
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            expression = compile_end_pattern(pattern, f"lowrank.{setting}")
            if not any(expression.match(name) for name in targets):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise UserError(f"lowrank.{setting}: {short_repr(pattern)} matches no target; the targets are {known}")


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the identities of the weights that more than one module holds, or a module at several paths."""
    counts = Counter(
        id(weight)
        for _, module in model.named_modules(remove_duplicate=False)
        if (weight := getattr(module, "weight", None)) is not None
    )
    return {identity for identity, count in counts.items() if count > 1}


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Return the sides (out, in) of a linear layer's weight."""
    assert isinstance(layer.weight, Tensor)
    out_features, in_features = whole_shape(layer.weight)
    return (in_features, out_features) if is_conv1d(layer) else (out_features, in_features)


def _kinds(names: Iterable[str]) -> str:
    """Return names with a star for every number in them, each once, and how many more there are."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    more = f" and {len(kinds) - MOST_KINDS} more" if len(kinds) > MOST_KINDS else ""
    return ", ".join(kinds[:MOST_KINDS]) + more
