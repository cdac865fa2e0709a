"""The packages' optimizers: equal to those built by hand, small, saved completely, and counted in plans."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.small import Net, batch, loss
from tests.train.stage import Killed, Stage, kill
from torch import nn

from relora.config import RunConfig, parse_config
from relora.errors import UserError
from relora.planning.phase_cost import step_figures
from relora.recipes.pretrain import pretrain
from relora.train.optim import OptimizerConfig, build_optimizer, load_named_state, named_state, set_lr
from relora.train.projected_optimizers import (
    PROJECTED_OPTIMIZERS,
    ProjectionConfig,
    check_installed,
    projected_matrices,
    state_shapes,
)
from relora.train.schedule import Schedule

FULL = Schedule(total_steps=10, warmup_steps=3, warm_start_steps=10)
BY_HAND = {
    "galore": ("GaLoreAdamW", {"scale": 0.25}),
    "apollo": ("APOLLOAdamW", {"scale": 1.0, "proj": "random", "scale_type": "channel"}),
    "fira": ("FiraAdamW", {"alpha": 0.25}),
}
"""The packages' classes, and the entries of a projected group in their own examples, beside rank and period."""
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(module) is None for module in package.modules),
            reason=f"{package.distribution} is not installed (extra `{package.extra}`)",
        ),
    )
    for name, package in PROJECTED_OPTIMIZERS.items()
]
installed = pytest.mark.parametrize("name", NAMES)


def config(name: str, **changes: object) -> OptimizerConfig:
    settings = {"lr": 0.02, "lowrank_lr": 0.0, "projection": ProjectionConfig(rank=3, every_steps=3)}
    return OptimizerConfig(name=name, **(settings | changes))  # type: ignore[arg-type]


def backward(net: nn.Module, step: int) -> None:
    net.zero_grad()
    loss(net, *batch(step))[0].backward()


class Stack(nn.Module):
    """Network with tall, wide and square matrices, and an embedding that is not projected."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 24)
        self.blocks = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 24)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


# Training


@installed
def test_a_run_by_hand_gives_the_same_weights(name: str) -> None:
    """The groups of the package's own example, with the same gradients and learning rates."""
    nets = [Net(), Net()]
    ours = build_optimizer(nets[0], config(name, weight_decay=0.1, betas=(0.9, 0.99)))
    matrices = [block.weight for block in nets[1].blocks]
    vectors = [parameter for parameter in nets[1].parameters() if parameter.ndim == 1]
    kind, settings = BY_HAND[name]
    by_hand = getattr(importlib.import_module(PROJECTED_OPTIMIZERS[name].modules[0]), kind)(
        [
            {"params": [nets[1].embed.weight, nets[1].head.weight], "weight_decay": 0.1},
            {
                "params": matrices,
                "rank": 3,
                "update_proj_gap": 3,
                "proj_type": "std",
                "weight_decay": 0.1,
                **settings,
            },
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-8,
        no_deprecation_warning=True,
    )
    for step in range(10):
        set_lr(ours, FULL, step)
        for group in by_hand.param_groups:
            group["lr"] = 0.02 * FULL.lr_factor(step)
        for net, optimizer in zip(nets, (ours, by_hand), strict=True):
            backward(net, step)
            optimizer.step()
    for (path, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}")
        assert not torch.equal(one, dict(Net().named_parameters())[path])


@installed
def test_matrices_of_the_blocks_are_projected_and_nothing_else(name: str) -> None:
    net = Net()
    optimizer = build_optimizer(net, config(name, matrix_lr=0.05, matrices=frozenset({"blocks.0", "blocks.1"})))
    [projected] = [group for group in optimizer.param_groups if "rank" in group]
    assert [id(parameter) for parameter in projected["params"]] == [id(block.weight) for block in net.blocks]
    assert projected["initial_lr"] == 0.05


@installed
def test_moments_take_less(name: str) -> None:
    """All storage that the state keeps alive, including that behind views, is what `state_shapes` says."""
    net, rank = Stack(), 4
    optimizer = build_optimizer(net, config(name, projection=ProjectionConfig(rank=rank, every_steps=3)))
    for _ in range(2):
        net(torch.arange(12)).logsumexp(-1).sum().backward()
        optimizer.step()
    for block in net.blocks:
        state = optimizer.state[block.weight]
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
        held = sum(tensor.untyped_storage().nbytes() for tensor in (*tensors, state["projector"].ortho_matrix))
        out, inn = block.weight.shape
        assert held == 4 * rank * (2 * max(out, inn) + min(out, inn))
        moment, projection = state_shapes(block.weight.shape, rank)
        assert held == 4 * (2 * moment.numel() + projection.numel()) < 8 * out * inn


@installed
def test_it_learns(tmp_path: Path, name: str) -> None:
    schedule = Schedule(total_steps=60, warmup_steps=5, warm_start_steps=60)
    stage = Stage(tmp_path, schedule=schedule, optimizer=config(name, lr=0.05)).play()
    losses = [line["loss"] for line in stage.lines(kind="train")]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]


# Checkpoints


@installed
def test_killed_before_every_step_and_continued_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    settings = {"schedule": FULL, "optimizer": config(name), "checkpoint_every_steps": 2}
    whole = Stage(tmp_path / "whole", **settings).play()
    for step in range(1, 10):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            Stage(folder, **settings).until(step, kill).play()
        Stage(folder, **settings).play()
        for file in ("weights.safetensors", "optimizer.safetensors"):
            at_the_end = [place / "checkpoints" / "step-00000010" / file for place in (folder, whole.folder)]
            assert at_the_end[0].read_bytes() == at_the_end[1].read_bytes(), (step, file)


@installed
def test_state_of_another_rank_is_refused_and_nothing_loaded(name: str) -> None:
    net = Net()
    saving = build_optimizer(net, config(name))
    loading = build_optimizer(net, config(name, projection=ProjectionConfig(rank=2)))
    backward(net, 0)
    saving.step()
    before = named_state(net, loading)
    with pytest.raises(UserError, match=rf"blocks.0.weight are not {name}'s, or not of its shape"):
        load_named_state(net, loading, named_state(net, saving))
    assert named_state(net, loading).keys() == before.keys() == set()


@installed
def test_moments_of_adamw_are_refused(name: str) -> None:
    net = Net()
    saving, loading = build_optimizer(net, config("adamw")), build_optimizer(net, config(name))
    backward(net, 0)
    for optimizer in (saving, loading):
        optimizer.step()
    with pytest.raises(UserError, match=rf"are not {name}'s"):
        load_named_state(net, build_optimizer(net, config(name)), named_state(net, saving))
    with pytest.raises(UserError, match="are not adamw's"):
        load_named_state(net, build_optimizer(net, config("adamw")), named_state(net, loading))


# Refused


@pytest.mark.parametrize("name", PROJECTED_OPTIMIZERS)
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PROJECTED_OPTIMIZERS[name].modules[0], None)
    remedy = rf"pip install 'relora\[{PROJECTED_OPTIMIZERS[name].extra}\]'"
    with pytest.raises(UserError, match=rf"^optimizer.name: {name} needs .*{remedy}$"):
        check_installed(name)


def test_a_rank_above_a_side_is_refused() -> None:
    assert list(projected_matrices(Stack(), 24)) == ["blocks.0.weight", "blocks.1.weight", "blocks.2.weight"]
    with pytest.raises(UserError, match=r"^optimizer.projection.rank \(25\) .* blocks.0.weight \(40 x 24\).* 24 here"):
        projected_matrices(Stack(), 25)


# Runs


@pytest.fixture
def run_config(prepared: Path, tmp_path: Path) -> RunConfig:
    return parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "model": {
                "preset": "llama-9m",
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
            },
            "data": {
                "train": str(prepared / "train"),
                "validation": str(prepared / "validation"),
                "sequence_length": 32,
            },
            "method": "full",
            "schedule": {"total_steps": 3, "warmup_steps": 1},
            "optimizer": {"name": "galore", "lr": 5e-3, "projection": {"rank": 4, "every_steps": 2}},
            "batch": {"sequences": 4, "micro_sequences": 2},
            "evaluate": {"every_steps": 5, "tokens": 300},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"prompts": ["The"], "max_new_tokens": 2},
        }
    )


def changed(config: RunConfig, **optimizer: object) -> RunConfig:
    tree = config.model_dump(mode="json", exclude_none=True)
    return parse_config(tree | {"optimizer": tree["optimizer"] | optimizer})


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_they_train_at_full_rank_alone(run_config: RunConfig, method: str) -> None:
    tree = run_config.model_dump(mode="json", exclude_none=True)
    with pytest.raises(UserError, match=r"optimizer.name: galore trains at full rank; set `method: full`"):
        parse_config(tree | {"method": method, "warm_start": {"steps": 1}})


@installed
def test_a_recipe_hands_on_what_the_configuration_says(run_config: RunConfig, name: str) -> None:
    folder = pretrain(changed(run_config, name=name), quiet=True).folder
    [checkpoint] = (folder / "checkpoints").iterdir()
    saved = load_file(checkpoint / "optimizer.safetensors")
    matrices = {key.removesuffix(":projection") for key in saved if key.endswith(":projection")}
    assert len(matrices) == 2 * 7 and all(".layers." in matrix for matrix in matrices)
    assert {min(saved[f"{matrix}:projection"].shape) for matrix in matrices} == {4}


@installed
def test_too_large_a_rank_is_refused_before_anything_is_created(run_config: RunConfig, name: str) -> None:
    config = changed(run_config, name=name, projection={"rank": 33})
    with pytest.raises(UserError, match=r"optimizer.projection.rank \(33\)"):
        pretrain(config, quiet=True)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("name", PROJECTED_OPTIMIZERS)
def test_a_plan_counts_their_moments(run_config: RunConfig, name: str) -> None:
    cpu = torch.device("cpu")
    plain = step_figures(changed(run_config, name="adamw"), "full", cpu).memory["moments"]
    small = step_figures(changed(run_config, name=name), "full", cpu).memory["moments"]
    hidden, intermediate, rank = 32, 64, 4
    numbers = 4 * hidden**2 + 3 * hidden * intermediate
    kept = 4 * rank * 3 * hidden + 3 * rank * (2 * intermediate + hidden)
    assert plain - small == 2 * (8 * numbers - 4 * kept)
