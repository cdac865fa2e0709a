"""The optimizer of a run and its parameter groups, each with its own learning rate.

    full rank (embeddings, norms, head; in the warm start all)   lr
    weights of the layers named in `matrices`                    matrix_lr, or lr
    lora_A, a trained scale, DoRA's magnitude                    lowrank_lr
    lora_B                                                       lowrank_lr · lowrank_b_lr_ratio

The ratio is that of LoRA+ (Hayou et al. 2024, arXiv 2402.12354). Weight decay applies to matrices, not to vectors,
scales and magnitudes.

`adamw-8bit` keeps m and v as 8-bit codes, with one fp32 scale for 256 of them (Dettmers et al. 2021, arXiv 2110.02861):
2 bytes a parameter instead of 8. The price is moments that are right to a few percent, and a synchronisation of the
host at every step. `galore`, `apollo` and `fira` are other authors' optimizers for full-rank training (see
`train.projected_optimizers`).
"""

import importlib.util
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import low_rank_layers
from relora.lowrank.division import whole_shape
from relora.train.muon import AdamWWithMuon, Rule
from relora.train.projected_optimizers import (
    PROJECTED_OPTIMIZERS,
    Layout,
    ProjectionConfig,
    build_projected_optimizer,
    check_installed,
    projected_layout,
    projected_optimizer_name,
    restore_state,
    saved_state,
)
from relora.train.schedule import Schedule

OptimizerName = Literal["adamw", "adamw-8bit", "galore", "apollo", "fira"]
MatrixOptimizer = Literal["adamw", "muon"]
"""Optimizer of the factors, or of the blocks' matrices, inside of the run's `adamw`."""

CODES_PER_SCALE = 256
FEWEST_CODES = 4096
"""Size of the smallest tensor whose moments are coded; those of smaller ones stay in fp32.

Both numbers are bitsandbytes' own; loaded state is checked against them."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer; learning rates are peaks, which the schedule scales at every step."""

    name: OptimizerName = "adamw"
    factor_rule: MatrixOptimizer = "adamw"
    """Optimizer of lora_A and lora_B; `muon` goes with `name: adamw` alone."""
    matrix_rule: MatrixOptimizer = "adamw"
    """Optimizer of the weights of `matrices` while they train; `muon` goes with `name: adamw` alone."""
    momentum: float = 0.95
    """Momentum of Muon."""
    lr: float
    lowrank_lr: float
    lowrank_b_lr_ratio: float = 1.0
    matrix_lr: float | None = None
    """Learning rate of the weights of the layers named in `matrices`; None for `lr`."""
    matrices: frozenset[str] = frozenset()
    """Paths of the target modules: layers whose weights are frozen in the low-rank phase, or could be."""
    turns: int = 1
    """Parts in which the factors restart by turns; each has parameter groups, and so a learning rate, of its own."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """Settings of galore, apollo and fira; no other optimizer reads them."""


def check_optimizer(name: OptimizerName) -> None:
    """Raise `UserError`, which names the extra to install, if the optimizer's library is absent; load nothing."""
    if name == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.name: adamw-8bit needs bitsandbytes, which is not installed; run: pip install 'relora[quant]'"
        )
    if name in PROJECTED_OPTIMIZERS:
        check_installed(name)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters of `model`; a group's `initial_lr` is its peak rate."""
    groups = _groups(model, config)
    if config.name == "adamw-8bit":
        return _eight_bit(groups, config)
    if config.name in PROJECTED_OPTIMIZERS:
        return build_projected_optimizer(
            model, groups, config.name, config.projection, betas=config.betas, eps=config.eps
        )
    if any(group["rule"] != "adamw" for group in groups):
        return AdamWWithMuon(groups, betas=config.betas, eps=config.eps, momentum=config.momentum)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def rules_of(model: nn.Module, config: OptimizerConfig) -> dict[int, Rule]:
    """Return the update rule of every trainable parameter, by its id in the sense of `id`."""
    return {id(parameter): group["rule"] for group in _groups(model, config) for parameter in group["params"]}


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Set the learning rate of every group to its peak times the schedule's factor for it at this step."""
    full_rank_factor = schedule.rest_lr_factor(step)
    for group in optimizer.param_groups:
        turn = group["turn"]
        factor = full_rank_factor if turn is None else schedule.lr_factor(step, turn)
        group["lr"] = group["initial_lr"] * factor


def carry_state(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Copy to `target` the moments of every parameter that both optimizers train, so the switch does not lose them."""
    for parameter in _parameters(target):
        if parameter in source.state:
            target.state[parameter] = source.state[parameter]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors under the names `parameter name:key`, e.g. `lm_head.weight:exp_avg`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        # all parameters share the 8-bit tables of code values (qmap), but safetensors saves no tensor under two names
        f"{names[id(parameter)]}:{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in saved_state(state).items()
    }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `named_state` returned; a parameter without tensors gets no state (it had just been redrawn).

    Raises:
        UserError: the tensors are not those of this optimizer. Nothing was loaded.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_key, tensor in tensors.items():
        name, _, key = full_key.rpartition(":")
        by_name.setdefault(name, {})[key] = tensor
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {names[id(parameter)]: parameter for parameter in _parameters(optimizer)}
    for name, state in by_name.items():
        _check_state(name, state, parameters.get(name), optimizer)
    if projected_optimizer_name(optimizer) is not None:
        for name, state in by_name.items():
            restore_state(optimizer, parameters[name], state)
        return
    optimizer.state.clear()
    for name, state in by_name.items():
        device = parameters[name].device
        optimizer.state[parameters[name]] = {key: tensor.to(device) for key, tensor in state.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"] = int(state["step"])  # bitsandbytes wants a Python number


def _eight_bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build bitsandbytes' AdamW over the groups."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that no optimizer uses
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas, eps=config.eps, min_8bit_size=FEWEST_CODES)
    return optimizer


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameter groups that are not empty."""
    groups = (*_full_rank_groups(model, config), *_factor_groups(model, config))
    return [group for group in groups if group["params"]]


def _full_rank_groups(model: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """Yield the groups of everything except the factors: matrices, vectors, and weights of the target modules."""
    factors = {id(factor) for layer in low_rank_layers(model).values() for factor in layer.factors.values()}
    weights = {f"{path}.weight" for path in config.matrices}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors}
    matrices = [parameter for name, parameter in trained.items() if name in weights]
    others = [parameter for name, parameter in trained.items() if name not in weights]
    yield _group([p for p in others if p.ndim >= 2], config.lr, config.weight_decay)
    yield _group([p for p in others if p.ndim < 2], config.lr, 0.0)
    matrix_lr = config.lr if config.matrix_lr is None else config.matrix_lr
    yield _group(matrices, matrix_lr, config.weight_decay, rule=config.matrix_rule)


def _factor_groups(model: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """Yield the groups of the factors, by turn and kind; a turn has the layers that `lowrank.restart` redraws in it."""
    layers = list(low_rank_layers(model).values())
    rule: Rule = "muon-exact" if config.factor_rule == "muon" else "adamw"
    for turn in range(config.turns):
        own = [layer.factors for layer in layers[turn :: config.turns]]
        for kind, ratio, decay in (
            ("lora_A", 1.0, config.weight_decay),
            ("lora_B", config.lowrank_b_lr_ratio, config.weight_decay),
            ("scaling", 1.0, 0.0),
            ("magnitude", 1.0, 0.0),
        ):
            found = [factors[kind] for factors in own if kind in factors]
            own_rule = rule if kind in ("lora_A", "lora_B") else "adamw"
            yield _group(found, config.lowrank_lr * ratio, decay, turn, own_rule)


def _group(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, turn: int | None = None, rule: Rule = "adamw"
) -> dict[str, Any]:
    """Build a parameter group with the entries that `set_lr` reads; `turn` is None for everything except factors."""
    return {
        "params": parameters,
        "lr": lr,
        "initial_lr": lr,
        "weight_decay": weight_decay,
        "turn": turn,
        "rule": rule,
    }


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _rule_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Rule:
    """Return the update rule of the group that a parameter is in."""
    rules = (group["rule"] for group in optimizer.param_groups if any(parameter is own for own in group["params"]))
    rule: Rule = next(rules)
    return rule


def _check_state(
    name: str, state: dict[str, Tensor], parameter: nn.Parameter | None, optimizer: torch.optim.Optimizer
) -> None:
    """Raise `UserError` unless the tensors have the names, shapes and kinds of number of this optimizer's own state."""
    if parameter is None:
        raise UserError(f"the saved optimizer has moments of {name}, which does not train here")
    if (projected := projected_optimizer_name(optimizer)) is not None:
        kind, expected = projected, projected_layout(optimizer, parameter)
    elif _rule_of(optimizer, parameter) != "adamw":
        kind, expected = "muon", _muon_layout(parameter, _rule_of(optimizer, parameter))
    elif isinstance(optimizer, torch.optim.AdamW):
        kind, expected = "adamw", _adamw_layout(parameter)
    else:
        kind, expected = "adamw-8bit", _eight_bit_layout(parameter)
    if {key: (tensor.shape, tensor.is_floating_point()) for key, tensor in state.items()} != expected:
        raise UserError(f"the saved optimizer's moments of {name} are not {kind}'s, or not of its shape")


def _adamw_layout(parameter: nn.Parameter) -> Layout:
    """Layout of one parameter's state in torch's AdamW."""
    return {"exp_avg": (parameter.shape, True), "exp_avg_sq": (parameter.shape, True), "step": (torch.Size(), True)}


def _muon_layout(parameter: nn.Parameter, rule: Rule) -> Layout:
    """Layout of one parameter's state under Muon."""
    momentum: Layout = {"momentum_buffer": (parameter.shape, True)}
    if rule == "muon":
        return momentum
    return momentum | {"feature_squares": (torch.Size([max(whole_shape(parameter))]), True)}


def _eight_bit_layout(parameter: nn.Parameter) -> Layout:
    """Layout of one parameter's state in bitsandbytes' AdamW."""
    coded = parameter.numel() >= FEWEST_CODES
    moments = dict.fromkeys(("state1", "state2"), (parameter.shape, not coded))
    step: Layout = {"step": (torch.Size(), False)}
    if not coded:
        return moments | step
    tables = {key: (torch.Size([256]), True) for key in ("qmap1", "qmap2")}
    scales = torch.Size([math.ceil(parameter.numel() / CODES_PER_SCALE)])
    return moments | tables | dict.fromkeys(("absmax1", "absmax2"), (scales, True)) | step
