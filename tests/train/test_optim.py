"""Who trains at which rate, what survives the switch, and the optimizer's way to disk and back."""

import torch
from torch import nn

from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.train.optim import OptimizerConfig, build_optimizer, carry_state, load_named_state, named_state, set_lr

CONFIG = OptimizerConfig(lr=1e-3, lowrank_lr=4e-3, lowrank_b_lr_ratio=4.0, weight_decay=0.1)


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
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [g["initial_lr"] * 0.5 for g in optimizer.param_groups]


def test_the_switch_forgets_nothing_that_still_trains() -> None:
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
