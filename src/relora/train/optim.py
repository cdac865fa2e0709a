"""Parameter groups and the optimizer: what trains at which learning rate.

Everything at full rank (embeddings, norms, head; in the warm start all of it) goes at `lr`, lora_A at `lowrank_lr`,
lora_B at `lowrank_b_lr_ratio` times that (LoRA+, Hayou et al. 2024, arXiv 2402.12354). Matrices are decayed, vectors
and scales are not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import low_rank_layers


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's settings; learning rates are peaks, scaled by the schedule at every step."""

    lr: float
    lowrank_lr: float
    lowrank_b_lr_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `model`; each group keeps its peak rate in `initial_lr`."""
    factors: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "scaling": []}
    for layer in low_rank_layers(model).values():
        for kind, factor in layer.factors.items():
            factors[kind].append(factor)
    in_factors = {id(factor) for group in factors.values() for factor in group}
    full_rank = [p for p in model.parameters() if p.requires_grad and id(p) not in in_factors]
    decay, b_lr = config.weight_decay, config.lowrank_lr * config.lowrank_b_lr_ratio
    groups = [
        _group([p for p in full_rank if p.ndim >= 2], config.lr, decay),
        _group([p for p in full_rank if p.ndim < 2], config.lr, 0.0),
        _group(factors["lora_A"], config.lowrank_lr, decay),
        _group(factors["lora_B"], b_lr, decay),
        _group(factors["scaling"], config.lowrank_lr, 0.0),
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=config.betas, eps=config.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group goes at `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def carry_state(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Hand over the moments of what both optimizers train: the switch to low rank forgets nothing of it."""
    for parameter in _parameters(target):
        if parameter in source.state:
            target.state[parameter] = source.state[parameter]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name:key`, e.g. `lm_head.weight:exp_avg`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
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
        _check_state(name, state, parameters.get(name))
    states = [by_name.get(name, {}) for name in parameters]
    groups = optimizer.state_dict()["param_groups"]
    # through load_state_dict, which knows on which device and in which type each optimizer keeps its step
    optimizer.load_state_dict({"state": {i: state for i, state in enumerate(states) if state}, "param_groups": groups})


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, object]:
    return {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check_state(name: str, state: dict[str, Tensor], parameter: nn.Parameter | None) -> None:
    """AdamW's: two moments of the parameter's shape, and a step."""
    if parameter is None:
        raise UserError(f"the saved optimizer has moments of {name}, which does not train here")
    shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size()}
    if {key: tensor.shape for key, tensor in state.items() if tensor.is_floating_point()} != shapes:
        raise UserError(f"the saved optimizer's moments of {name} are not AdamW's, or not of its shape")
