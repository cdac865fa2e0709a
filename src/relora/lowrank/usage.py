"""Layers and parameters that a model uses, found by a pass through it with tensors that have no memory.

A layer can be replaced by a low-rank one only if the model calls it. Some layers are never called, since another module
computes with their weight (Gemma 3n's correction coefficients in training), or since nothing needs them (attention to
an encoder, in a decoder that stands alone). Others are called, but no gradient comes back to them: their output only
selects (the indexers of sparse attention). `usage_of` finds both. It sends a few token ids through the model, in
training mode, and walks from the logits back along autograd's graph to the parameters.

The tensors are torch's fake ones: every operation gives shapes and a graph, but no numbers. So a model of any size
takes about a second, its weights and buffers do not change, no random number is drawn, and a model on the meta device
gives the same answer as one with weights. The price: what numbers decide is not seen. Where a shape depends on them,
`stand_in` chooses one, so that every expert gets tokens; where that does not help, the real model is run. A member of a
list inside a block counts as used if another member of the list is.

A second rule reads the source of the model's classes: where a method hands the weight of a layer to a function
(`self.out_proj.weight` as an argument, as Mamba's blocks do), that function is a fused kernel which passes the layer
by, even if this machine does not have it and calls the layer.
"""

import ast
import inspect
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode

from relora.messages import first_line

FEWEST_TOKENS = 23
"""Tokens of the first pass; a second one is longer, if something is not used in the first. The number is a prime, so
that a model which takes only multiples of a number is found out."""
MOST_TOKENS = 512
"""Tokens of the second pass where the length of a sequence is not given: some layers work on blocks of many tokens."""
_NO_COMPUTATION = {"isinstance", "getattr", "hasattr", "id", "type"}
"""Functions that are given a weight without computing with it."""
_aten = torch.ops.aten


@dataclass(frozen=True)
class Usage:
    """Modules and parameters that a pass through a model uses."""

    called: frozenset[str]
    """Paths of the modules whose forward pass ran."""
    trained: frozenset[str]
    """Names of the parameters to which a gradient comes back from the logits."""
    tokens: int
    """Length of the shortest sequence that was tried and taken."""
    inside_functions: frozenset[str] = frozenset()
    """Paths of the modules that run inside an autograd function of the model's own, as reversible blocks do. Its
    backward pass computes their gradients, and runs only if a gradient comes to an input of the function."""


_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], int | None, Usage | None]] = WeakKeyDictionary()
"""Results by model, with the identities of its modules and the tokens; no computed number depends on them."""


def usage_of(model: nn.Module, tokens: int | None = None) -> Usage | None:
    """Tell what a pass through the model uses; None if it takes no `input_ids`, or does not run on them alone.

    The first call for a model takes the pass, later ones return its result. The model does not change.

    Args:
        tokens: length of a sequence in training; unless given, that of an earlier call for the model.
    """
    modules = tuple(map(id, model.modules()))
    known = _KNOWN.get(model)
    if known is not None and tokens is None:
        tokens = known[1]
    if known is None or known[:2] != (modules, tokens):
        known = (modules, tokens, _find_usage(model, tokens))
        _KNOWN[model] = known
    return known[2]


def is_handed_over(parent: nn.Module, child: str) -> bool:
    """Tell whether a method of `parent` hands the whole weight of its layer `child` to a function or an operator.

    A part of the weight (`self.dense.weight[:, a:b]`), a method of it and a look at its dtype do not count.
    """
    return any(child in _weights_handed_over(each) for each in type(parent).__mro__)


@cache
def _weights_handed_over(module_class: type) -> frozenset[str]:
    """Return the names x such that a method of the class has `self.x.weight` as an argument or an operand."""
    if not issubclass(module_class, nn.Module) or module_class.__module__.startswith("torch."):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(module_class)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    found: set[str] = set()
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name.startswith(("__init", "_init", "reset_", "tie_")):
            continue
        for node in ast.walk(method):
            values: list[ast.expr] = []
            if isinstance(node, ast.BinOp):
                values = [node.left, node.right]
            elif isinstance(node, ast.Call) and not (
                isinstance(node.func, ast.Name) and node.func.id in _NO_COMPUTATION
            ):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
            found.update(name for value in values if (name := _weight_of_self(value)))
    return frozenset(found)


def _weight_of_self(node: ast.expr) -> str | None:
    """Return x of an expression `self.x.weight`; None for another one."""
    match node:
        case ast.Attribute(attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self"))):
            return name
    return None


class StandIns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives tensors without memory a result where the real one's shape or value depends on numbers (`stand_in`)."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, chosen = stand_in(function, args)
        return function(*args, **(kwargs or {})) if chosen is None else chosen[0]


def stand_in(function: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any] | None]:
    """Choose the result of an operation that tensors without memory cannot give.

    A number is 0: no label is ignored, no check has failed. All entries of a mask are set, so that every expert gets
    every token that it may get. A product of groups of rows has the shape that it has on the real device, where it
    takes more dtypes than fake tensors allow.

    Returns:
        The arguments with which to call the operation, and its result in a tuple, or None if it is to be called.
    """
    if function is _aten._local_scalar_dense.default:
        return args, (0,)
    if function is _aten.nonzero.default:
        return args, (args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long),)
    if function is _aten._grouped_mm.default:
        left, right = args[0], args[1]
        if left.dim() == right.dim() == 2:  # the gradient of the weight of every group
            return args, (left.new_empty(args[2].shape[0], left.shape[0], right.shape[1]),)
        return args, (left.new_empty(*left.shape[:-1], right.shape[-1]),)
    if function is _aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1]):
        indices: list[Tensor | None] = []
        for one in args[1]:
            if one is not None and one.dtype == torch.bool:
                indices += [one.new_empty(one.numel(), dtype=torch.long) for _ in range(one.dim())]
            else:
                indices.append(one)
        return (args[0], indices), None
    return args, None


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let the code inside the block compute with tensors that have no numbers.

    torch's distributions take their parameters unchecked, and its log of what fails with such tensors is silent.
    """
    validates = Distribution._validate_args
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)
        log.disabled = was_disabled


def with_siblings(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Add to names of modules or parameters those at the same place in other members of a list inside a list.

    Which of several experts runs depends on numbers, so what is true of one counts for all.
    """
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    inner = [path for path in lists if any(path.startswith(f"{other}.") for other in lists)]
    if not inner:
        return frozenset(names)
    member = re.compile(rf"({'|'.join(sorted(map(re.escape, inner), key=len, reverse=True))})\.([^.]+)(?=\.|$)")

    def place(name: str) -> str:
        return member.sub(r"\1.*", name)

    places = {place(name) for name in names}
    every = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return frozenset(names) | {name for name in every if place(name) in places}


def _find_usage(model: nn.Module, tokens: int | None) -> Usage | None:
    """Take one pass, and a longer one if something was not used in it."""
    parameters = dict(model.named_parameters())
    if not parameters or "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions > 0 else MOST_TOKENS  # XLNet's, -1, is none
    longest = tokens or min(MOST_TOKENS, limit)
    found = _passed(model, min(FEWEST_TOKENS, longest))
    if longest > FEWEST_TOKENS and (found is None or parameters.keys() - found.trained):
        longer = _passed(model, longest)
        if longer is not None:
            found = replace(longer, tokens=longer.tokens if found is None else found.tokens)
    return found


def why_not_on(model: nn.Module, tokens: int) -> str | None:
    """Return the reason why a model does not train on sequences of a length, in its own words; None if it does.

    A model on the meta device, which has no numbers to compute with, is not tried.
    """
    device = next(model.parameters()).device
    if device.type == "meta" or _passed(model, tokens) is not None:
        return None
    try:
        with _prepared(model, set(), set()), _unchanged(model, device):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), **_without_cache(model))
    except Exception as error:  # of any kind: it is the model's own
        return first_line(str(error)) or type(error).__name__
    return None


def _passed(model: nn.Module, tokens: int) -> Usage | None:
    """Take one pass with fake tensors, or else with real ones; None if the model does not run on token ids alone."""
    device = next(model.parameters()).device
    for fake in (True, False) if device.type != "meta" else (True,):
        called: set[nn.Module] = set()
        without_graph: set[nn.Module] = set()
        try:
            with _prepared(model, called, without_graph), _fake_tensors() if fake else _unchanged(model, device):
                ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
                output = model(input_ids=ids, **_without_cache(model))
                trained, inside = _leaves(without_graph, output.logits if hasattr(output, "logits") else output[0])
        except Exception:  # of any kind: the model may want images or states, or look at numbers
            continue
        modules = dict(model.named_modules())
        parameters = model.named_parameters(remove_duplicate=False)  # a tied one trains under each of its names
        return Usage(
            with_siblings(model, [name for name, module in modules.items() if module in called]),
            with_siblings(model, [name for name, parameter in parameters if id(parameter) in trained]),
            tokens,
            with_siblings(model, [name for name, module in modules.items() if module in inside]),
        )
    return None


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that switches a cache off, if the model's forward pass takes it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _leaves(without_graph: set[nn.Module], output: Tensor) -> tuple[set[int], set[nn.Module]]:
    """Return the identities of the parameters from which autograd's graph leads to a tensor.

    An operation in Python may compute gradients of parameters that it was not given as arguments (reversible layers
    do). In a model with one, the parameters of the modules that ran without a graph are taken to have a gradient.

    Args:
        without_graph: modules that ran while autograd was off.

    Returns:
        The parameters' identities, and the modules that ran inside such an operation.
    """
    found: set[int] = set()
    inside: set[nn.Module] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            inside = without_graph
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting.extend(before for before, _ in node.next_functions)
    return found | {id(p) for module in inside for p in module.parameters(recurse=False)}, inside


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Compute with tensors that have no memory inside the block."""
    with without_numbers(), FakeTensorMode(allow_non_fake_inputs=True), StandIns():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the model's buffers and the random generators after the block."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextmanager
def _prepared(model: nn.Module, called: set[nn.Module], without_graph: set[nn.Module]) -> Iterator[None]:
    """Put the model in training mode with all parameters trained inside the block, and note the modules that run.

    Args:
        called: gets the modules that run.
        without_graph: gets those of them that run while autograd is off.
    """

    def note(module: nn.Module, _: Any) -> None:
        called.add(module)
        if not torch.is_grad_enabled():
            without_graph.add(module)

    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    model.train()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
