"""Parameter groups and the optimizer: what trains at which learning rate.

Everything at full rank (embeddings, norms, head; in the warm start all of it) goes at `lr`, lora_A at `lowrank_lr`,
lora_B at `lowrank_b_lr_ratio` times that (LoRA+, Hayou et al. 2024, arXiv 2402.12354). Matrices are decayed, vectors
and scales are not.

`adamw-8bit` keeps m and v as 8-bit codes, one fp32 scale for 256 of them (Dettmers et al. 2021, arXiv 2110.02861): 2
bytes a parameter instead of 8. The price: moments that are right to a few percent, and a step that the host waits for.
`galore`, `apollo` and `fira` are what others do at full rank (see `train.baselines`).
"""

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import low_rank_layers
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

CODES_PER_SCALE = 256
FEWEST_CODES = 4096
"""Moments of smaller tensors stay in fp32. Both numbers are the library's; what is loaded is checked by them."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's settings; learning rates are peaks, scaled by the schedule at every step."""

    name: OptimizerName = "adamw"
    lr: float
    lowrank_lr: float
    lowrank_b_lr_ratio: float = 1.0
    matrix_lr: float | None = None
    """Of the weights of the layers named in `matrices`; `lr` unless given."""
    matrices: frozenset[str] = frozenset()
    """Paths of the layers whose weights will be frozen, or could be."""
    turns: int = 1
    """Parts in which the factors restart by turns of layers: each has groups, and so a learning rate, of its own."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """Of galore, apollo and fira."""


def check_optimizer(name: OptimizerName) -> None:
    """`UserError` naming the extra where the optimizer's library is absent; loads nothing."""
    if name == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.name: adamw-8bit needs bitsandbytes, which is not installed; run: pip install 'relora[quant]'"
        )
    if name in PROJECTED_OPTIMIZERS:
        check_installed(name)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Over the trainable parameters of `model`; a group's peak rate is its `initial_lr`."""
    groups = [group for group in (*_full_rank_groups(model, config), *_factor_groups(model, config)) if group["params"]]
    if config.name == "adamw-8bit":
        return _eight_bit(groups, config)
    if config.name in PROJECTED_OPTIMIZERS:
        return build_projected_optimizer(
            model, groups, config.name, config.projection, betas=config.betas, eps=config.eps
        )
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Every group goes at its peak times what the schedule says of it at this step."""
    rest = schedule.rest_lr_factor(step)
    for group in optimizer.param_groups:
        turn = group["turn"]
        group["lr"] = group["initial_lr"] * (rest if turn is None else schedule.lr_factor(step, turn))


def carry_state(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Hand over the moments of what both optimizers train: the switch to low rank forgets nothing of it."""
    for parameter in _parameters(target):
        if parameter in source.state:
            target.state[parameter] = source.state[parameter]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name:key`, e.g. `lm_head.weight:exp_avg`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        # the 8-bit tables of code values are shared by all parameters, and two names on one tensor cannot be saved
        f"{names[id(parameter)]}:{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in saved_state(state).items()
    }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `named_state`; a parameter without tensors has no state yet (it was just drawn).

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
    if projected_optimizer_name(optimizer):
        for name, state in by_name.items():
            restore_state(optimizer, parameters[name], state)
        return
    states = [by_name.get(name, {}) for name in parameters]
    groups = optimizer.state_dict()["param_groups"]
    # through load_state_dict, which knows on which device and in which type each optimizer keeps its step
    optimizer.load_state_dict({"state": {i: state for i, state in enumerate(states) if state}, "param_groups": groups})
    if not isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"] = int(state["step"])  # the 8-bit kernels take a number


def _eight_bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that no optimizer uses
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas, eps=config.eps, min_8bit_size=FEWEST_CODES)
    return optimizer


def _full_rank_groups(model: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    factors = {id(factor) for layer in low_rank_layers(model).values() for factor in layer.factors.values()}
    weights = {f"{path}.weight" for path in config.matrices}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    matrices = [p for name, p in trained if name in weights]
    others = [p for name, p in trained if name not in weights]
    yield _group([p for p in others if p.ndim >= 2], config.lr, config.weight_decay)
    yield _group([p for p in others if p.ndim < 2], config.lr, 0.0)
    yield _group(matrices, config.lr if config.matrix_lr is None else config.matrix_lr, config.weight_decay)


def _factor_groups(model: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """By kind, and by turn of their layer (`lowrank.restart` takes the same layers)."""
    layers = list(low_rank_layers(model).values())
    for turn in range(config.turns):
        own = [layer.factors for layer in layers[turn :: config.turns]]
        for kind, ratio, decay in (
            ("lora_A", 1.0, config.weight_decay),
            ("lora_B", config.lowrank_b_lr_ratio, config.weight_decay),
            ("scaling", 1.0, 0.0),
            ("magnitude", 1.0, 0.0),
        ):
            found = [factors[kind] for factors in own if kind in factors]
            yield _group(found, config.lowrank_lr * ratio, decay, turn)


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float, turn: int | None = None) -> dict[str, Any]:
    """`turn` is None for what is no factor."""
    return {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "turn": turn}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check_state(
    name: str, state: dict[str, Tensor], parameter: nn.Parameter | None, optimizer: torch.optim.Optimizer
) -> None:
    """Those that the optimizer would lay out itself, by name, shape and kind of number."""
    if parameter is None:
        raise UserError(f"the saved optimizer has moments of {name}, which does not train here")
    if baseline := projected_optimizer_name(optimizer):
        kind, expected = baseline, projected_layout(optimizer, parameter)
    elif isinstance(optimizer, torch.optim.AdamW):
        kind, expected = "adamw", _layout(parameter)
    else:
        kind, expected = "adamw-8bit", _eight_bit_layout(parameter)
    if {key: (tensor.shape, tensor.is_floating_point()) for key, tensor in state.items()} != expected:
        raise UserError(f"the saved optimizer's moments of {name} are not {kind}'s, or not of its shape")


def _layout(parameter: nn.Parameter) -> Layout:
    return {"exp_avg": (parameter.shape, True), "exp_avg_sq": (parameter.shape, True), "step": (torch.Size(), True)}


def _eight_bit_layout(parameter: nn.Parameter) -> Layout:
    coded = parameter.numel() >= FEWEST_CODES
    moments = dict.fromkeys(("state1", "state2"), (parameter.shape, not coded))
    step: Layout = {"step": (torch.Size(), False)}
    if not coded:
        return moments | step
    tables = {key: (torch.Size([256]), True) for key in ("qmap1", "qmap2")}
    scales = torch.Size([-(-parameter.numel() // CODES_PER_SCALE)])
    return moments | tables | dict.fromkeys(("absmax1", "absmax2"), (scales, True)) | step
