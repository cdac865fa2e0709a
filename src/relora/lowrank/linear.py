"""The low-rank layer: an `nn.Linear` with two more parameters.

    y = W x + b + s · B A x        W [out, in] frozen;  lora_A [r, in] and lora_B [out, r] trained;  s = lora_alpha / r

`weight` and `bias` keep their names, so checkpoints load by name and any model can hold the layer. After Hu et al. 2021
(arXiv 2106.09685, section 4.1); s = lora_alpha / sqrt(r) is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
A is drawn Kaiming-uniform and B is zero, so the layer starts as W. Both zero would be a saddle with no gradient at all,
which is how the published ReLoRA code loses its first cycle. Other beginnings are in `factors`, DoRA's trained row
lengths in `dora`, and how W is stored in `base`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank.calibrate import calibrated
from relora.lowrank.config import LowRankConfig, check_target
from relora.lowrank.dora import dora_step, rescaled, row_norms
from relora.lowrank.init import DRAWS, FROM_WEIGHT, principal
from relora.lowrank.kernel import low_rank_linear
from relora.lowrank.storage.frozen_weight import FrozenWeight, Layer
from relora.seeding import keyed_generator


class LowRankLinear(Layer):
    """Stands in for a linear layer (or GPT-2's `Conv1D`, whose weight is [in, out]) and shares its parameters.

    Args:
        replaced: the layer to stand in for; it has `weight` and `bias`, and gets its place back from `plain`.
        name: path of the layer in its model; keys the draw of A, and the patterns.
        seed: the run's seed.
        fan_in_fan_out: the weight is stored as [in, out].

    Raises:
        UserError: r exceeds the smaller side of the weight (the update would have full rank at a higher price).
    """

    scaling: Tensor | float
    magnitude: nn.Parameter | None
    """DoRA's row lengths [out]."""
    initial_A: Tensor | None
    """What lora_A and lora_B began with where W gave it up, so that updates relative to W can be told; zero once
    merged."""
    initial_B: Tensor | None

    def __init__(
        self, replaced: nn.Module, config: LowRankConfig, *, name: str = "", seed: int = 0, fan_in_fan_out: bool = False
    ) -> None:
        nn.Module.__init__(self)
        assert isinstance(replaced.weight, nn.Parameter)
        self.weight = replaced.weight
        self.bias = replaced.bias  # type: ignore[assignment]
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = self.weight.shape[::-1] if fan_in_fan_out else self.weight.shape
        check_target(config, name, self.out_features, self.in_features)
        config = config.of_layer(name)
        self.name, self.seed, self.init, self.rslora = name, seed, config.init, config.rslora
        self.r, self.lora_dropout, self.initial_scaling = config.r, config.lora_dropout, config.scaling
        self._replaced = (replaced,)  # in a tuple, so that it is no submodule
        self._weight_trained = self.weight.requires_grad
        self.switched: tuple[tuple[nn.Parameter, bool], ...] = ()
        """What `inject` froze or let train beside this layer, and whether it trained before."""
        self.base = FrozenWeight(self, config.base, config.frozen, fan_in_fan_out, keep_master=config.master)
        self.rates = config.rates or calibrated(self.weight.device)
        precise = torch.promote_types(self.base.exact.dtype, torch.float32)  # small updates live in the factors
        self.lora_A = nn.Parameter(self.weight.new_empty(self.r, self.in_features, dtype=precise))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, self.r, dtype=precise))
        magnitude = nn.Parameter(self.weight.new_empty(self.out_features, dtype=precise)) if config.dora else None
        self.register_parameter("magnitude", magnitude)
        self.scaling = self.initial_scaling
        if config.trainable_scaling:
            self.scaling = nn.Parameter(self.weight.new_empty((), dtype=precise))
        for kind, factor in (("initial_A", self.lora_A), ("initial_B", self.lora_B)):
            self.register_buffer(kind, torch.zeros_like(factor) if self.init in FROM_WEIGHT else None)
        self.redraw_(cycle=0)
        if self.init == "pissa":
            self._take_over_principal()
        self.base.settle()
        self._measure_magnitude()

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the update, by their name in the layer."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude, "scaling": self.scaling}
        return {name: factor for name, factor in named.items() if isinstance(factor, nn.Parameter)}

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        weight, scale, arithmetic = self.base.operand(self.training)
        y = low_rank_linear(
            x,
            weight,
            self.bias if self.magnitude is None else None,
            self.lora_A,
            self.lora_B,
            self.scaling,
            rates=self.rates,
            dropout=self.lora_dropout if self.training else 0.0,
            arithmetic=arithmetic,
            scale=scale,
            trained_weight=self.base.rows(self.weight) if self.weight.requires_grad else None,
        )
        if self.magnitude is None:
            return y
        return rescaled(y, self.magnitude / self._row_norms(), self.bias)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update s·B A (of DoRA the step from W to W') in the factors' precision, in the weight's shape."""
        delta = (self.scaling * self.lora_B) @ self.lora_A  # [out, in], and nothing else of that size
        if self.magnitude is not None:
            delta = dora_step(self.base.rows(self.base.exact).to(delta), delta, self.magnitude)
        return self.base.rows(delta)

    @torch.no_grad()
    def redraw_(self, cycle: int) -> None:
        """Draw A anew, keyed by seed, cycle and name (by default Kaiming-uniform: bound 1/sqrt(in)); zero B.

        Raises:
            UserError: in a later cycle than the first, see `check_restart`.
        """
        if cycle:
            self.check_restart()
        generator = keyed_generator(self.seed, "redraw", cycle, self.name)
        self.lora_A.copy_(DRAWS[self.init](self.lora_A.shape, generator))
        self.lora_B.zero_()
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(self.initial_scaling)  # never 0: a zero scale beside a zero B has no gradient

    def check_restart(self) -> None:
        """`UserError` where the layer is made for one update, so that no cycle follows its first."""
        if self.magnitude is not None:
            raise UserError(
                "lowrank.dora: a restart merges a low-rank update and draws it anew, and trained row lengths are "
                "neither; restarts need dora: false"
            )
        if self.init in FROM_WEIGHT:
            raise UserError(
                f"lowrank.init: {self.init} takes its factors from the weight once, and a restart draws them anew; "
                "restarts need kaiming or orthogonal"
            )

    @torch.no_grad()
    def set_initial_factors_(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Begin with these factors; W gives up s·B A, so the layer's function stays (but for the base's rounding)."""
        assert self.initial_A is not None and self.initial_B is not None
        for own, initial, given in ((self.lora_A, self.initial_A, lora_A), (self.lora_B, self.initial_B, lora_B)):
            own.copy_(given)
            initial.copy_(given)
        self.base.add_(self.base.rows((-self.initial_scaling * self.initial_B) @ self.initial_A))
        self.base.settle()
        self._measure_magnitude()

    def _take_over_principal(self) -> None:
        weight = self.base.rows(self.base.exact).to(self.lora_A)
        try:
            self.set_initial_factors_(*principal(weight, self.r, self.initial_scaling))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise NonFinite(f"the weight of {self.name or 'a layer'} is not finite: it has no principal part") from None

    @torch.no_grad()
    def merge_(self) -> Tensor:
        """weight += s·B A in fp32 or better, and B = 0, so the layer's function stays; returns the update.

        Raises:
            NonFinite: the update or the weight is not finite; the weight has not moved.
        """
        delta = self.delta()
        self._take_up(delta)
        for merged in (self.lora_B, self.initial_A, self.initial_B):
            if merged is not None:
                merged.zero_()
        self._measure_magnitude()
        return delta

    @torch.no_grad()
    def replace_factors_(self, lora_A: Tensor, lora_B: Tensor | None, ranks: slice = slice(None)) -> Tensor:
        """Go on with these factors [k, in] and [out, k] (None: zero) at `ranks`; the layer's function stays.

        W takes up the product that they had and gives up the one that they get; returned is the first, in the weight's
        shape.

        Raises:
            NonFinite: the weight or a product is not finite; nothing has moved.
        """
        taken = self.base.rows((self.scaling * self.lora_B[:, ranks]) @ self.lora_A[ranks])
        lora_A = lora_A.to(self.lora_A)
        if lora_B is None:
            self._take_up(taken)
            self.lora_B[:, ranks] = 0
        else:
            lora_B = lora_B.to(self.lora_B)
            self._take_up(self.base.rows(self.base.rows(taken).addmm(self.initial_scaling * lora_B, lora_A, alpha=-1)))
            self.lora_B[:, ranks] = lora_B
        self.lora_A[ranks] = lora_A
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(self.initial_scaling)  # never 0: a zero scale beside a zero B has no gradient
        return taken

    def _take_up(self, change: Tensor) -> None:
        """weight += change, if both are finite."""
        # one sum tells of any NaN or infinity: cheaper than a mask of the weight's size
        if not torch.isfinite(change.sum() + self.base.exact.sum().to(change.device)):
            raise NonFinite(
                f"the update of {self.name or 'a low-rank layer'} is not finite, so it was not merged; "
                "continue from the last checkpoint with a lower lowrank_lr"
            )
        self.base.add_(change)

    def plain(self) -> nn.Module:
        """The layer this one stood in for, with the exact weight: merged after `merge_`, else as it was injected."""
        if self.initial_A is not None and self.initial_B is not None and self.initial_B.any():
            self.base.add_(self.base.rows((self.initial_scaling * self.initial_B) @ self.initial_A))
        replaced = self._replaced[0]
        self.weight.data = self.base.exact.to(self.weight.device)
        replaced.weight = self.weight.requires_grad_(self._weight_trained)
        return replaced

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Lengths [out] of the rows of W + s·B A, of the finest W on the device."""
        direction = self.base.dense(self.lora_A.dtype)
        return row_norms(direction.addmm_(self.scaling * self.lora_B, self.lora_A))

    @torch.no_grad()
    def _measure_magnitude(self) -> None:
        """Row lengths as they are: the layer's function is then that of W + s·B A."""
        if self.magnitude is not None:
            self.magnitude.copy_(self._row_norms())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With the exact weight, however it is stored."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base.master is not None or not self.weight.is_floating_point():
            destination[f"{prefix}weight"] = self.base.exact

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Into the exact weight, from which what is stored and multiplied is made anew."""
        key = f"{prefix}weight"
        given = state_dict.get(key)
        fits = isinstance(given, Tensor) and given.is_floating_point() and given.shape == self.base.shape
        exact = given if fits else None
        if given is not None and self.weight.shape != self.base.shape:  # nf4's codes have a shape of their own
            state_dict = state_dict | {key: self.weight}
            if exact is None:
                others[-1].append(f"size mismatch for {key}: the layer's weight is {list(self.base.shape)}")
        super()._load_from_state_dict(state_dict, prefix, *others)
        if exact is not None:
            self.base.set_(exact)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.initial_scaling:g}"
