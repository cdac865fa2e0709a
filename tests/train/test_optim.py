"""Learning rates of the groups, moments across the switch, and the optimizer's state on disk."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers, restart
from relora.train.optim import (
    OptimizerConfig,
    build_optimizer,
    carry_state,
    check_optimizer,
    load_named_state,
    named_state,
    set_lr,
)
from relora.train.schedule import Schedule

CONFIG = OptimizerConfig(lr=1e-3, lowrank_lr=4e-3, lowrank_b_lr_ratio=4.0, weight_decay=0.1)
EIGHT_BIT = dataclasses.replace(CONFIG, name="adamw-8bit")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra `quant`)"
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.arange(12)).logsumexp(-1).sum().backward()
    optimizer.step()


def test_groups() -> None:
    net = model()
    inject(net, LowRankConfig(r=2, target_modules=("1",), trainable_scaling=True))
    optimizer = build_optimizer(net, CONFIG)
    rate = {
        id(p): (group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    layer = low_rank_layers(net)["1"]
    assert rate[id(layer.lora_A)] == (4e-3, 0.1)
    assert rate[id(layer.lora_B)] == (16e-3, 0.1)
    assert rate[id(layer.scaling)] == (4e-3, 0.0)
    assert rate[id(net[0].weight)] == (1e-3, 0.1)
    assert rate[id(net[2].weight)] == rate[id(layer.bias)] == (1e-3, 0.0)  # vectors are not decayed
    assert id(layer.weight) not in rate
    schedule = Schedule(total_steps=10, warmup_steps=4)
    set_lr(optimizer, schedule, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [g["initial_lr"] * 0.5 for g in optimizer.param_groups]


def test_matrices_of_the_blocks_have_a_rate_of_their_own() -> None:
    net = model()
    optimizer = build_optimizer(net, dataclasses.replace(CONFIG, matrix_lr=3e-4, matrices=frozenset({"1"})))
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(net[1].weight)] == 3e-4 and rate[id(net[1].bias)] == rate[id(net[3].weight)] == 1e-3


def test_factors_that_restart_in_turns_have_warm_ups_of_their_own() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    inject(net, LowRankConfig(r=2))
    optimizer = build_optimizer(net, dataclasses.replace(CONFIG, turns=2))
    schedule = Schedule(
        total_steps=40, restart_every_steps=20, restart_turns=2, restart_warmup_steps=4, restart_ramp="factors"
    )
    set_lr(optimizer, schedule, 10)  # the first turn's restart
    share = {id(p): group["lr"] / group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = list(low_rank_layers(net).values())
    assert [share[id(layer.lora_A)] for layer in layers] == [0, schedule.lr_factor(10, 1), 0]
    assert share[id(layers[0].bias)] == share[id(layers[1].lora_B)] > 0


def test_the_switch_keeps_the_moments_of_everything_that_still_trains() -> None:
    net = model()
    full = build_optimizer(net, CONFIG)
    step(net, full)
    inject(net, LowRankConfig(r=2, target_modules=("1",)))
    low = build_optimizer(net, CONFIG)
    carry_state(full, low)
    assert low.state[net[3].weight]["step"] == 1
    assert torch.equal(low.state[net[3].weight]["exp_avg"], full.state[net[3].weight]["exp_avg"])
    layer = low_rank_layers(net)["1"]
    assert layer.lora_A not in low.state and layer.weight not in low.state


def test_state_round_trip_continues_bit_for_bit() -> None:
    nets = [model(), model()]
    optimizers = [build_optimizer(net, CONFIG) for net in nets]
    for _ in range(3):
        step(nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    saved = {name: tensor.clone() for name, tensor in named_state(nets[0], optimizers[0]).items()}
    assert {"0.weight:exp_avg", "0.weight:exp_avg_sq", "0.weight:step"} <= saved.keys()
    load_named_state(nets[1], optimizers[1], saved)
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, optimizer)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_parameter_without_state_starts_fresh() -> None:
    net = model()
    optimizer = build_optimizer(net, CONFIG)
    step(net, optimizer)
    saved = {name: tensor for name, tensor in named_state(net, optimizer).items() if not name.startswith("3.weight")}
    load_named_state(net, optimizer, saved)
    assert net[3].weight not in optimizer.state and net[0].weight in optimizer.state


def test_no_small_update_is_lost() -> None:
    """With a bf16 base, too, all that trains is fp32: bf16 near 1 goes by steps of 2^-8, far above these updates."""
    net = model().requires_grad_(False)
    for parameter in net.parameters():
        parameter.fill_(1.0)
    net.requires_grad_(True)
    inject(net, LowRankConfig(r=2, target_modules=("1",), base="bf16"))
    rate = 2.0**-18
    optimizer = build_optimizer(net, OptimizerConfig(lr=rate, lowrank_lr=rate))
    trained = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    for _ in range(16):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert low_rank_layers(net)["1"].weight.dtype == torch.bfloat16
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:  # AdamW's step under a constant gradient is the rate
            torch.testing.assert_close(
                trained[name] - parameter, torch.full_like(parameter, 16 * rate), rtol=0.05, atol=0
            )


# In 8 bits


def large_model() -> nn.Module:
    """Two tensors with codes, the others below the size from which there are any."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(128, 48), nn.Linear(48, 48), nn.LayerNorm(48), nn.Linear(48, 128))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer("adamw")
    with pytest.raises(UserError, match=r"^optimizer.name: adamw-8bit .*pip install 'relora\[quant\]'$"):
        check_optimizer("adamw-8bit")


@needs_bitsandbytes
def test_moments_in_codes_follow_those_in_fp32() -> None:
    nets = [large_model(), large_model()]
    start = nets[0][0].weight.detach().clone()
    optimizers = [build_optimizer(net, config) for net, config in zip(nets, (CONFIG, EIGHT_BIT), strict=True)]
    for _ in range(10):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer)
    state = optimizers[1].state
    assert state[nets[1][0].weight]["state1"].dtype == torch.uint8
    assert state[nets[1][1].weight]["state1"].dtype == torch.float32
    exact, coded = (net[0].weight - start for net in nets)
    assert (coded - exact).norm() < 0.1 * exact.norm()


@needs_bitsandbytes
def test_codes_come_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    nets = [large_model(), large_model()]
    optimizers = [build_optimizer(net, EIGHT_BIT) for net in nets]
    for _ in range(3):
        step(nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    save_file(named_state(nets[0], optimizers[0]), tmp_path / "optimizer.safetensors")
    load_named_state(nets[1], optimizers[1], load_file(tmp_path / "optimizer.safetensors"))
    for _ in range(2):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer)
        states = [named_state(net, optimizer) for net, optimizer in zip(nets, optimizers, strict=True)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert all(torch.equal(*pair) for pair in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@needs_bitsandbytes
def test_a_restart_forgets_codes_and_scales_and_step() -> None:
    """The first update after a restart is that of a new optimizer."""
    net = large_model()
    inject(net, LowRankConfig(r=40, target_modules=("3",)))
    optimizer = build_optimizer(net, EIGHT_BIT)
    for _ in range(3):
        step(net, optimizer)
    factor = low_rank_layers(net)["3"].lora_B
    assert optimizer.state[factor]["state1"].dtype == torch.uint8
    report = restart(net, optimizer, cycle=1)
    assert report.moments_cleared == 2 * 40 * (48 + 128)
    assert factor not in optimizer.state and net[0].weight in optimizer.state
    fresh = build_optimizer(net, EIGHT_BIT)
    before = factor.detach().clone()
    step(net, optimizer)
    first = factor.detach().clone()
    factor.data.copy_(before)
    fresh.step()
    assert torch.equal(first, factor) and not torch.equal(first, before)


@needs_bitsandbytes
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(CONFIG, EIGHT_BIT), (EIGHT_BIT, CONFIG)])
def test_the_moments_of_another_optimizer_are_refused(saved_by: OptimizerConfig, loaded_by: OptimizerConfig) -> None:
    net = large_model()
    saving, loading = build_optimizer(net, saved_by), build_optimizer(net, loaded_by)
    step(net, saving)
    with pytest.raises(UserError, match=rf"are not {loaded_by.name}'s"):
        load_named_state(net, loading, named_state(net, saving))
    assert not loading.state


@needs_bitsandbytes
def test_scales_of_another_shape_are_refused() -> None:
    net = large_model()
    optimizer = build_optimizer(net, EIGHT_BIT)
    step(net, optimizer)
    state = named_state(net, optimizer)
    with pytest.raises(UserError, match="or not of its shape"):
        load_named_state(net, optimizer, state | {"0.weight:absmax1": state["0.weight:absmax1"][:-1]})
