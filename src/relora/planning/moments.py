"""Tensors that an optimizer keeps for a parameter, built without training, so that a plan can count their bytes.

adamw                    m and v, each of the parameter's shape, in fp32
muon                     m, of the parameter's shape, in fp32; of a factor also one number for each of its features
adamw-8bit               m and v in one byte a number, and an fp32 scale for each block of them
galore, apollo, fira     m, v and the projection of a matrix in the blocks, at low rank; of anything else m and v
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from relora.config import TrainingConfig
from relora.recipes.from_settings import lowrank_of, optimizer_of
from relora.train.optim import CODES_PER_SCALE, FEWEST_CODES, OptimizerConfig, rules_of
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS, projected_matrices, state_shapes

Moments = Callable[[nn.Parameter], list[Tensor]]
"""Function of a parameter that trains; it returns new tensors like those that the optimizer keeps for it."""


def moments_of(config: TrainingConfig, model: nn.Module) -> Moments:
    """Return the moments of a configuration's optimizer.

    Args:
        model: the model that trains; it is looked at when the moments of a first parameter are asked for, so low-rank
            layers may still be injected into it.
    """
    optimizer = config.optimizer
    if optimizer.name in PROJECTED_OPTIMIZERS:
        return _projected(model, optimizer.projection.rank)
    if optimizer.name == "adamw-8bit":
        return _eight_bit
    return _adamw_with_muon(model, optimizer_of(config, model, lowrank_of(config)))


def _full(parameter: nn.Parameter) -> list[Tensor]:
    """Return m and v of the parameter's shape and dtype."""
    return [torch.empty_like(parameter.data), torch.empty_like(parameter.data)]


def _adamw_with_muon(model: nn.Module, optimizer: OptimizerConfig) -> Moments:
    """Return a function that gives what Muon keeps of a parameter under it, and m and v of any other."""
    rules = cache(lambda: rules_of(model, optimizer))  # at the first call, as for the projected ones

    def moments(parameter: nn.Parameter) -> list[Tensor]:
        rule, (first, second) = rules().get(id(parameter), "adamw"), _full(parameter)
        if rule == "adamw":
            return [first, second]
        return [first] if rule == "muon" else [first, parameter.data.new_empty(max(parameter.shape))]

    return moments


def _eight_bit(parameter: nn.Parameter) -> list[Tensor]:
    """Return codes and scales of m and v; small tensors keep plain moments."""
    if parameter.numel() < FEWEST_CODES:
        return _full(parameter)
    scales = -(-parameter.numel() // CODES_PER_SCALE)  # rounded up
    tensors = []
    for _ in ("m", "v"):
        tensors.append(torch.empty_like(parameter.data, dtype=torch.uint8))
        tensors.append(parameter.data.new_empty(scales, dtype=torch.float32))
    return tensors


def _projected(model: nn.Module, rank: int) -> Moments:
    """Return a function that gives m, v and the projection of a matrix in the blocks, and m and v of anything else."""

    @cache
    def matrices() -> set[int]:
        # Found at the first call: before it, other tensors may have been the model's parameters.
        return {id(matrix) for matrix in projected_matrices(model, rank).values()}

    def moments(parameter: nn.Parameter) -> list[Tensor]:
        if id(parameter) not in matrices():
            return _full(parameter)
        moment, projection = state_shapes(parameter.shape, rank)
        return [parameter.data.new_empty(shape) for shape in (moment, moment, projection)]

    return moments
