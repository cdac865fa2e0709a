"""The low-rank layer: an `nn.Linear` with two more parameters.

    y = W x + b + s · B A x        W [out, in] frozen;  lora_A [r, in] and lora_B [out, r] trained;  s = lora_alpha / r

`weight` and `bias` keep their names, so checkpoints load by name and any model can hold the layer. After Hu et al. 2021
(arXiv 2106.09685, section 4.1); s = lora_alpha / sqrt(r) is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

A is drawn Kaiming-uniform and B is zero, so the layer starts with the function of W. If both were zero, neither would
have a gradient, and the layer would never train; the published ReLoRA code loses its first cycle in this way.

At the end of a cycle of ReLoRA (Lialin et al. 2023, arXiv 2307.05695, Algorithm 1) the product of the factors moves
into W and the factors start anew. `replace_factors_` does this for one layer, and `restart` calls it for all of them;
`merge_` is the merge without new factors, at the end of training.

Other initializations of the factors are in `init`, DoRA's trained row norms in `dora`, the storage of W in
`storage/frozen_weight`, and the order in which the products are computed in `kernel`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relora.errors import NonFinite, UserError
from relora.lowrank.calibrate import calibrated
from relora.lowrank.config import LowRankConfig, check_target
from relora.lowrank.division import Division, Part
from relora.lowrank.dora import dora_update_, rescaled, row_norms
from relora.lowrank.init import DRAW_A, NONZERO_INITS, principal_factors
from relora.lowrank.kernel import low_rank_linear
from relora.lowrank.storage.frozen_weight import FrozenLinear, FrozenWeight
from relora.seeding import keyed_generator


class LowRankLinear(FrozenLinear):
    """Low-rank layer that takes the place of a linear layer (or GPT-2's `Conv1D`) and shares its weight and bias.

    Args:
        replaced: the layer whose place is taken; it has `weight` and `bias`, and `unwrap` gives it back.
        config: settings for the whole model; the patterns in it decide this layer's r and lora_alpha.
        name: path of the layer in its model; the patterns match it, and it is part of the key of A's draw.
        seed: the run's seed, also part of that key.
        fan_in_fan_out: the weight is stored as [in, out], as in `Conv1D`.

    Raises:
        UserError: r exceeds the smaller side of the weight (the update would have full rank at a higher price).
    """

    scaling: Tensor | float
    """s: a number, or with `trainable_scaling` a trained scalar."""
    magnitude: nn.Parameter | None
    """DoRA's trained row norms [out]; None without DoRA."""
    initial_A: Tensor | None
    """lora_A as it started, for initializations whose first product was subtracted from W; else None. Together with
    `initial_B` it tells the update relative to the original W. Both are zero after a merge."""
    initial_B: Tensor | None
    """lora_B as it started; see `initial_A`."""
    division: Division | None = None
    """How the layer is divided among processes; None: this process holds all of it."""
    divided_buffers = ("frozen_copy", "frozen_scale")
    """Buffers that have a row for each output, and are divided with the weight."""

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
        self._replaced = (replaced,)  # in a tuple, so that it does not become a submodule
        self._weight_required_grad = self.weight.requires_grad
        self.saved_requires_grad: tuple[tuple[nn.Parameter, bool], ...] = ()
        """Parameters outside the targets whose `requires_grad` `inject` changed, with the value from before."""
        self.input_hook: RemovableHandle | None = None
        """Hook by which `inject` lets gradients into the blocks; at most one layer of a model has it."""
        self.base = FrozenWeight(
            self, config.base, config.frozen, fan_in_fan_out, cast=config.cast, keep_master=config.master
        )
        self.rates = config.rates or calibrated(self.weight.device)
        self._register_factors(config)
        self.redraw_(cycle=0)
        if self.init == "pissa":
            self._set_principal_factors_()
        self.base.release_master()
        self._reset_magnitude_()

    def _register_factors(self, config: LowRankConfig) -> None:
        """Register all that the layer trains, uninitialised, and the buffers for the initial factors."""
        dtype = torch.promote_types(self.base.exact.dtype, torch.float32)  # small updates need fp32 or better
        self.lora_A = nn.Parameter(self.weight.new_empty(self.r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, self.r, dtype=dtype))
        magnitude = nn.Parameter(self.weight.new_empty(self.out_features, dtype=dtype)) if config.dora else None
        self.register_parameter("magnitude", magnitude)
        self.scaling = self.initial_scaling
        if config.trainable_scaling:
            self.scaling = nn.Parameter(self.weight.new_empty((), dtype=dtype))
        for kind, factor in (("initial_A", self.lora_A), ("initial_B", self.lora_B)):
            self.register_buffer(kind, torch.zeros_like(factor) if self.init in NONZERO_INITS else None)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the update, by their names in the layer."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "magnitude": self.magnitude, "scaling": self.scaling}
        return {name: factor for name, factor in named.items() if isinstance(factor, nn.Parameter)}

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., out] from x [..., in]."""
        weight, weight_scale, arithmetic = self.base.operand(self.training)
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
            weight_scale=weight_scale,
            trained_weight=self.base.reorient(self.weight) if self.weight.requires_grad else None,
        )
        if self.magnitude is None:
            return y
        return rescaled(y, self.magnitude / self._row_norms(), self.bias)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update s·B A (with DoRA W' - W), in the factors' dtype and the weight's shape.

        Of a divided layer it is the update of this process's rows; the factors are whole (see `division`).
        """
        delta = (self.scaling * self.own_rows(self.lora_B)) @ self.lora_A  # [out, in], the only tensor of that size
        if self.magnitude is not None:
            delta = dora_update_(self.base.reorient(self.base.exact).to(delta), delta, self.magnitude)
        return self.base.reorient(delta)

    @torch.no_grad()
    def redraw_(self, cycle: int) -> None:
        """Draw A anew, keyed by seed, cycle and name (by default Kaiming-uniform: bound 1/sqrt(in)); set B to zero.

        Raises:
            UserError: `cycle` is not 0 and the layer cannot restart (see `check_restart`).
        """
        if cycle:
            self.check_restart()
        generator = keyed_generator(self.seed, "redraw", cycle, self.name)
        self.lora_A.copy_(DRAW_A[self.init](self.lora_A.shape, generator))
        self.lora_B.zero_()
        self._reset_scaling_()

    def check_restart(self) -> None:
        """Raise `UserError` if the layer holds an update that only one cycle can train: DoRA, pissa, gradient-svd."""
        if self.magnitude is not None:
            raise UserError(
                "lowrank.dora: a restart merges a low-rank update and draws it anew, and trained row lengths are "
                "neither; restarts need dora: false"
            )
        if self.init in NONZERO_INITS:
            raise UserError(
                f"lowrank.init: {self.init} takes its factors from the weight once, and a restart draws them anew; "
                "restarts need kaiming or orthogonal"
            )

    @torch.no_grad()
    def replace_factors_(self, lora_A: Tensor, lora_B: Tensor | None, ranks: slice = slice(None)) -> Tensor:
        """Fold the old product into W, subtract the new one, and set the new factors: W += s·B A - s·B' A'.

        The layer's function does not change. A trained s goes back to its initial value, which scales the new product.

        Args:
            lora_A: the new A' [k, in] for the ranks that are replaced.
            lora_B: the new B' [out, k]; None for zero, so that nothing is subtracted.
            ranks: the k ranks that are replaced; all unless given.

        Returns:
            The old product s·B A of these ranks, in the weight's shape.

        Raises:
            NonFinite: the weight or a product is not finite; nothing has changed.
        """
        old_product = self.base.reorient((self.scaling * self.own_rows(self.lora_B)[:, ranks]) @ self.lora_A[ranks])
        lora_A = lora_A.to(self.lora_A)
        if lora_B is None:
            self._add_to_weight_(old_product)
            self.lora_B[:, ranks] = 0
        else:
            lora_B = lora_B.to(self.lora_B)
            new_b = self.initial_scaling * self.own_rows(lora_B)
            difference = self.base.reorient(old_product).addmm(new_b, lora_A, alpha=-1)
            self._add_to_weight_(self.base.reorient(difference))
            self.lora_B[:, ranks] = lora_B
        self.lora_A[ranks] = lora_A
        self._reset_scaling_()
        return old_product

    @torch.no_grad()
    def merge_(self) -> Tensor:
        """Merge the update: W += s·B A in fp32 or better, and B = 0, so the layer's function does not change.

        Returns:
            The update that was merged, in the weight's shape.

        Raises:
            NonFinite: the update or the weight is not finite; the weight has not changed.
        """
        delta = self.delta()
        self._add_to_weight_(delta)
        for merged in (self.lora_B, self.initial_A, self.initial_B):
            if merged is not None:
                merged.zero_()
        self._reset_magnitude_()
        return delta

    def _add_to_weight_(self, change: Tensor) -> None:
        """Add `change`, which has the weight's shape, to W; raise `NonFinite` if it or W is not finite."""
        # the sum is not finite if any entry is not: cheaper than a mask of the weight's size
        if not torch.isfinite(self.total(change) + self.total(self.base.exact).to(change.device)):
            raise NonFinite(
                f"the update of {self.name or 'a low-rank layer'} is not finite, so it was not merged; "
                "continue from the last checkpoint with a lower lowrank_lr"
            )
        self.base.add_(change)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of all entries of a tensor, of which each process has some rows if the layer is divided."""
        return tensor.sum() if self.division is None else self.division.total(tensor)

    def norm(self, tensor: Tensor) -> float:
        """Return the Frobenius norm of a tensor, of which each process has some rows if the layer is divided."""
        return tensor.norm().item() if self.division is None else self.division.norm(tensor)

    def whole(self, matrix: Tensor) -> Tensor:
        """Return a matrix [out, ...] of which each process has some rows if the layer is divided."""
        return matrix if self.division is None else self.division.gather(matrix, 0, self.out_features)

    def own_rows(self, matrix: Tensor) -> Tensor:
        """Return those rows of a matrix [out, ...] that the weight has here; all, unless the layer is divided."""
        if self.division is None or len(matrix) == self.base.rows:
            return matrix
        return matrix[self.division.own(self.out_features)]

    def _reset_scaling_(self) -> None:
        """Set a trained scale back to its initial value; at 0, beside B = 0, nothing would have a gradient."""
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(self.initial_scaling)

    @torch.no_grad()
    def set_initial_factors_(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Start with these factors [r, in] and [out, r], subtract their product s·B A from W, and remember them.

        The layer's function does not change, except for the rounding of the stored weight. Only layers whose `init` is
        one of `NONZERO_INITS` can do this.
        """
        assert self.initial_A is not None and self.initial_B is not None
        for own, initial, given in ((self.lora_A, self.initial_A, lora_A), (self.lora_B, self.initial_B, lora_B)):
            own.copy_(given)
            initial.copy_(given)
        self.base.add_(self.base.reorient((-self.initial_scaling * self.initial_B) @ self.initial_A))
        self.base.release_master()
        self._reset_magnitude_()

    def _set_principal_factors_(self) -> None:
        """Start with the principal factors of W (PiSSA); raise `NonFinite` if W is not finite."""
        weight = self.base.reorient(self.base.exact).to(self.lora_A)
        try:
            self.set_initial_factors_(*principal_factors(weight, self.r, self.initial_scaling))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise NonFinite(f"the weight of {self.name or 'a layer'} is not finite: it has no principal part") from None

    def unwrap(self) -> nn.Module:
        """Return the replaced layer with the exact weight: the merged one after `merge_`, else that before injection.

        An initial product that was subtracted from W is added back, unless it has been merged.
        """
        if self.initial_A is not None and self.initial_B is not None and self.initial_B.any():
            initial_b = self.own_rows(self.initial_B)
            self.base.add_(self.base.reorient((self.initial_scaling * initial_b) @ self.initial_A))
        replaced = self._replaced[0]
        self.weight.data = self.base.exact.to(self.weight.device)
        if self.division is not None:
            self.weight.part = Part(self.division, int(self.base.transposed), self.out_features)  # type: ignore[attr-defined]
        replaced.weight = self.weight.requires_grad_(self._weight_required_grad)
        return replaced

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Compute the norms [out] of the rows of W + s·B A, with the most precise W on the device."""
        direction = self.base.dense(self.lora_A.dtype)
        return row_norms(direction.addmm_(self.scaling * self.own_rows(self.lora_B), self.lora_A))

    @torch.no_grad()
    def _reset_magnitude_(self) -> None:
        """Set DoRA's magnitude to the present row norms, so that the layer's function is that of W + s·B A."""
        if self.magnitude is not None:
            self.magnitude.copy_(self._row_norms())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save as `nn.Module` does, but with the exact weight, in whatever form it is stored."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base.master is not None or not self.weight.is_floating_point():
            destination[f"{prefix}weight"] = self.base.exact

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load as `nn.Module` does, but set the exact weight, from which the stored one and its copies are made again.

        Args:
            others: the remaining arguments of `nn.Module._load_from_state_dict`; the last is the list of errors.
        """
        key = f"{prefix}weight"
        given = state_dict.get(key)
        fits = isinstance(given, Tensor) and given.is_floating_point() and given.shape == self.base.shape
        exact = given if fits else None
        if given is not None and self.weight.shape != self.base.shape:  # nf4 codes have a shape of their own
            state_dict = state_dict | {key: self.weight}  # so that `nn.Module` finds a weight of the shape it expects
            if exact is None:
                error_messages = others[-1]
                error_messages.append(f"size mismatch for {key}: the layer's weight is {list(self.base.shape)}")
        super()._load_from_state_dict(state_dict, prefix, *others)
        if exact is not None:
            self.base.set_(exact)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer: sides, bias, r and s."""
        return f"{super().extra_repr()}, r={self.r}, scaling={self.initial_scaling:g}"
