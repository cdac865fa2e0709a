"""The restart: the function stays the same, factors start anew, optimizer state is reset, and the report is right."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora.errors import NonFinite, RunStopped, UserError
from relora.lowrank import LowRankConfig, RestartConfig, inject, low_rank_layers, restart
from relora.lowrank.restart import effective_rank, set_initial_directions_, update_spectrum


def trained(steps: int = 5, **config: object) -> tuple[nn.Module, torch.optim.AdamW, torch.Tensor]:
    """Build a small network after a few AdamW steps; its first two linear layers are targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    inject(model, LowRankConfig(**{"r": 3, "lora_alpha": 3, "target_modules": ("2", "0"), **config}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    x = torch.randn(32, 10)
    train(model, optimizer, x, steps)
    return model, optimizer, x


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - torch.sin(x[:, :4] * 2)).square().mean()


CONFIGS = [
    *(RestartConfig(init=init) for init in ("kaiming", "orthogonal", "gradient-svd", "weight-svd")),
    *(
        RestartConfig(init="balanced", directions=directions)
        for directions in ("orthogonal", "gradient-svd", "weight-svd")
    ),
    *(RestartConfig(init="balanced", directions=directions, retain=0.5) for directions in ("orthogonal", "weight-svd")),
    RestartConfig(init="balanced", stagger="ranks", turns=3),
    RestartConfig(init="orthogonal", stagger="layers", turns=2),
]


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_output_is_unchanged(base: str) -> None:
    model, optimizer, x = trained(base=base)
    before = model(x)
    restart(model, optimizer, cycle=1)
    tolerance = 1e-6 if base == "fp32" else 3e-2  # the rounding of the stored weight
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", CONFIGS, ids=str)
def test_no_restart_changes_the_function(how: RestartConfig) -> None:
    model, optimizer, x = trained()
    before, old = model(x), {name: layer.lora_A.detach().clone() for name, layer in low_rank_layers(model).items()}
    for cycle in range(1, how.turns + 1):
        restart(model, optimizer, how, cycle=cycle, loss_of=lambda model: loss(model, x))
        torch.testing.assert_close(
            model(x), before, rtol=1e-5, atol=1e-6
        )  # rounding of the products added to W in fp32
    for name, layer in low_rank_layers(model).items():
        assert not torch.isclose(layer.lora_A, old[name]).any()  # after all turns, every rank is new
        assert bool(layer.lora_B.any()) == (how.init == "balanced")
    train(model, optimizer, x, 2)
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in low_rank_layers(model).values())


@pytest.mark.parametrize("how", CONFIGS, ids=str)
def test_no_restart_changes_the_function_of_a_transposed_layer(how: RestartConfig) -> None:
    """GPT-2's linear layers, whose weights are [in, out]."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(16, 10), nn.Tanh(), Conv1D(4, 16))
    inject(model, LowRankConfig(r=3, lora_alpha=3, target_modules=("0", "2")))
    optimizer, x = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02), torch.randn(32, 10)
    train(model, optimizer, x, 3)
    before, weights = model(x), [layer.weight.clone() for layer in low_rank_layers(model).values()]
    restart(model, optimizer, how, cycle=1, loss_of=lambda model: loss(model, x))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    changed = [
        not torch.equal(layer.weight, w) for layer, w in zip(low_rank_layers(model).values(), weights, strict=True)
    ]
    assert changed == ([True, False] if how.stagger == "layers" else [True, True])


def test_balanced_factors_have_the_norms_of_the_old_ones_and_a_gradient_in_the_first_step() -> None:
    model, optimizer, x = trained()
    layers = low_rank_layers(model)
    norms = {name: (layer.lora_A.norm(), layer.lora_B.norm()) for name, layer in layers.items()}
    restart(model, optimizer, RestartConfig(init="balanced"), cycle=1)
    for name, layer in layers.items():
        torch.testing.assert_close((layer.lora_A.norm(), layer.lora_B.norm()), norms[name])
        for rows in (layer.lora_A, layer.lora_B.T):  # orthogonal rows of equal norm
            torch.testing.assert_close(rows @ rows.T, torch.eye(3) * rows[0].square().sum(), rtol=1e-5, atol=1e-6)
    train(model, optimizer, x, 1)
    assert all(layer.lora_A.grad.any() for layer in layers.values())  # beside B = 0 it would be zero


@pytest.mark.parametrize("directions", ["orthogonal", "gradient-svd", "weight-svd"])
def test_leading_directions_are_retained_and_the_others_are_new(directions: str) -> None:
    model, optimizer, x = trained()
    layers = low_rank_layers(model)
    old = {name: torch.linalg.svd((layer.lora_B @ layer.lora_A).detach().double()) for name, layer in layers.items()}
    how = RestartConfig(init="balanced", directions=directions, retain=0.67)
    restart(model, optimizer, how, cycle=1, loss_of=lambda model: loss(model, x))
    for name, layer in layers.items():
        u, values, vt = (part.float() for part in old[name])
        product = layer.lora_B @ layer.lora_A
        for i in range(2):  # 0.67 of 3 ranks, rounded down
            torch.testing.assert_close(product @ vt[i], values[i] * u[:, i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.lora_A[i].norm(), values[i].sqrt(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.lora_A[2].norm(), values[:3].mean().sqrt(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.lora_A[2] @ vt[:2].T, torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.lora_B[:, 2] @ u[:, :2], torch.zeros(2), rtol=0, atol=1e-5)
        assert abs(layer.lora_A[2] @ vt[2]) < 0.99 * layer.lora_A[2].norm()  # the weakest direction is given up


def test_the_momentum_of_retained_directions_goes_along() -> None:
    """lora_A's gradient in rank i is s·b_iᵀ dW, so with the whole product retained, dW is seen as before."""
    model, optimizer, _ = trained()
    layer = low_rank_layers(model)["2"]
    old_b, momentum = layer.lora_B.detach().clone(), optimizer.state[layer.lora_A]["exp_avg"].clone()
    restart(model, optimizer, RestartConfig(init="balanced", optimizer="project", retain=0.67), cycle=1)
    seen = torch.linalg.pinv(old_b.T) @ momentum  # the part of dW [out, in] that the old factors saw
    now = optimizer.state[layer.lora_A]["exp_avg"]
    torch.testing.assert_close(now[:2], layer.lora_B.T[:2] @ seen, rtol=1e-4, atol=1e-6)


def test_factors_whose_product_is_zero_retain_nothing() -> None:
    model, optimizer, x = trained(steps=0)
    restart(model, optimizer, RestartConfig(init="balanced", retain=0.5), cycle=1)
    layer = low_rank_layers(model)["0"]
    assert layer.lora_A.any()  # beside B = 0; a pair of zeros would never move
    train(model, optimizer, x, 1)
    assert layer.lora_B.grad.any()


def test_each_turn_restarts_one_part() -> None:
    for stagger, kept_rows in (("layers", {"0": 3, "2": 0}), ("ranks", {"0": 2, "2": 2})):
        model, optimizer, _ = trained()
        layers = low_rank_layers(model)
        old = {name: layer.lora_A.detach().clone() for name, layer in layers.items()}
        turns = 2 if stagger == "layers" else 3
        how = RestartConfig(init="balanced", stagger=stagger, turns=turns)
        report = restart(model, optimizer, how, cycle=2)
        for name, layer in layers.items():
            assert (layer.lora_A == old[name]).all(1).sum() == kept_rows[name]
        assert [len(update.singular_values) for update in report.layers] == ([3] if stagger == "layers" else [1, 1])


def test_restarting_some_ranks_clears_their_moments_only() -> None:
    model, optimizer, x = trained()
    layer = low_rank_layers(model)["0"]
    before = {kind: {k: v.clone() for k, v in optimizer.state[f].items()} for kind, f in layer.factors.items()}
    restart(model, optimizer, RestartConfig(init="balanced", stagger="ranks", turns=3), cycle=2)
    for kind, moments in before.items():
        state = optimizer.state[layer.factors[kind]]
        rows = {key: (state[key] if kind == "lora_A" else state[key].T) for key in ("exp_avg", "exp_avg_sq")}
        old = {key: (moments[key] if kind == "lora_A" else moments[key].T) for key in rows}
        assert not rows["exp_avg"][1].any() and state["step"] == moments["step"]
        torch.testing.assert_close(rows["exp_avg_sq"][1], old["exp_avg_sq"][[0, 2]].mean(0))
        assert all(torch.equal(rows[key][[0, 2]], old[key][[0, 2]]) for key in rows)
    factors = {kind: factor.detach().clone() for kind, factor in layer.factors.items()}
    train(model, optimizer, x, 1)  # lr 0.02: with v = 0 beside a step of 5 the first update would be 0.02 / 0.07 long
    for kind, factor in layer.factors.items():
        assert (factor - factors[kind]).abs().max() < 0.06


def test_directions_of_the_gradient_need_a_loss() -> None:
    model, optimizer, _ = trained()
    with pytest.raises(ValueError, match="loss_of"):
        restart(model, optimizer, RestartConfig(init="gradient-svd"), cycle=1)


def test_nothing_changes_if_the_gradient_is_not_finite() -> None:
    model, optimizer, x = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFinite, match="gradient"):
        restart(model, optimizer, RestartConfig(init="gradient-svd"), cycle=1, loss_of=lambda m: m(x).sum() * torch.nan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("init", ["orthogonal", "gradient-svd", "weight-svd", "balanced"])
def test_the_first_factors_have_the_directions_of_later_ones(init: str) -> None:
    model, _, x = trained(steps=0)
    layers, before = low_rank_layers(model), model(x)
    set_initial_directions_(model, RestartConfig(init=init), lambda model: loss(model, x))
    torch.testing.assert_close(model(x), before)
    for layer in layers.values():
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(3), rtol=1e-5, atol=1e-6)
        assert not layer.lora_B.any()


def test_new_factors_have_gradients() -> None:
    model, optimizer, x = trained()
    old = {name: layer.lora_A.detach().clone() for name, layer in low_rank_layers(model).items()}
    restart(model, optimizer, cycle=1)
    for name, layer in low_rank_layers(model).items():
        assert not layer.lora_B.any() and not torch.equal(layer.lora_A, old[name])
    train(model, optimizer, x, 2)
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in low_rank_layers(model).values())


def test_trained_scale_stays_alive() -> None:
    model, optimizer, x = trained(trainable_scaling=True)
    restart(model, optimizer, cycle=1)
    train(model, optimizer, x, 20)
    for layer in low_rank_layers(model).values():
        assert layer.lora_B.any() and layer.scaling.grad.any() and layer.scaling != 1.0


def test_some_ranks_of_a_layer_with_a_trained_scale_are_refused() -> None:
    """The scale would return to its start under ranks that do not restart, and the function would change."""
    model, optimizer, x = trained(trainable_scaling=True)
    before = model(x).detach()
    with pytest.raises(UserError, match=r"stagger: ranks.*use stagger: layers"):
        restart(model, optimizer, RestartConfig(stagger="ranks", turns=2), cycle=1)
    assert torch.equal(model(x), before)


def test_zero_resets_moments_and_step_of_the_factors_and_of_nothing_else() -> None:
    model, optimizer, x = trained()
    head = model[4].weight
    kept = {key: value.clone() for key, value in optimizer.state[head].items()}
    restart(model, optimizer, cycle=1)
    assert all(torch.equal(kept[key], value) for key, value in optimizer.state[head].items())
    assert all(
        factor not in optimizer.state for layer in low_rank_layers(model).values() for factor in layer.factors.values()
    )
    lr = optimizer.param_groups[0]["lr"] = 1e-3
    before = {name: layer.lora_B.detach().clone() for name, layer in low_rank_layers(model).items()}
    train(model, optimizer, x, 1)
    for name, layer in low_rank_layers(model).items():  # Adam's very first update is lr long; a kept step makes it 3 lr
        assert (layer.lora_B - before[name]).abs().max() <= 1.001 * lr
        assert optimizer.state[layer.lora_B]["step"] == 1


@pytest.mark.parametrize("reset", ["random", "magnitude"])
def test_pruning_uses_one_mask_for_both_moments(reset: str) -> None:
    model, optimizer, _ = trained()
    before = {
        name: {key: value.clone() for key, value in optimizer.state[layer.lora_A].items()}
        for name, layer in low_rank_layers(model).items()
    }
    report = restart(model, optimizer, cycle=1, how=RestartConfig(optimizer=reset, keep_ratio=0.25))
    for name, layer in low_rank_layers(model).items():
        state, size = optimizer.state[layer.lora_A], layer.lora_A.numel()
        kept = state["exp_avg"] != 0
        assert torch.equal(kept, state["exp_avg_sq"] != 0)
        assert torch.equal(state["exp_avg"][kept], before[name]["exp_avg"][kept])
        assert state["step"] == before[name]["step"]
        if reset == "magnitude":
            assert kept.sum() == -(-size // 4)
            assert before[name]["exp_avg"][kept].abs().min() >= before[name]["exp_avg"][~kept].abs().max()
        else:
            assert 0 < kept.sum() < size
    assert report.moments_cleared > 0


def test_keep_touches_no_moment() -> None:
    model, optimizer, _ = trained()
    before = {parameter: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    assert restart(model, optimizer, cycle=1, how=RestartConfig(optimizer="keep")).moments_cleared == 0
    assert all(torch.equal(before[parameter], state["exp_avg"]) for parameter, state in optimizer.state.items())


def test_magnitude_pruning_takes_tensors_of_more_than_16_million_entries() -> None:
    """The published code prunes by torch.quantile, which refuses so many."""
    model = nn.Sequential(nn.Linear(2**24 + 1, 1, bias=False))
    inject(model, LowRankConfig(r=1))
    layer = low_rank_layers(model)["0"]
    optimizer = torch.optim.AdamW([layer.lora_A], fused=True)
    layer.lora_A.grad = torch.ones_like(layer.lora_A)
    optimizer.step()
    report = restart(model, optimizer, cycle=1, how=RestartConfig(optimizer="magnitude", keep_ratio=0.5))
    assert report.moments_cleared == 2 * 2**23


def test_pruning_refuses_moments_in_8_bit_codes() -> None:
    model, optimizer, _ = trained()
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"restart\.optimizer"):
        restart(model, optimizer, cycle=1, how=RestartConfig(optimizer="magnitude"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rank_of_the_accumulated_update_grows_past_r() -> None:
    model, optimizer, x = trained(steps=0)
    start = {name: layer.weight.detach().clone() for name, layer in low_rank_layers(model).items()}
    ranks = []
    for cycle in (1, 2, 3):
        train(model, optimizer, x, 10)
        restart(model, optimizer, cycle=cycle)
        layers = low_rank_layers(model)
        ranks.append([int(torch.linalg.matrix_rank(layers[n].weight - start[n], rtol=1e-4)) for n in start])
    assert ranks[0] == [3, 3] and ranks[1] == [6, 6] and all(rank > 6 for rank in ranks[2])


def test_report_measures_the_merged_update() -> None:
    model, optimizer, _ = trained()
    layers = low_rank_layers(model)
    deltas = {name: layer.delta().clone() for name, layer in layers.items()}
    norms = {name: layer.weight.norm().item() for name, layer in layers.items()}
    report = restart(model, optimizer, cycle=4)
    assert report.cycle == 4 and [update.name for update in report.layers] == list(layers)
    for update in report.layers:
        values = torch.linalg.svdvals(deltas[update.name])[:3]
        torch.testing.assert_close(torch.tensor(update.singular_values), values, rtol=1e-4, atol=1e-6)
        assert update.update_norm == pytest.approx(values.norm().item(), rel=1e-5)
        assert update.weight_norm == pytest.approx(norms[update.name], rel=1e-6)
        assert 1 <= update.effective_rank <= 3 + 1e-6
    assert report.moments_cleared == 2 * sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())


def test_nothing_changes_if_a_factor_is_not_finite() -> None:
    model, optimizer, _ = trained()
    layers = list(low_rank_layers(model).values())
    weights = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        layers[-1].lora_B[0, 0] = torch.nan
    with pytest.raises(RunStopped, match="lora_B is not finite"):
        restart(model, optimizer, cycle=1)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_spectrum_of_a_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"a": Conv1D(12, 8)})
    inject(model, LowRankConfig(r=2))
    layer = low_rank_layers(model)["a"]
    nn.init.normal_(layer.lora_B)
    assert layer.delta().shape == layer.weight.shape == (8, 12)
    expected = torch.linalg.svdvals(layer.delta())[:2]
    torch.testing.assert_close(update_spectrum(layer), expected, rtol=1e-4, atol=1e-5)
