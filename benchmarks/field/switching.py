"""SwitchLoRA: single vectors of LoRA's factors are exchanged often, and the weight takes over what they were.

    y = W x + s B A x,    s = 1 / r,    a_i the rows of A, b_i the columns of B

Both factors begin with values, W stays as it is drawn. To exchange a_i for a vector a of its pool (Zhou et al. 2024,
arXiv 2406.06564, and the authors' published code):

    W <- W + s b_i (a_i - a)ᵀ,    a_i <- a        the layer's function stays
    the moments and the step count of b_i become zero, and b_i does not move for 5 steps; likewise for b_i and a_i

Each pool has min(out, in) vectors, drawn once. At step t of T every layer exchanges r / 40 · 0.3^(t / (ratio T)) rows
and as many columns, a fraction as a probability, in turn: rows from the first, columns from the middle. ratio is 0.1
there. Deviations: a vector that must not move at the moment ends a turn, which the code prevents beforehand. Pools
count as no state of the optimizer; they are twice the memory of W where out = in, and may lie in main memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .beside import BesideAdamW

FROZEN_STEPS = 5
"""Steps for which the counterpart of a new vector does not move."""
_GAIN = math.sqrt(1 / 3)
"""Kaiming's gain with a = sqrt(5), as in `nn.Linear`."""


class SwitchLinear(nn.Module):
    """A linear layer with factors whose vectors can be exchanged. Vectors lie in rows: `A` [r, in], `B` [r, out]."""

    weight: Tensor

    def __init__(self, weight: Tensor, r: int, generator: torch.Generator) -> None:
        """Draw pools and factors beside the frozen `weight` [out, in]."""
        super().__init__()
        out_features, in_features = weight.shape
        self.register_buffer("weight", weight.detach().clone())
        self.scaling, self.r, self.generator = 1 / r, r, generator
        smaller = min(weight.shape)
        widths = {
            "A": (math.sqrt(out_features) * r / in_features**1.5) ** 0.25 * math.sqrt(_GAIN),
            "B": (r / math.sqrt(out_features * in_features)) ** 0.25 * math.sqrt(_GAIN),
        }
        sizes, self.sides = {"A": in_features, "B": out_features}, {}
        for name, width in widths.items():
            bound = math.sqrt(3) * width
            pool = torch.empty(smaller, sizes[name]).uniform_(-bound, bound, generator=generator)
            used = torch.randperm(smaller, generator=generator)[:r]
            factor = nn.Parameter(pool[used])
            self.register_parameter(name, factor)
            self.sides[name] = Side(factor, pool, used, first=0 if name == "A" else r // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + s B A x of x [..., in]."""
        low_rank = F.linear(F.linear(x, self.A), self.B.T)
        return F.linear(x, self.weight) + self.scaling * low_rank

    @torch.no_grad()
    def exchange(self, name: str, count: float) -> list[int]:
        """Exchange about `count` vectors of one factor and freeze their counterparts, whose indices are returned."""
        side, other = self.sides[name], self.sides["B" if name == "A" else "A"]
        whole = int(count) + int(torch.rand((), generator=self.generator).item() < count % 1)
        indices: list[int] = []
        while len(indices) < whole and side.frozen[side.next] == 0:
            indices.append(side.next)
            side.next = (side.next + 1) % self.r
        if not indices:
            return indices
        kept = torch.ones(self.r, dtype=torch.bool)
        kept[indices] = False
        free = torch.ones(len(side.pool), dtype=torch.bool)
        free[side.used[kept]] = False
        choices = free.nonzero().flatten()
        chosen = choices[torch.randperm(len(choices), generator=self.generator)[: len(indices)]]
        change = self.scaling * (side.factor[indices] - side.pool[chosen])  # [count, side]
        partners = other.factor[indices]
        self.weight += partners.T @ change if name == "A" else change.T @ partners
        side.factor[indices] = side.pool[chosen]
        side.used[indices] = chosen
        other.frozen[indices] = FROZEN_STEPS
        return indices


@dataclass
class Side:
    """One factor of a layer, and what its vectors may be exchanged for."""

    factor: nn.Parameter
    pool: Tensor
    """Vectors [min(out, in), side] that can be drawn."""
    used: Tensor
    """Index in the pool of each vector of the factor."""
    first: int
    """Vector that is exchanged first."""

    def __post_init__(self) -> None:
        self.next, self.frozen = self.first, torch.zeros(len(self.factor), dtype=torch.int64)


class SwitchLora(BesideAdamW):
    """AdamW that exchanges vectors before every step and counts the steps of each vector by itself."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        layers: list[SwitchLinear],
        *,
        interval: float,
        decay_steps: float,
        **options: Any,
    ) -> None:
        """Build the optimizer.

        Args:
            interval: steps in which every vector is exchanged once, at first.
            decay_steps: steps after which that is 0.3 times as frequent.
            options: those of AdamW.
        """
        super().__init__(groups, **options)
        self.interval, self.decay_steps, self.steps = interval, decay_steps, 0
        self.layers = layers
        self.frozen = {id(side.factor): side.frozen for layer in layers for side in layer.sides.values()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Exchange what is due, then update every parameter."""
        self.steps += 1
        share = 0.3 ** (self.steps / self.decay_steps) / self.interval
        for layer in self.layers:
            for name, other in (("A", "B"), ("B", "A")):
                indices = layer.exchange(name, share * layer.r)
                for tensor in self.state[layer.sides[other].factor].values():
                    tensor[indices] = 0
        return super().step(closure)

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Take a step of Adam with the vectors that may move."""
        gradient, state, frozen = parameter.grad, self.state[parameter], self.frozen[id(parameter)]
        assert gradient is not None
        gradient = gradient.masked_fill((frozen > 0)[:, None], 0.0)
        frozen.sub_(1).clamp_(min=0)
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["steps"] = torch.zeros(len(parameter), 1)
        (beta1, beta2), steps = group["betas"], state["steps"].add_(1)
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**steps)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**steps)
        parameter.sub_(mean / (square.sqrt() + group["eps"]), alpha=group["lr"])
