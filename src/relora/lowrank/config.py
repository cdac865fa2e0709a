"""Settings of the low-rank layers, and the conditions that a target module must meet.

`LowRankConfig` holds one setting for each choice that the method leaves open: which modules get factors, the rank r and
the scale s of the update s·B A, how the factors start, how the frozen weights are stored and multiplied, and what
happens to the rest of the model. `inject` applies it to a model. r and lora_alpha can differ between layers, by
patterns in PEFT's format. Options that exclude each other are refused when the object is created, before any model is
loaded; r, once the layers are known (`check_target`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from relora.errors import UserError
from relora.lowrank.costs import Rates
from relora.lowrank.init import NONZERO_INITS, Init
from relora.lowrank.kernel import Arithmetic
from relora.lowrank.patterns import by_pattern
from relora.lowrank.storage.frozen_weight import Storage
from relora.lowrank.storage.nf4 import check_sides
from relora.messages import short_repr

Rest = Literal["trained", "frozen"]
"""Whether the parameters that are no targets train at full rank or are frozen."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Settings of the residual steps: frozen weights move along the part of their gradient that factors cannot express.

    See `residual`.
    """

    scale: float = 0.0
    """Learning rate of the residual steps, relative to the factors' learning rate; 0: frozen weights do not move."""
    every_steps: int = 1
    """Interval of the residual steps: one in every step whose number, counted from 0, is a multiple of this."""

    def due(self, step: int) -> bool:
        """Tell whether the frozen weights take a residual step at this step; never with scale 0."""
        return self.scale > 0 and step % self.every_steps == 0


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Settings of the low-rank layers that `inject` puts into a model.

    Raises:
        UserError: `init` or `rest` is not one of those allowed, the residual's numbers are impossible, or two options
            exclude each other. No other value is checked here; a run's YAML is checked in `relora.config`.
    """

    r: int = 128
    """Rank of one update."""
    lora_alpha: float = 32.0
    """Scale of the update, in units of 1/r (1/sqrt(r) with rslora)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expression for the end of a layer's path -> r of that layer; the first match counts, as in PEFT."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Regular expression for the end of a layer's path -> lora_alpha of that layer; the first match counts."""
    lora_dropout: float = 0.0
    """Probability of dropout on the factors' input, in training only."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, names (matched at the end of a module's path), or one regular expression for whole paths."""
    rslora: bool = False
    """Scale the update by lora_alpha / sqrt(r) instead of lora_alpha / r (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the norm of every row of the weight separately from its direction (see `dora`)."""
    trainable_scaling: bool = False
    """Train the scale s, one per layer; every restart sets it back to its initial value."""
    init: Init = "kaiming"
    """Initialization of the factors (see `init`); `gradient-svd` is like `kaiming` until `gradient_svd_` is called."""
    rest: Rest = "trained"
    """State of all parameters that are no targets: trained at full rank (pretraining), or frozen (fine-tuning)."""
    trained_modules: tuple[str, ...] = ()
    """Modules that train at full rank although the rest is frozen: regular expressions for the ends of their paths."""
    base: Storage = "auto"
    """Storage of frozen weights: unchanged, fp32, or bf16, int8 or nf4 with an fp32 master in main memory."""
    master: bool = True
    """Keep the fp32 master. Without it, a rounded weight counts as the exact one until something is merged into it."""
    frozen: Arithmetic = "native"
    """Arithmetic of the products with frozen weights, in training only."""
    cast: torch.dtype | None = None
    """Dtype of autocast in training: weights are kept in it, too, and not cast in every pass. None: no autocast."""
    residual: Residual = Residual()
    """Full-rank path beside the factors; needs a base in fp32 or better, and is for pretraining."""
    rates: Rates | None = None
    """Rates of the device, which decide the order of the products; measured once per machine unless given."""

    def __post_init__(self) -> None:
        choices = (("init", Init), ("rest", Rest), ("base", Storage), ("frozen", Arithmetic))
        for key, kind in choices:
            if getattr(self, key) not in get_args(kind):
                raise UserError(
                    f"lowrank.{key}: {short_repr(getattr(self, key))} is none of {', '.join(get_args(kind))}"
                )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lowrank.lora_dropout: {self.lora_dropout} must be at least 0 and less than 1")
        if not 0 < self.lora_alpha < math.inf:
            raise UserError(f"lowrank.lora_alpha: {self.lora_alpha} must be a positive number")
        if self.trained_modules and self.rest != "frozen":
            raise UserError("lowrank.trained_modules: everything trains with lowrank.rest: trained; leave it out")
        if self.base == "nf4" and self.frozen == "int8":
            raise UserError("precision.frozen: int8 has other codes than lowrank.base: nf4; choose native or bf16")
        if self.residual.scale:
            self._check_residual()

    @property
    def scaling(self) -> float:
        """The scale s in y = W x + s B A x, for the r and lora_alpha of this configuration."""
        return self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def of_layer(self, path: str) -> "LowRankConfig":
        """Return the configuration of one layer: with the r and lora_alpha of its patterns, and without patterns.

        Raises:
            UserError: a pattern is not a regular expression.
        """
        r = by_pattern(self.rank_pattern, path, self.r, "lowrank.rank_pattern")
        alpha = by_pattern(self.alpha_pattern, path, self.lora_alpha, "lowrank.alpha_pattern")
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def _check_residual(self) -> None:
        """Raise `UserError` if the residual's numbers are impossible, or another option rules it out.

        A rounded base does, because every step would round it anew; so do a frozen rest, DoRA, and factors whose first
        product is not zero, because they lead to an adapter, which has no place for a moved weight.
        """
        if self.residual.scale < 0 or self.residual.every_steps < 1:
            raise UserError("lowrank.residual: scale must be 0 or more, every_steps 1 or more")
        if self.base not in ("auto", "fp32"):
            raise UserError(
                f"lowrank.residual moves the weight in every step, and base: {self.base} would round it anew each "
                "time; it needs base: fp32"
            )
        if self.rest == "frozen" or self.dora or self.init in NONZERO_INITS:
            raise UserError("lowrank.residual moves weights that an adapter has no place for; it is for pretraining")


def check_target(config: LowRankConfig, path: str, out_features: int, in_features: int) -> None:
    """Raise `UserError` if the weight [out, in] of the layer at `path` cannot be a target.

    Its r, which `config` gives by its patterns, must be at least 1 and at most the smaller side: no matrix of this
    shape has a higher rank. And nf4 needs an even number of inputs.
    """
    r, largest_r = config.of_layer(path).r, min(out_features, in_features)
    if not 1 <= r <= largest_r:
        key = "lowrank.r" if r == config.r else "lowrank.rank_pattern"
        mistake = "exceeds the smaller side" if r > largest_r else "is too small a rank"
        remedy = "" if config.target_modules == "all-linear" else ", or leave it out of lowrank.target_modules"
        raise UserError(
            f"{key} ({r}) {mistake} of {path or 'the layer'} ({out_features} x {in_features}); "
            f"r may be at most {largest_r} here{remedy}"
        )
    if config.base == "nf4":
        check_sides(in_features, path)
