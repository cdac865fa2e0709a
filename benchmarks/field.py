"""Low-rank pretraining methods of the literature in the setting of a configuration: what each ends at, at which rate.

    python benchmarks/field.py configs/small/d128.yaml optimizer.lr=3.2e-2 --methods full cola sumo --rates 0.004 0.008

Only the method differs between the rows: the model, the batches, the schedule, the step and the measure are those of
`relora pretrain` with `method=full`. `rate` is the peak rate of the method's own tensors, those that stand for the
matrices of the blocks; everything else goes at `optimizer.lr` with AdamW, in all of them. `trained` counts parameters
that train, `state` the bytes that the optimizer keeps for all of them at the end, `perplexity` is that of the whole
held-out part. All run on the CPU. The definitions, their sources and where they deviate stand in benchmarks/field/.
GaLore, Fira and APOLLO are their authors' packages (`relora[baselines]`, `relora[apollo]`).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from field.beside import group_of, state_bytes
from field.layers import Cola, Factorized, SparseAndLowRank
from field.projected import Gum, Sumo
from field.switching import SwitchLinear, SwitchLora
from torch import nn

from relora.config import RunConfig, load_config
from relora.data.pretraining.batches import HeldOut
from relora.evaluation.scored_model import BATCH
from relora.lowrank import LowRankConfig
from relora.lowrank.targets import find_targets
from relora.measure import evaluate, token_loss
from relora.recipes.from_settings import optimizer_of, schedule_of
from relora.recipes.pretraining_inputs import gather_pretraining
from relora.seeding import keyed_generator
from relora.train.optim import build_optimizer, check_optimizer, set_lr
from relora.train.projected_optimizers import ProjectionConfig
from relora.train.step import train_step

FIXED = ("method=full", "device=cpu")
"""Settings that no override changes: the methods stand here, and their layers are drawn on the CPU."""
PERIOD = 200
"""Steps from one renewal of a subspace to the next that GaLore, SUMO and Glentis et al. publish."""
INTERVAL = 40
"""Steps in which SwitchLoRA exchanges every vector once, at first, as published."""
SPARSE_SHARE = 0.03
"""Share of a weight's entries that SLTrain trains by themselves, as published."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    config: RunConfig
    r: int
    rate: float
    period: int | None
    """Steps between two renewals; None for what the method publishes."""
    decay: float
    """SwitchLoRA's ratio: share of the run after which exchanges are 0.3 times as frequent."""
    full_matrices: float
    """GUM's gamma: how many matrices move in their complement at a time."""


@dataclass(frozen=True)
class Built:
    """A model that a method has changed, ready to train."""

    optimizer: torch.optim.Optimizer
    before_step: Callable[[int], None] = lambda step: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML configuration of a pretraining run")
    parser.add_argument("overrides", nargs="*", help="key=value, as of relora pretrain")
    parser.add_argument("--methods", nargs="+", choices=METHODS, required=True)
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rank", type=int, help="default: lowrank.r of the configuration")
    parser.add_argument("--period", type=int, help="steps between two renewals, of methods that have such")
    parser.add_argument("--decay", type=float, default=0.1, help="SwitchLoRA's ratio")
    parser.add_argument("--full-matrices", type=float, default=4, help="GUM's gamma")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    print("| method | rate | r | period | seed | trained | state, bytes | perplexity | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.methods:
        for rate in arguments.rates:
            for seed in arguments.seeds:
                config = load_config(arguments.config, [*arguments.overrides, *FIXED, f"seed={seed}"])
                setting = Setting(
                    config,
                    arguments.rank or config.lowrank.r,
                    rate,
                    arguments.period,
                    arguments.decay,
                    arguments.full_matrices,
                )
                print_row(name, setting)


def print_row(name: str, setting: Setting) -> None:
    """Train one run and print its row."""
    started = time.perf_counter()
    trained, state, perplexity = run(METHODS[name], setting)
    cells = [name, setting.rate, setting.r, setting.period or "", setting.config.seed, trained, state]
    cells += [f"{perplexity:.2f}", f"{time.perf_counter() - started:.0f}"]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def run(build: "Build", setting: Setting) -> tuple[int, int, float]:
    """Train a run; return its trained parameters, the bytes of the optimizer's state and the perplexity at its end."""
    config = setting.config
    inputs = gather_pretraining(config)
    model, schedule = inputs.model.train(), schedule_of(config)
    built = build(model, setting)
    for step in range(schedule.total_steps):
        built.before_step(step)
        set_lr(built.optimizer, schedule, step)
        train_step(
            model,
            built.optimizer,
            inputs.batches.batch(step),
            token_loss,
            seed=config.seed,
            step=step,
            micro_sequences=config.batch.micro_sequences,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            autocast=None,
            check_gradients=step == 0,
        )
    folder = inputs.held_out.folder
    held_out = HeldOut(folder, config.data.sequence_length, folder.tokens, BATCH)
    found = evaluate(model, held_out, bytes_per_token=inputs.bytes_per_token)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, state_bytes(built.optimizer), found.perplexity


Build = Callable[[nn.Module, Setting], Built]
Draw = Callable[[torch.Tensor, int, torch.Generator], nn.Module]


def packaged(name: str) -> Build:
    """Make the build of an optimizer that relora has itself: full weights, nothing replaced."""

    def build(model: nn.Module, setting: Setting) -> Built:
        check_optimizer(name)  # type: ignore[arg-type]
        plain = setting.config.optimizer.model_copy(update={"matrix_lr": setting.rate})
        config = setting.config.model_copy(update={"optimizer": plain})
        projection = ProjectionConfig(rank=setting.r, every_steps=setting.period or PERIOD)
        options = optimizer_of(config, model, LowRankConfig(r=1))
        return Built(build_optimizer(model, replace(options, name=name, projection=projection)))

    return build


def replaced(draw: Draw, *, refactor: bool = False) -> Build:
    """Make the build of a method that replaces every linear layer of the blocks and trains it with AdamW."""

    def build(model: nn.Module, setting: Setting) -> Built:
        layers = replace_layers(model, setting, draw)
        groups = groups_of(model, setting, [p for layer in layers for p in layer.parameters()])
        optimizer = torch.optim.AdamW(groups, **adamw_options(setting))
        every = setting.period or PERIOD

        def before_step(step: int) -> None:
            if refactor and step and step % every == 0:
                for layer in layers:
                    layer.refactor_()
                    for parameter in layer.parameters():
                        optimizer.state.pop(parameter, None)

        return Built(optimizer, before_step)

    return build


def switch_lora(model: nn.Module, setting: Setting) -> Built:
    """Build SwitchLoRA."""
    layers = replace_layers(model, setting, SwitchLinear)
    groups = groups_of(model, setting, [p for layer in layers for p in layer.parameters()])
    steps = setting.config.total_steps * setting.decay
    options = adamw_options(setting)
    return Built(SwitchLora(groups, layers, interval=setting.period or INTERVAL, decay_steps=steps, **options))


def sumo(model: nn.Module, setting: Setting) -> Built:
    """Build SUMO."""
    groups = groups_of(model, setting, matrices_of(model))
    return Built(Sumo(groups, r=setting.r, every_steps=setting.period or PERIOD, **adamw_options(setting)))


def gum(model: nn.Module, setting: Setting) -> Built:
    """Build GUM."""
    matrices = matrices_of(model)
    optimizer = Gum(
        groups_of(model, setting, matrices),
        r=setting.r,
        every_steps=setting.period or PERIOD,
        share=setting.full_matrices / len(matrices),
        generator=generator_of(setting),
        **adamw_options(setting),
    )
    return Built(optimizer)


def replace_layers(model: nn.Module, setting: Setting, draw: Draw) -> list[nn.Module]:
    """Replace every linear layer of the blocks by one that is drawn for its weight; return the new ones."""
    generator, layers = generator_of(setting), []
    for path in find_targets(model, LowRankConfig(r=1)):
        layers.append(draw(model.get_parameter(f"{path}.weight").detach(), setting.r, generator))
        model.set_submodule(path, layers[-1])
    return layers


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers of the blocks."""
    return [model.get_parameter(f"{path}.weight") for path in find_targets(model, LowRankConfig(r=1))]


def groups_of(model: nn.Module, setting: Setting, own: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the group of everything else and the group of the method's own tensors."""
    known = {id(parameter) for parameter in own}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [group_of(rest, setting.config.optimizer.lr, own=False), group_of(own, setting.rate, own=True)]


def adamw_options(setting: Setting) -> dict[str, Any]:
    """Return the options of AdamW that the configuration gives."""
    settings = setting.config.optimizer
    return {"betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0, "fused": True}


def generator_of(setting: Setting) -> torch.Generator:
    """Return the stream that a run draws its layers from."""
    return keyed_generator(setting.config.seed, "field")


METHODS: dict[str, Build] = {
    "full": packaged("adamw"),
    "galore": packaged("galore"),
    "fira": packaged("fira"),
    "apollo": packaged("apollo"),
    "sumo": sumo,
    "gum": gum,
    "switchlora": switch_lora,
    "factorized": replaced(Factorized.drawn),
    "spectral": replaced(Factorized.spectral),
    "refactored": replaced(Factorized.spectral, refactor=True),
    "cola": replaced(Cola.drawn),
    "sltrain": replaced(lambda weight, r, generator: SparseAndLowRank(weight.shape, r, SPARSE_SHARE, generator)),
}

if __name__ == "__main__":
    main()
