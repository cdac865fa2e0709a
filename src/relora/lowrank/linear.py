"""The low-rank layer: an `nn.Linear` with two more parameters.

    y = W x + b + s · B A x        W [out, in] frozen;  lora_A [r, in] and lora_B [out, r] trained;  s = lora_alpha / r

`weight` and `bias` keep their names, so checkpoints load by name and any model can hold the layer. After Hu et al. 2021
(arXiv 2106.09685, section 4.1); s = lora_alpha / sqrt(r) is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
A is drawn Kaiming-uniform and B is zero, so the layer starts as W. Both zero would be a saddle with no gradient at all,
which is how the published ReLoRA code loses its first cycle.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relora.draws import keyed_generator
from relora.errors import NonFinite, UserError
from relora.lowrank.base import FrozenWeight, Layer, Storage
from relora.lowrank.calibrate import calibrated
from relora.lowrank.costs import Rates
from relora.lowrank.kernel import Arithmetic, low_rank_linear


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """What `inject` puts beside the frozen weights."""

    r: int = 128
    """Rank of one update."""
    lora_alpha: float = 32.0
    """Scale of the update, in units of 1/r (1/sqrt(r) with rslora)."""
    lora_dropout: float = 0.0
    """Dropout on the factors' input, while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, names (matched at the end of a module's path), or one regular expression for whole paths."""
    rslora: bool = False
    trainable_scaling: bool = False
    """One trained scale per layer, back at its start after every merge."""
    base: Storage = "auto"
    """Storage of frozen weights: as they are, fp32, or bf16 or int8 with an fp32 master in main memory."""
    frozen: Arithmetic = "native"
    """Of the products with frozen weights, while training."""
    rates: Rates | None = None
    """Of the device, to choose between ways of computing the same; measured once per machine unless given."""

    @property
    def scaling(self) -> float:
        """s in y = W x + s B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)


def check_rank(r: int, weight: Tensor, name: str) -> None:
    """`UserError` where an update of rank r would be as large as the weight itself."""
    if r > min(weight.shape):
        raise UserError(
            f"lowrank.r ({r}) exceeds the smaller side of {name or 'the layer'} "
            f"({weight.shape[0]} x {weight.shape[1]}); r may be at most {min(weight.shape)} here"
        )


class LowRankLinear(Layer):
    """Stands in for a linear layer (or GPT-2's `Conv1D`, whose weight is [in, out]) and shares its parameters.

    Args:
        replaced: the layer to stand in for; it has `weight` and `bias`, and gets its place back from `plain`.
        name: path of the layer in its model; keys the draw of A.
        seed: the run's seed.
        fan_in_fan_out: the weight is stored as [in, out].

    Raises:
        UserError: r exceeds the smaller side of the weight (the update would have full rank at a higher price).
    """

    scaling: Tensor | float

    def __init__(
        self, replaced: nn.Module, config: LowRankConfig, *, name: str = "", seed: int = 0, fan_in_fan_out: bool = False
    ) -> None:
        nn.Module.__init__(self)
        assert isinstance(replaced.weight, nn.Parameter)
        self.weight = replaced.weight
        self.bias = replaced.bias  # type: ignore[assignment]
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = self.weight.shape[::-1] if fan_in_fan_out else self.weight.shape
        self.name, self.seed = name, seed
        self.r, self.lora_dropout, self.initial_scaling = config.r, config.lora_dropout, config.scaling
        check_rank(self.r, self.weight, name)
        self._replaced = (replaced,)  # in a tuple, so that it is no submodule
        self.base = FrozenWeight(self, config.base, config.frozen, fan_in_fan_out)
        self.rates = config.rates or calibrated(self.weight.device)
        precise = torch.promote_types(self.base.exact.dtype, torch.float32)  # small updates live in the factors
        self.lora_A = nn.Parameter(self.weight.new_empty(self.r, self.in_features, dtype=precise))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, self.r, dtype=precise))
        self.scaling = self.initial_scaling
        if config.trainable_scaling:
            self.scaling = nn.Parameter(self.weight.new_empty((), dtype=precise))
        self.redraw_(cycle=0)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the update, by their name in the layer."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        return named | {"scaling": self.scaling} if isinstance(self.scaling, nn.Parameter) else named

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        weight, scale, arithmetic = self.base.operand(self.training)
        return low_rank_linear(
            x,
            weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            rates=self.rates,
            dropout=self.lora_dropout if self.training else 0.0,
            arithmetic=arithmetic,
            scale=scale,
        )

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update s·B A in the factors' precision, in the weight's shape."""
        delta = (self.scaling * self.lora_B) @ self.lora_A  # [out, in], and nothing else of that size
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def redraw_(self, cycle: int) -> None:
        """Draw A anew, keyed by seed, cycle and name (Kaiming-uniform, a = sqrt(5): bound 1/sqrt(in)); zero B."""
        bound = 1 / math.sqrt(self.in_features)
        generator = keyed_generator(self.seed, "redraw", cycle, self.name)
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(self.initial_scaling)  # never 0: a zero scale beside a zero B has no gradient

    @torch.no_grad()
    def merge_(self) -> Tensor:
        """weight += s·B A in fp32 or better, and B = 0, so the layer's function stays; returns the update.

        Raises:
            NonFinite: the update or the weight is not finite; the weight has not moved.
        """
        delta = self.delta()
        # one sum tells of any NaN or infinity: cheaper than a mask of the weight's size
        if not torch.isfinite(delta.sum() + self.base.exact.sum().to(delta.device)):
            raise NonFinite(
                f"the update of {self.name or 'a low-rank layer'} is not finite, so it was not merged; "
                "continue from the last checkpoint with a lower lowrank_lr"
            )
        self.base.add_(delta)
        self.lora_B.zero_()
        return delta

    def plain(self) -> nn.Module:
        """The layer this one stood in for, with the exact merged weight; call after `merge_`."""
        replaced = self._replaced[0]
        self.weight.data = self.base.exact.to(self.weight.device)
        replaced.weight = self.weight.requires_grad_(True)
        return replaced

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With the exact weight, however it is stored."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base.master is not None:
            destination[f"{prefix}weight"] = self.base.master

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Into the exact weight, from which what is stored and multiplied is made anew."""
        given = state_dict.get(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *others)
        if isinstance(given, Tensor) and given.is_floating_point() and given.shape == self.weight.shape:
            self.base.set_(given)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.initial_scaling:g}"
