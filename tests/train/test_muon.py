"""Muon: exact polar factors, updates equal to plain twins, state on disk, restarts, and what a flag withholds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers, restart
from relora.lowrank.moments import Reset
from relora.lowrank.restart import RestartConfig
from relora.train.muon import AdamWWithMuon, polar_factors
from relora.train.optim import OptimizerConfig, build_optimizer, load_named_state, named_state
from relora.train.step import clear_nonfinite_flag

ADAMW = OptimizerConfig(lr=1e-2, lowrank_lr=4e-2, lowrank_b_lr_ratio=2.0, weight_decay=0.1)
MUON = dataclasses.replace(ADAMW, factor_rule="muon")


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12))
    inject(net, LowRankConfig(r=3, target_modules=("1", "3"), init="orthogonal"))
    for layer in low_rank_layers(net).values():
        layer.lora_B.data.normal_()
    return net


def set_gradients(net: nn.Module, seed: int) -> None:
    """Give every trainable parameter a gradient that depends on its shape and the seed alone."""
    for parameter in net.parameters():
        generator = torch.Generator().manual_seed(seed)
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def polar_by_svd(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 12),
    extra=st.integers(0, 40),
    count=st.integers(1, 3),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**31 - 1),
)
def test_polar_factors_are_those_of_the_svd(rank: int, extra: int, count: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(count, rank, rank + extra, generator=generator), full_matrices=False)
    values = torch.logspace(0, -3, rank)  # condition 1,000: numbers in fp32 determine the factor to about 1e-4
    matrices = 10.0**exponent * u @ (values[:, None] * vt)
    for matrix, polar in zip(matrices, polar_factors(matrices), strict=True):
        torch.testing.assert_close(polar.double(), polar_by_svd(matrix), rtol=0, atol=1e-5)


def test_directions_without_a_gradient_do_not_move() -> None:
    torch.manual_seed(0)
    of_rank_two = torch.randn(6, 2) @ torch.randn(2, 20)
    polar = polar_factors(torch.stack([of_rank_two, torch.zeros(6, 20)]))
    torch.testing.assert_close(torch.linalg.svdvals(polar[0]), torch.tensor([1.0, 1, 0, 0, 0, 0]), rtol=0, atol=1e-5)
    assert not polar[1].any()


def test_factors_move_as_a_plain_twin_does_and_the_rest_as_under_adamw() -> None:
    """Twin: Nesterov momentum, the SVD's polar factor in float64, evened features, and decoupled weight decay."""
    net, other = model(), model()
    optimizer, adamw = build_optimizer(net, MUON), build_optimizer(other, ADAMW)
    factors = {
        f"{path}.{kind}": (factor.detach().double().clone(), torch.zeros_like(factor, dtype=torch.float64), rate)
        for path, layer in low_rank_layers(net).items()
        for kind, factor, rate in (("lora_A", layer.lora_A, 4e-2), ("lora_B", layer.lora_B, 8e-2))
    }
    squares: dict[str, Tensor] = {}
    for step in range(5):
        set_gradients(net, step)
        set_gradients(other, step)
        for name, (value, momentum, rate) in factors.items():
            gradient = net.get_parameter(name).grad.double()
            momentum.mul_(0.95).add_(gradient, alpha=0.05)
            polar = polar_by_svd(0.95 * momentum + 0.05 * gradient)
            ranks = min(range(2), key=lambda side: value.shape[side])
            squares[name] = 0.95 * squares.get(name, polar.square().mean(ranks)) + 0.05 * polar.square().mean(ranks)
            evened = polar / squares[name].sqrt().unsqueeze(ranks)
            evened *= polar.norm() / evened.norm()
            value.mul_(1 - 0.1 * rate).sub_(evened, alpha=rate * 0.2 * max(value.shape) ** 0.5)
        optimizer.step()
        adamw.step()
    for name, (value, _, _) in factors.items():
        torch.testing.assert_close(net.get_parameter(name).double(), value, rtol=0, atol=1e-5)
    for (name, one), two in zip(net.named_parameters(), other.parameters(), strict=True):
        assert name in factors or torch.equal(one, two)


def test_an_update_has_the_same_size_per_entry_at_every_shape() -> None:
    """An entry moves by 0.2 rates in root mean square, as under AdamW, so a rate holds for every width and rank."""
    for width, rank in ((16, 2), (64, 8), (96, 32)):
        net = nn.Sequential(nn.Linear(width, width))
        inject(net, LowRankConfig(r=rank))
        optimizer = build_optimizer(net, OptimizerConfig(lr=1.0, lowrank_lr=1e-2, factor_rule="muon"))
        set_gradients(net, 0)
        layer = low_rank_layers(net)["0"]
        before = layer.lora_A.detach().clone()
        optimizer.step()
        rms = (layer.lora_A - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2e-2, rel=1e-4)


def test_full_rank_matrices_move_as_under_torchs_muon() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    config = dataclasses.replace(ADAMW, matrix_rule="muon", matrix_lr=2e-2, matrices=frozenset({"0", "1"}))
    optimizer = build_optimizer(nets[0], config)
    muon = torch.optim.Muon(
        [nets[1][0].weight, nets[1][1].weight], lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        for net in nets:
            set_gradients(net, step)
        optimizer.step()
        muon.step()
    for one, two in zip(nets[0], nets[1], strict=True):
        assert torch.equal(one.weight, two.weight) and not torch.equal(one.bias, two.bias)


def test_one_moment_instead_of_two() -> None:
    net = model()
    optimizer = build_optimizer(net, MUON)
    set_gradients(net, 0)
    optimizer.step()
    factors = {id(factor) for layer in low_rank_layers(net).values() for factor in layer.factors.values()}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in factors:
            assert set(state) == {"exp_avg", "exp_avg_sq", "step"}
            continue
        assert {key: tensor.shape for key, tensor in state.items()} == {
            "momentum_buffer": parameter.shape,
            "feature_squares": torch.Size([max(parameter.shape)]),
        }


@pytest.mark.parametrize("matrix_rule", ["adamw", "muon"])
def test_a_raised_flag_withholds_the_whole_update(matrix_rule: str) -> None:
    net = model()
    for layer in low_rank_layers(net).values():
        layer.weight.requires_grad_(True)
    config = dataclasses.replace(MUON, matrix_rule=matrix_rule, matrices=frozenset({"1", "3"}))
    optimizer = build_optimizer(net, config)
    assert isinstance(optimizer, AdamWWithMuon)
    set_gradients(net, 0)
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    moments = {name: tensor.clone() for name, tensor in named_state(net, optimizer).items()}
    set_gradients(net, 1)
    low_rank_layers(net)["1"].lora_A.grad[0, 0] = torch.inf
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))
    after = named_state(net, optimizer)
    assert all(torch.equal(moments[name], after[name]) for name in moments)


def test_a_withheld_first_update_leaves_no_trace() -> None:
    nets = [model(), model()]
    optimizers = [build_optimizer(net, MUON) for net in nets]
    set_gradients(nets[0], 0)
    optimizers[0].found_inf = torch.tensor(1.0)
    optimizers[0].step()
    clear_nonfinite_flag(optimizers[0])
    for net, optimizer in zip(nets, optimizers, strict=True):
        for step in (1, 2):
            set_gradients(net, step)
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_state_round_trip_continues_bit_for_bit() -> None:
    nets = [model(), model()]
    optimizers = [build_optimizer(net, MUON) for net in nets]
    for step in range(3):
        set_gradients(nets[0], step)
        optimizers[0].step()
    nets[1].load_state_dict(nets[0].state_dict())
    saved = {name: tensor.clone() for name, tensor in named_state(nets[0], optimizers[0]).items()}
    assert "1.lora_A:momentum_buffer" in saved and "1.lora_A:step" not in saved
    load_named_state(nets[1], optimizers[1], saved)
    for net, optimizer in zip(nets, optimizers, strict=True):
        set_gradients(net, 3)
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize(("saved_by", "loaded_by", "kind"), [(ADAMW, MUON, "muon"), (MUON, ADAMW, "adamw")])
def test_the_moments_of_another_rule_are_refused(
    saved_by: OptimizerConfig, loaded_by: OptimizerConfig, kind: str
) -> None:
    net = model()
    saving, loading = build_optimizer(net, saved_by), build_optimizer(net, loaded_by)
    set_gradients(net, 0)
    saving.step()
    with pytest.raises(UserError, match=rf"lora_A are not {kind}'s"):
        load_named_state(net, loading, named_state(net, saving))


@pytest.mark.parametrize("reset", ["zero", "random", "magnitude", "keep", "project"])
@pytest.mark.parametrize("stagger", ["none", "ranks"])
def test_every_restart_works_on_one_moment(reset: Reset, stagger: str) -> None:
    net = model()
    optimizer = build_optimizer(net, MUON)
    set_gradients(net, 0)
    optimizer.step()
    layer = low_rank_layers(net)["3"]
    momentum = optimizer.state[layer.lora_B]["momentum_buffer"].clone()
    old_a = layer.lora_A.detach().double().clone()
    how = RestartConfig(optimizer=reset, init="balanced", stagger=stagger, turns=3 if stagger == "ranks" else 1)
    report = restart(net, optimizer, how, cycle=1)
    state = optimizer.state.get(layer.lora_B)
    if reset == "zero" and stagger == "none":
        assert state is None and report.moments_cleared == 3 * (8 + 8 + 8 + 12)
        return
    now = state["momentum_buffer"]
    restarted = slice(0, 1) if stagger == "ranks" else slice(0, 3)
    if reset == "zero":
        assert not now[:, restarted].any() and torch.equal(now[:, 1:], momentum[:, 1:])
    elif reset == "keep":
        assert torch.equal(now, momentum)
    elif reset == "project":
        transform = layer.lora_A.detach().double() @ torch.linalg.pinv(old_a)  # new rows from old ones
        torch.testing.assert_close(now.double(), momentum.double() @ transform.T, rtol=1e-4, atol=1e-6)
    else:
        assert 0 < (now[:, restarted] == 0).sum() < now[:, restarted].numel()
