"""Runs whose frozen weights follow their residual: bit-equal when continued, unchanged where a step is skipped."""

from pathlib import Path

import pytest
import torch
from tests.train.small import Net, batch, loss
from tests.train.stage import Killed, Stage, kill
from torch import Tensor, nn
from torch._dynamo.utils import counters

from relora.config import RunConfig, parse_config
from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, low_rank_layers
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates
from relora.lowrank.residual import residual_steps
from relora.measure import token_loss
from relora.model.blocks import training_blocks
from relora.model.load import build_model
from relora.recipes.from_settings import frozen_arithmetic, lowrank_of
from relora.train.optim import OptimizerConfig, build_optimizer, named_state
from relora.train.step import clear_nonfinite_flag, train_step


def low_rank(residual: Residual, **options: object) -> LowRankConfig:
    return LowRankConfig(r=2, lora_alpha=2, residual=residual, **options)  # type: ignore[arg-type]


def everything(stage: Stage) -> dict[str, Tensor]:
    assert stage.progress is not None
    return exact_tensors(stage.model) | named_state(stage.model, stage.progress.optimizer)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def losses(stage: Stage) -> list[object]:
    return [line["loss"] for line in stage.lines(kind="train")]


# Whole runs


def test_switched_off_it_changes_no_bit(tmp_path: Path) -> None:
    plain = Stage(tmp_path / "plain", lowrank=LowRankConfig(r=2, lora_alpha=2)).play()
    off = Stage(tmp_path / "off", lowrank=low_rank(Residual(every_steps=3))).play()
    on = Stage(tmp_path / "on", lowrank=low_rank(Residual(scale=0.1))).play()
    assert_same_bits(everything(plain), everything(off))
    assert losses(plain) == losses(off)
    assert losses(plain)[:4] == losses(on)[:4] and losses(plain)[5:] != losses(on)[5:]
    assert everything(plain).keys() == everything(on).keys()  # no moments of weights


def test_weights_follow_at_the_steps_that_are_due(tmp_path: Path) -> None:
    """Steps 3 to 5 are a cycle; the learning rate of its first step is 0."""
    moved = {}
    for every_steps in (1, 2, 5):
        stage = Stage(tmp_path / str(every_steps), lowrank=low_rank(Residual(scale=1.0, every_steps=every_steps)))
        weights: dict[int, Tensor] = {}

        def note(step: int, stage: Stage = stage, weights: dict[int, Tensor] = weights) -> object:
            if 3 <= step <= 6 and low_rank_layers(stage.model):
                layer = low_rank_layers(stage.model)["blocks.0"]
                weights[step] = layer.weight.detach().clone()
            return batch(step)

        stage.run = stage.run.__class__(**(vars(stage.run) | {"batch_at": note}))
        stage.play()
        moved[every_steps] = [not torch.equal(weights[step], weights[step + 1]) for step in (3, 4)]
    assert moved == {1: [False, True], 2: [False, True], 5: [False, False]}


@pytest.mark.parametrize("every_steps", [1, 2])
def test_killed_before_every_step_and_continued_gives_the_same_bytes(tmp_path: Path, every_steps: int) -> None:
    lowrank = low_rank(Residual(scale=1.0, every_steps=every_steps))
    whole = Stage(tmp_path / "whole", lowrank=lowrank, checkpoint_every_steps=2).play()
    for step in range(1, 10):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            Stage(folder, lowrank=lowrank, checkpoint_every_steps=2).until(step, kill).play()
        continued = Stage(folder, lowrank=lowrank, checkpoint_every_steps=2).play()
        assert_same_bits(everything(continued), everything(whole))
        assert losses(continued) == losses(whole)


def test_every_checkpoint_has_weights_of_its_own(tmp_path: Path) -> None:
    """Weights that change in every step are not written once for a whole cycle."""
    for name, residual in (("on", Residual(scale=1.0)), ("off", Residual())):
        Stage(tmp_path / name, lowrank=low_rank(residual), checkpoint_every_steps=5).play()
        files = {path.name for path in (tmp_path / name / "checkpoints/step-00000005").iterdir()}
        assert ("frozen.safetensors" in files) == (name == "off")


# One step


def prepared_net(residual: Residual, **options: object) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    inject(model, low_rank(residual, target_modules=("blocks.0", "blocks.1"), **options))
    return model, build_optimizer(model, OptimizerConfig(lr=0.02, lowrank_lr=0.04))


def step_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    residual: Residual,
    bad: bool = False,
    **changes: object,
) -> object:
    def possibly_bad(model: nn.Module, *sequences: Tensor) -> tuple[Tensor, Tensor]:
        total, valid = loss(model, *sequences)
        return (total * torch.nan if bad else total), valid

    settings = {
        "seed": 0,
        "step": step,
        "micro_sequences": 4,
        "clip_grad_norm": 0.5,
        "autocast": None,
        "check_gradients": True,
    }
    with residual_steps(model, optimizer, residual, step):
        return train_step(model, optimizer, batch(step), possibly_bad, **(settings | changes))  # type: ignore[arg-type]


ALWAYS = Residual(scale=1.0)


def test_micro_batches_add_up() -> None:
    weights = []
    for micro_sequences in (4, 1):
        model, optimizer = prepared_net(ALWAYS)
        for step in range(4):
            step_of(model, optimizer, step, ALWAYS, micro_sequences=micro_sequences)
        weights.append(torch.cat([layer.weight.flatten() for layer in low_rank_layers(model).values()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_norm_that_is_clipped_is_over_the_weights_gradients_too() -> None:
    """The norm is over all tensors with a gradient, as at full rank."""
    norms = {}
    for scale in (0.0, 1.0):
        model, optimizer = prepared_net(ALWAYS)
        norms[scale] = step_of(model, optimizer, 0, Residual(scale=scale)).grad_norm  # type: ignore[attr-defined]
    model, _ = prepared_net(ALWAYS)
    for layer in low_rank_layers(model).values():
        layer.weight.requires_grad_(True)
    total, valid = loss(model, *batch(0))
    (total / valid).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert norms[1.0] == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-5)
    assert norms[0.0] < norms[1.0]


def test_a_non_finite_step_leaves_no_gradient_behind() -> None:
    model, optimizer = prepared_net(ALWAYS)
    step_of(model, optimizer, 0, ALWAYS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NonFinite):
        step_of(model, optimizer, 1, ALWAYS, bad=True)
    assert_same_bits(dict(model.named_parameters()), before)
    assert all(layer.weight.grad is None for layer in low_rank_layers(model).values())
    assert not any(layer.weight.requires_grad for layer in low_rank_layers(model).values())


def test_a_gradient_of_a_weight_that_is_not_finite_is_named() -> None:
    model, optimizer = prepared_net(ALWAYS)
    layer = low_rank_layers(model)["blocks.1"]
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    with pytest.raises(NonFinite, match=r"first in blocks\.1\.weight"), residual_steps(model, optimizer, ALWAYS, 0):
        layer.weight.register_hook(lambda gradient: gradient * torch.inf)
        train_step(
            model, optimizer, batch(0), loss, seed=0, step=0, micro_sequences=4, clip_grad_norm=1.0, autocast=None,
            check_gradients=False,
        )  # fmt: skip


def test_a_step_without_synchronisation_is_the_same_step_and_a_non_finite_one_moves_no_weight() -> None:
    finals = []
    for sync in (True, False):
        model, optimizer = prepared_net(ALWAYS)
        for step in range(3):
            step_of(model, optimizer, step, ALWAYS, sync=sync)
        finals.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert_same_bits(*finals)
    assert step_of(model, optimizer, 3, ALWAYS, bad=True, sync=False).nonfinite_flag == 1  # type: ignore[attr-defined]
    assert step_of(model, optimizer, 4, ALWAYS, sync=False).nonfinite_flag == 1  # type: ignore[attr-defined]
    assert_same_bits(dict(model.named_parameters()), finals[1])
    clear_nonfinite_flag(optimizer)
    step_of(model, optimizer, 3, ALWAYS)
    assert not torch.equal(low_rank_layers(model)["blocks.0"].weight, finals[1]["blocks.0.weight"])


def llama() -> nn.Module:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = build_model("llama-9m", shape | {"num_attention_heads": 2}, seed=0)
    inject(model, LowRankConfig(r=4, residual=ALWAYS))
    return model.train()


def stepped(model: nn.Module, steps: int = 3, residual: Residual = ALWAYS, **options: object) -> dict[str, Tensor]:
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, lowrank_lr=1e-2))
    ids = torch.arange(64).view(4, 16)
    with training_blocks(model, **options):  # type: ignore[arg-type]
        for step in range(steps):
            with residual_steps(model, optimizer, residual, step):
                train_step(
                    model, optimizer, (ids, ids), token_loss, seed=0, step=step, micro_sequences=2, clip_grad_norm=1.0,
                    autocast=None, check_gradients=True,
                )  # fmt: skip
    return dict(model.named_parameters())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_with_checkpointed_activations_it_is_the_same_to_the_bit(checkpointing: str) -> None:
    assert_same_bits(stepped(llama()), stepped(llama(), checkpointing=checkpointing))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_blocks_are_compiled_once_more() -> None:
    """One graph is for the steps in which the residual is due, the other for all other steps."""
    residual = Residual(scale=1.0, every_steps=2)
    plain = stepped(llama(), 4, residual)
    torch._dynamo.reset()
    counters.clear()
    compiled = stepped(llama(), 4, residual, compiled=True, backend="aot_eager")
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] - 1 == 2 and not counters["graph_break"]
    torch._dynamo.reset()


# Configurations


def configured(**changes: object) -> RunConfig:
    tree: dict[str, object] = {
        "output_dir": "runs/x",
        "model": {"preset": "llama-9m"},
        "data": {"train": "a", "validation": "b"},
        "schedule": {"total_steps": 3000},
        "lowrank": {"residual": {"scale": 0.5, "every_steps": 4}},
    }
    for key, value in changes.items():
        section, _, last = key.partition("__")
        tree[section] = {**tree.get(section, {}), last: value} if last else value  # type: ignore[dict-item]
    return parse_config(tree)


def test_a_configuration_reaches_the_layers() -> None:
    assert lowrank_of(configured()).residual == Residual(scale=0.5, every_steps=4)
    assert lowrank_of(configured(method="full")).residual == Residual()
    assert lowrank_of(configured(lowrank__residual={})).residual == Residual()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowrank__base": "int8"}, "and int8 would round them each time; set `lowrank.base: fp32`"),
        ({"precision__dtype": "bf16"}, "and bf16 would round them each time; set `lowrank.base: fp32`"),
        ({"optimizer__name": "adamw-8bit"}, "moments of adamw, not of adamw-8bit"),
        ({"lowrank__residual": {"scale": -1}}, r"`lowrank\.residual\.scale` is -1"),
        ({"lowrank__residual": {"every_steps": 0}}, r"`lowrank\.residual\.every_steps` is 0"),
        ({"lowrank__residual": {"every": 2}}, r"unknown key `lowrank\.residual\.every`"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        configured(**changes)
    assert "\n" not in str(caught.value)
    if "lowrank__residual" not in changes:
        configured(**changes, method="full")  # full rank ignores the key
        configured(**changes, lowrank={})


def test_int8_is_chosen_where_it_pays_though_codes_are_computed_again_at_every_step() -> None:
    fast = Rates(fp32=((8, 2e9), (1024, 9e9)), bf16=2e10, int8=4e12, bandwidth=1e12)
    with torch.device("meta"):
        model = build_model("llama-9m", {}, seed=0)
    config = configured(lowrank={"r": 8, "residual": {"scale": 1.0}}, precision={"dtype": "fp32"})
    assert frozen_arithmetic(config, model, fast) == "int8"
