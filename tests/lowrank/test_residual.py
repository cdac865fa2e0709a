"""The residual step follows the formula, and lies outside the row space of A."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import LowRankConfig, LowRankLinear, inject, low_rank_layers, merge
from relora.lowrank.config import Residual
from relora.lowrank.costs import NOMINAL_RATES
from relora.lowrank.residual import remove_row_space_, residual_steps
from relora.lowrank.storage.int8 import quantize_rows

ALWAYS = Residual(scale=1.0)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is [in, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight, self.bias = (
            nn.Parameter(torch.empty(in_features, out_features)),
            nn.Parameter(torch.zeros(out_features)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def layer_of(
    in_features: int = 12, out_features: int = 9, r: int = 3, conv1d: bool = False, **options: object
) -> LowRankLinear:
    """Build a layer in the middle of a cycle, in float64."""
    plain = Conv1D(in_features, out_features) if conv1d else nn.Linear(in_features, out_features)
    model = nn.Sequential(plain).double()
    with torch.no_grad():
        weight = drawn(out_features, in_features, seed=5) / in_features**0.5
        plain.weight.copy_(weight.T if conv1d else weight)
        plain.bias.copy_(drawn(out_features, seed=8) / 10)
    inject(model, LowRankConfig(r=r, lora_alpha=2 * r, target_modules=("0",), rates=NOMINAL_RATES, **options))  # type: ignore[arg-type]
    layer = low_rank_layers(model)["0"]
    with torch.no_grad():
        layer.lora_A.copy_(drawn(r, in_features, seed=6) / in_features**0.5)
        layer.lora_B.copy_(drawn(out_features, r, seed=7) / 10)
    return layer


def adamw(layer: nn.Module, **options: object) -> torch.optim.AdamW:
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, **({"lr": 0.03, "weight_decay": 0.1, "fused": True} | options))  # type: ignore[arg-type]


def loss_of(y: Tensor, step: int) -> Tensor:
    """Compute a loss with another target in every step."""
    return F.mse_loss(y, drawn(*y.shape, seed=100 + step).to(y.dtype))


def take_step(
    layer: LowRankLinear,
    optimizer: torch.optim.Optimizer,
    step: int,
    residual: Residual = ALWAYS,
    loss: Callable[[Tensor, int], Tensor] = loss_of,
    clip: float = 0.0,
) -> None:
    with residual_steps(layer, optimizer, residual, step):
        x = drawn(20, layer.in_features, seed=50 + step).to(layer.lora_A.dtype)
        loss(layer(x), step).backward()
        if clip:
            nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


# The projection


def test_the_result_is_outside_the_row_space_of_a() -> None:
    gradient, a = drawn(7, 10), drawn(4, 10, seed=1)
    expected = gradient @ (torch.eye(10, dtype=torch.float64) - torch.linalg.pinv(a) @ a)
    left = remove_row_space_(gradient.clone(), a)
    torch.testing.assert_close(left, expected, rtol=1e-10, atol=1e-10)
    assert (left @ a.T).abs().max() < 1e-10 < left.abs().max()
    torch.testing.assert_close(
        remove_row_space_(left.clone(), a), left, rtol=1e-10, atol=1e-10
    )  # applying it twice changes nothing


def test_exact_to_a_thousandth_in_fp32() -> None:
    """The ridge is a few rounding errors; A has half as many rows as columns."""
    gradient, a = drawn(96, 128, dtype=torch.float32), drawn(64, 128, seed=1, dtype=torch.float32)
    expected = remove_row_space_(gradient.double(), a.double())
    assert (remove_row_space_(gradient.clone(), a) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("defect", ["dependent", "zero row", "zero"])
def test_works_if_rows_of_a_are_dependent(defect: str) -> None:
    gradient, a = drawn(6, 10, dtype=torch.float32), drawn(4, 10, seed=1, dtype=torch.float32)
    if defect == "dependent":
        a[3] = 2 * a[0] - a[1]
    else:
        a[3 if defect == "zero row" else slice(None)] = 0
    left = remove_row_space_(gradient.clone(), a)
    rows = torch.linalg.pinv(a.double(), rtol=1e-5) @ a.double()
    expected = gradient.double() @ (torch.eye(10) - rows)
    assert (left - expected).norm() < 0.05 * expected.norm()


# The step


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("scale", "every_steps"), [(1.0, 1), (0.3, 2)])
@pytest.mark.parametrize("options", [{}, {"trainable_scaling": True}], ids=["fixed", "trained scale"])
def test_equals_a_twin_in_plain_pytorch(
    conv1d: bool, scale: float, every_steps: int, options: dict[str, object]
) -> None:
    """Six steps with weight decay and clipping agree to 1e-6, because AdamW counts its steps in fp32."""
    layer = layer_of(conv1d=conv1d, **options)
    optimizer = adamw(layer)
    start = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    w, a, b, beta = (start[name].requires_grad_() for name in ("weight", "lora_A", "lora_B", "bias"))
    s = start.get("scaling", torch.tensor(2.0, dtype=torch.float64)).requires_grad_("scaling" in start)
    trained = [p for p in (a, b, beta, s) if p.requires_grad]
    twin = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.1)
    for step in range(6):
        take_step(layer, optimizer, step, Residual(scale=scale, every_steps=every_steps), clip=0.05)
        due = step % every_steps == 0
        plain = w.T if conv1d else w
        loss_of(F.linear(drawn(20, 12, seed=50 + step), plain + s * b @ a, beta), step).backward()
        nn.utils.clip_grad_norm_([*trained, w] if due else trained, 0.05)
        before, g, dense = b.detach().clone(), b.grad, w.grad
        assert g is not None and dense is not None
        twin.step()
        if due:
            with torch.no_grad():
                u = (before * (1 - 0.03 * 0.1) - b) / 0.03
                phi = u.norm(dim=1) / g.norm(dim=1)
                phi = phi.clamp(max=10 * phi.median())
                dense = dense.T if conv1d else dense
                outside = dense - dense @ torch.linalg.pinv(a) @ a
                move = scale * 0.03 * s**2 * a.norm() ** 2 / 3 * phi[:, None] * outside
                w -= move.T if conv1d else move
        twin.zero_grad()
        w.grad = None
    for name, parameter in {"weight": w, "lora_A": a, "lora_B": b, "bias": beta}.items():
        torch.testing.assert_close(layer.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    assert (w - layer_of(conv1d=conv1d).weight).norm() > 0.01


def test_has_the_learning_rate_of_the_factors() -> None:
    """With orthogonal rows of A and scale 1, W + s B A moves as if AdamW's step on B were not limited to a subspace."""
    layer = layer_of(in_features=32, r=8)
    with torch.no_grad():
        layer.lora_A.copy_(torch.linalg.qr(drawn(32, 8, seed=1)).Q.T)
    optimizer = adamw(layer, weight_decay=0.0)
    layer.lora_A.requires_grad_(False)
    effective = layer.weight + layer.delta()
    gradients: list[Tensor] = []

    def noting(y: Tensor, step: int) -> Tensor:
        layer.weight.register_hook(lambda grad: gradients.append(grad.clone()))
        return loss_of(y, step)

    take_step(layer, optimizer, 0, loss=noting)
    moved = layer.weight + layer.delta() - effective
    inside = gradients[0] @ layer.lora_A.T @ layer.lora_A
    lengths = (moved @ layer.lora_A.T).norm(dim=1) / inside.norm(dim=1)
    outside = moved - moved @ layer.lora_A.T @ layer.lora_A
    torch.testing.assert_close(outside, -lengths[:, None] * (gradients[0] - inside), rtol=1e-6, atol=1e-9)


def test_is_zero_if_the_rows_of_a_span_everything() -> None:
    changes = []
    for r in (8, 2):
        layer = layer_of(in_features=8, out_features=12, r=r)
        before = layer.weight.detach().clone()
        take_step(layer, adamw(layer), 0)
        changes.append((layer.weight - before).norm().item())
    assert changes[0] < 1e-9 * changes[1]


def test_lowers_the_loss_further_than_the_factors_alone() -> None:
    """Fit a full-rank target with factors of rank 1, always with the same learning rate."""
    target = drawn(9, 12, seed=3) / 3

    def fit(y: Tensor, step: int) -> Tensor:
        return F.mse_loss(y, F.linear(drawn(20, 12, seed=50 + step), target))

    losses = {}
    for scale in (0.0, 0.5, 1.0):
        layer = layer_of(r=1)
        optimizer = adamw(layer, lr=0.02, weight_decay=0.0)
        for step in range(10):
            take_step(layer, optimizer, step, Residual(scale=scale), fit)
        with torch.no_grad():
            losses[scale] = fit(layer(drawn(20, 12, seed=49)), -1).item()
    assert losses[1.0] < losses[0.5] < losses[0.0] and losses[1.0] < 0.5 * losses[0.0]


def test_merge_restores_the_plain_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).double()
    report = inject(model, LowRankConfig(r=2, rates=NOMINAL_RATES, residual=ALWAYS))
    assert report.moved == report.frozen == 6 * 5 + 5 * 4 and "of which 50 follow their residual" in str(report)
    optimizer, x = adamw(model, weight_decay=0.0), drawn(10, 6)
    for step in range(3):
        with residual_steps(model, optimizer, ALWAYS, step):
            loss_of(model(x), step).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = model(x)
    merge(model)
    assert all(type(module) is nn.Linear and module.weight.requires_grad for module in model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


# Conditions under which the weight does not move, and products of lower precision


def test_codes_of_the_weight_follow_it() -> None:
    """Codes are made again after every step; dW is computed from the exact input and output gradient."""
    layer = layer_of(in_features=48, out_features=40, frozen="int8").float()
    layer.train()
    optimizer, x, before = adamw(layer), drawn(64, 48, dtype=torch.float32), layer.weight.detach().clone()
    for step in range(3):
        with residual_steps(layer, optimizer, ALWAYS, step):
            y = layer(x)
            y.retain_grad()
            loss_of(y, step).backward()
            torch.testing.assert_close(layer.weight.grad, y.grad.T @ x)
            optimizer.step()
            optimizer.zero_grad()
        codes, scales = quantize_rows(layer.weight.detach())
        assert torch.equal(layer.frozen_copy, codes) and torch.equal(layer.frozen_scale, scales)
    assert not torch.isclose(layer.weight, before).all()


@pytest.mark.parametrize("residual", [Residual(), Residual(scale=1.0, every_steps=2)], ids=["off", "not due"])
def test_without_a_due_step_nothing_changes(residual: Residual) -> None:
    layer = layer_of()
    optimizer, before = adamw(layer), layer.weight.detach().clone()
    with residual_steps(layer, optimizer, residual, 1):
        assert not layer.weight.requires_grad and not optimizer._optimizer_step_post_hooks
        loss_of(layer(drawn(20, 12)), 1).backward()
        optimizer.step()
    assert layer.weight.grad is None and torch.equal(layer.weight, before)


@pytest.mark.parametrize("fails", [False, True])
def test_after_the_step_the_weight_is_frozen_and_has_no_gradient(fails: bool) -> None:
    layer = layer_of()
    optimizer = adamw(layer)

    def loss(y: Tensor, step: int) -> Tensor:
        assert layer.weight.requires_grad
        if fails:
            loss_of(y, step).backward(retain_graph=True)
            raise ArithmeticError
        return loss_of(y, step)

    if fails:
        with pytest.raises(ArithmeticError):
            take_step(layer, optimizer, 0, loss=loss)
    else:
        take_step(layer, optimizer, 0, loss=loss)
    assert not layer.weight.requires_grad and layer.weight.grad is None
    assert not optimizer._optimizer_step_post_hooks
    assert layer.weight not in optimizer.state


def test_rows_without_a_gradient_of_lora_b_do_not_move() -> None:
    """First because the loss does not depend on these outputs, then because A x is zero for the given input."""
    layer = layer_of()
    optimizer, before = adamw(layer, weight_decay=0.0), layer.weight.detach().clone()
    for step in range(3):
        take_step(layer, optimizer, step, loss=lambda y, step: loss_of(y[:, :2], step))
    assert torch.isfinite(layer.weight).all()
    assert torch.equal(layer.weight[2:], before[2:]) and (layer.weight - before)[:2].norm() > 0.01
    with torch.no_grad():
        layer.lora_A[:, :6] = 0  # A x depends on the second half of the input only
        layer.lora_B.zero_()
    before = layer.weight.detach().clone()
    optimizer = adamw(layer, weight_decay=0.0)
    with residual_steps(layer, optimizer, ALWAYS, 0):
        x = drawn(20, 12)
        x[:, 6:] = 0
        loss_of(layer(x), 0).backward()
        assert layer.weight.grad is not None and layer.weight.grad.any() and not layer.lora_B.grad.any()
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_the_step_of_a_row_with_a_tiny_gradient_is_limited() -> None:
    """Its ‖u‖ / ‖g‖ is 1e6 times that of the other rows, but φ is at most ten times the median."""
    layer = layer_of()
    optimizer = adamw(layer, weight_decay=0.0)
    for step in range(5):
        take_step(layer, optimizer, step)
    before = layer.weight.detach().clone()
    gradient_scale = torch.ones(9, dtype=torch.float64)
    gradient_scale[0] = 1e-6

    def loss_with_scaled_gradients(y: Tensor, step: int) -> Tensor:
        return loss_of(y.detach() + gradient_scale * (y - y.detach()), step)

    take_step(layer, optimizer, 5, loss=loss_with_scaled_gradients)
    lengths = (layer.weight - before).norm(dim=1)
    assert 0 < lengths[0] < 1e-4 * lengths[1:].median()


def test_an_optimizer_without_moments_of_lora_b_moves_no_weight() -> None:
    layer = layer_of()
    before, factor = layer.weight.detach().clone(), layer.lora_B.detach().clone()
    take_step(layer, torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1), 0)
    assert torch.equal(layer.weight, before) and not torch.equal(layer.lora_B, factor)


@pytest.mark.parametrize("moments", [False, True])
def test_a_skipped_update_of_the_optimizer_skips_the_residual_step(moments: bool) -> None:
    """The gradients are not finite, and `found_inf` on the device makes the optimizer skip its update."""
    layer = layer_of()
    optimizer = adamw(layer)
    if moments:
        take_step(layer, optimizer, 0)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    take_step(layer, optimizer, 1, loss=lambda y, step: loss_of(y, step) * torch.nan)
    assert all(torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    take_step(layer, optimizer, 2)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())


def test_dropout_does_not_affect_the_gradient_of_the_weight() -> None:
    layer = layer_of(lora_dropout=0.5)
    x = drawn(20, 12)
    with residual_steps(layer, adamw(layer), ALWAYS, 0):
        y = layer(x)
        weights = drawn(*y.shape, seed=9)
        (y * weights).sum().backward()
        torch.testing.assert_close(layer.weight.grad, weights.T @ x, rtol=1e-10, atol=1e-10)


# Options that it cannot be combined with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "bf16"}, "base: bf16 would round it anew"),
        ({"base": "nf4"}, "base: nf4"),
        ({"rest": "frozen"}, "it is for pretraining"),
        ({"dora": True}, "it is for pretraining"),
        ({"init": "pissa"}, "it is for pretraining"),
    ],
)
def test_combinations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowRankConfig(residual=ALWAYS, **options)  # type: ignore[arg-type]
    LowRankConfig(residual=Residual(every_steps=3), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("residual", [Residual(scale=-1.0), Residual(scale=1.0, every_steps=0)])
def test_impossible_numbers_are_refused(residual: Residual) -> None:
    with pytest.raises(UserError, match=r"lowrank\.residual: scale must be 0 or more, every_steps 1 or more"):
        LowRankConfig(residual=residual)
