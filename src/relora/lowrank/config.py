"""Settings of the low-rank layers: what `inject` puts where, and which layers it can."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from relora.errors import UserError
from relora.lowrank.costs import Rates
from relora.lowrank.init import FROM_WEIGHT, Init
from relora.lowrank.kernel import Arithmetic
from relora.lowrank.patterns import by_pattern
from relora.lowrank.storage.frozen_weight import Storage
from relora.lowrank.storage.nf4 import check_sides
from relora.messages import short_repr

Rest = Literal["trained", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Whether frozen weights follow what their factors cannot express, and how often (see `residual`)."""

    scale: float = 0.0
    """Of their rate, in units of the factors'; 0: they stay where they are."""
    every_steps: int = 1
    """They follow in every step whose number is a multiple of this."""

    def due(self, step: int) -> bool:
        """Whether they do at this step."""
        return self.scale > 0 and step % self.every_steps == 0


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """What `inject` puts beside the frozen weights.

    Raises:
        UserError: of options that exclude one another.
    """

    r: int = 128
    """Rank of one update."""
    lora_alpha: float = 32.0
    """Scale of the update, in units of 1/r (1/sqrt(r) with rslora)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expression for the end of a layer's path -> its r; the first that matches counts. As in PEFT."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Likewise -> its lora_alpha."""
    lora_dropout: float = 0.0
    """Dropout on the factors' input, while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, names (matched at the end of a module's path), or one regular expression for whole paths."""
    rslora: bool = False
    dora: bool = False
    """Train the length of every row apart from its direction."""
    trainable_scaling: bool = False
    """One trained scale per layer, back at its start after every merge."""
    init: Init = "kaiming"
    """How the factors begin; with `gradient-svd` as with `kaiming`, until `gradient_svd_`."""
    rest: Rest = "trained"
    """What is no target: trained at full rank (pretraining), or frozen (fine-tuning)."""
    trained_modules: tuple[str, ...] = ()
    """Modules that train in full though the rest is frozen: regular expressions for the end of a module's path."""
    base: Storage = "auto"
    """Storage of frozen weights: as they are, fp32, or bf16, int8 or nf4 with an fp32 master in main memory."""
    master: bool = True
    """False: no master, so that a rounded weight is the exact one until something is merged into it."""
    frozen: Arithmetic = "native"
    """Of the products with frozen weights, while training."""
    residual: Residual = Residual()
    """A full-rank path beside the factors; needs a base in fp32 or better and native products."""
    rates: Rates | None = None
    """Of the device, to choose between ways of computing the same; measured once per machine unless given."""

    def __post_init__(self) -> None:
        for key, value, valid in (("init", self.init, get_args(Init)), ("rest", self.rest, get_args(Rest))):
            if value not in valid:
                raise UserError(f"lowrank.{key}: {short_repr(value)} is none of {', '.join(valid)}")
        if self.trained_modules and self.rest != "frozen":
            raise UserError("lowrank.trained_modules: everything trains with lowrank.rest: trained; leave it out")
        if self.base == "nf4" and self.frozen == "int8":
            raise UserError("precision.frozen: int8 has other codes than lowrank.base: nf4; choose native or bf16")
        if self.residual.scale:
            self._check_residual()

    @property
    def scaling(self) -> float:
        """s in y = W x + s B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def of_layer(self, path: str) -> "LowRankConfig":
        """With the r and lora_alpha that the patterns have for one layer."""
        r = by_pattern(self.rank_pattern, path, self.r, "lowrank.rank_pattern")
        alpha = by_pattern(self.alpha_pattern, path, self.lora_alpha, "lowrank.alpha_pattern")
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def _check_residual(self) -> None:
        if self.residual.scale < 0 or self.residual.every_steps < 1:
            raise UserError("lowrank.residual: scale must be 0 or more, every_steps 1 or more")
        if self.base not in ("auto", "fp32"):
            raise UserError(
                f"lowrank.residual moves the weight in every step, and base: {self.base} would round it anew each "
                "time; it needs base: fp32"
            )
        if self.rest == "frozen" or self.dora or self.init in FROM_WEIGHT:
            raise UserError("lowrank.residual moves weights that an adapter has no place for; it is for pretraining")


def check_target(config: LowRankConfig, path: str, out: int, inn: int) -> None:
    """`UserError` where a weight [out, in] cannot be a target: an update of rank r would be as large as the weight."""
    r, most = config.of_layer(path).r, min(out, inn)
    if not 1 <= r <= most:
        key = "lowrank.r" if r == config.r else "lowrank.rank_pattern"
        mistake = "exceeds the smaller side" if r > most else "is too small a rank"
        raise UserError(f"{key} ({r}) {mistake} of {path or 'the layer'} ({out} x {inn}); r may be at most {most} here")
    if config.base == "nf4":
        check_sides(inn, path)
