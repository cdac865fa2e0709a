"""From a configuration to objects: schedule, restart, low-rank layers, optimizer, autocast."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relora.config import FinetuneConfig, RunConfig, TrainingConfig
from relora.data.finetuning.instruct import InstructionForm
from relora.errors import UserError
from relora.lowrank import LowRankConfig, RestartConfig
from relora.lowrank.calibrate import calibrated
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates, layer_seconds
from relora.lowrank.inject import find_targets
from relora.lowrank.kernel import Arithmetic
from relora.train.optim import OptimizerConfig
from relora.train.projected_optimizers import ProjectionConfig
from relora.train.run import Adaptive, CycleEnd, WarmStartEnd
from relora.train.schedule import Schedule

_CLEARLY_FASTER = 0.9
"""Of the low-rank layers' predicted time: what int8 must save at least to be worth its rounding."""


def factor_parameters(config: RunConfig | FinetuneConfig, model: PreTrainedModel) -> int:
    """How many parameters the factors will have beside those of `model`."""
    if config.method == "full":
        return 0
    lowrank = lowrank_of(config)
    targets = find_targets(model, lowrank)
    return sum(lowrank.of_layer(name).r * sum(model.get_parameter(f"{name}.weight").shape) for name in targets)


def schedule_of(config: RunConfig) -> Schedule:
    """The timetable of a configuration."""
    return Schedule(
        total_steps=config.total_steps,
        warmup_steps=config.schedule.warmup_steps,
        warm_start_steps=config.total_steps if config.method == "full" else config.warm_start.steps,
        **restart_times(config),
        min_lr_ratio=config.schedule.min_lr_ratio,
    )


def restart_times(config: TrainingConfig) -> dict[str, Any]:
    """What a timetable wants to know of restarts, by its own names."""
    restart = config.restart
    return {
        "restart_every_steps": restart.every_steps if config.method == "relora" else None,
        "restart_growth": restart.growth,
        "restart_turns": restart_of(config).turns,
        "restart_until": restart.until,
        "restart_warmup_steps": restart.warmup_steps,
        "restart_ramp": restart.ramp,
        "switch_warmup_steps": config.switch_warmup_steps if isinstance(config, RunConfig) else None,
    }


def restart_of(config: TrainingConfig) -> RestartConfig:
    """How factors begin anew; without restarts, as the paper's do."""
    restart = config.restart
    if config.method != "relora":
        return RestartConfig()
    return RestartConfig(
        optimizer=restart.optimizer,
        keep_ratio=restart.keep_ratio,
        init=restart.init,
        directions=restart.directions,
        stagger=restart.stagger,
        turns=1 if restart.stagger == "none" else restart.turns,
    )


def adaptive_of(config: TrainingConfig) -> Adaptive:
    """What the run decides on its way."""
    warm_start: WarmStartEnd | None = None
    cycle: CycleEnd | None = None
    switching = config if isinstance(config, RunConfig) and config.method != "full" else None
    if switching and switching.warm_start.auto:
        start = switching.warm_start
        warm_start = WarmStartEnd(window_steps=start.window_steps, slope=start.slope, energy=start.energy)
    restart = config.restart
    if config.method == "relora" and restart.adaptive:
        # balanced factors have their full rank from the first step of a cycle
        cycle = CycleEnd(slope=restart.slope, rank_share=None if restart.init == "balanced" else restart.rank_share)
    return Adaptive(warm_start=warm_start, cycle=cycle, ranks=switching.lowrank.ranks if switching else "uniform")


def most_restarts(config: RunConfig) -> int:
    """As many as there can be, where the run decides when it switches to low rank, or when it restarts."""
    switch = None if config.method == "full" else config.earliest_switch
    return len(schedule_of(config).decided(switch, None).restarts)


def lowrank_of(config: TrainingConfig) -> LowRankConfig:
    """What the switch to low rank injects; with `base: auto`, precision bf16 stores frozen weights in bf16."""
    settings = config.lowrank.model_dump(exclude={"ranks", "warmup_steps"})
    if isinstance(config, FinetuneConfig):
        # what is not trained is the base's to the end, and the base is there: nothing needs a copy of its own
        settings |= {"rest": "frozen", "master": config.method == "relora"}
        if config.task == "classification":
            settings["trained_modules"] = (*settings["trained_modules"], "score")  # its head is new
    if config.lowrank.base == "auto":
        settings["base"] = "bf16" if config.precision.dtype == "bf16" else "auto"
    if isinstance(config, RunConfig):
        on = config.method != "full"
        settings["residual"] = Residual(**config.lowrank.residual.model_dump()) if on else Residual()
    return LowRankConfig(**settings)


def autocast_of(config: TrainingConfig) -> torch.dtype | None:
    """Dtype of the products, where it is not the weights'."""
    return None if config.precision.dtype == "fp32" else torch.bfloat16


def settled_lowrank(
    config: RunConfig | FinetuneConfig, model: PreTrainedModel, device: torch.device, kept: Rates | None = None
) -> LowRankConfig:
    """`lowrank_of`, computed in the ways that pay on this device.

    Args:
        kept: the rates by which a run chose that is now continued, and computed as it began.
    """
    if config.method not in ("lora", "relora"):
        return lowrank_of(config)
    rates = kept or calibrated(device)
    return replace(lowrank_of(config), frozen=frozen_arithmetic(config, model, rates), rates=rates)


def frozen_arithmetic(config: RunConfig | FinetuneConfig, model: PreTrainedModel, rates: Rates) -> Arithmetic:
    """Of the products with frozen weights: what the configuration says, or int8 where that is clearly faster."""
    if config.method not in ("lora", "relora") or config.precision.frozen == "fp32":
        return "native"
    if config.precision.frozen != "auto":
        return config.precision.frozen
    lowrank, tokens = lowrank_of(config), config.batch.micro_sequences * config.data.sequence_length
    if lowrank.base == "nf4":  # has no int8 codes, and what is dequantized is in the dtype of the rest
        return "native"
    found = find_targets(model, lowrank)
    layers = [(*model.get_parameter(f"{name}.weight").shape, lowrank.of_layer(name).r) for name in found]
    native: Arithmetic = "native" if config.precision.dtype == "fp32" else "bf16"

    def seconds(arithmetic: Arithmetic) -> float:
        moved = 1 / lowrank.residual.every_steps if lowrank.residual.scale else 0.0
        return sum(layer_seconds(rates, tokens, out, inn, r, arithmetic, moved) for out, inn, r in layers)

    return "int8" if seconds("int8") < _CLEARLY_FASTER * seconds(native) else "native"


EPOCHS = 3.0
"""Where neither epochs nor steps are given."""


WARMUP_SHARE = 0.03
"""Of the run, where no warm-up is given."""


def schedule_for(config: FinetuneConfig, steps_per_epoch: int) -> Schedule:
    """The timetable of a configuration on examples of which an epoch takes so many steps."""
    schedule = config.schedule
    total = schedule.total_steps or math.ceil((schedule.epochs or EPOCHS) * steps_per_epoch)
    warmup = round(WARMUP_SHARE * total) if schedule.warmup_steps is None else schedule.warmup_steps
    if warmup >= total:
        raise UserError(f"schedule.warmup_steps ({warmup}) must be shorter than the run ({total} steps)")
    return Schedule(
        total_steps=total,
        warmup_steps=warmup,
        warm_start_steps=0 if config.method in ("lora", "relora") else total,
        min_lr_ratio=schedule.min_lr_ratio,
        **restart_times(config),
    )


def form_of(config: FinetuneConfig) -> InstructionForm:
    """How records become examples."""
    data = config.data
    return InstructionForm(data.layout, data.template, data.loss_on, data.prompt_column, data.response_column)


def optimizer_of(config: TrainingConfig, model: nn.Module, lowrank: LowRankConfig) -> OptimizerConfig:
    """Settings of the optimizer; which layers `matrix_lr` is for is told by the model and the low-rank targets."""
    settings, restart = config.optimizer, restart_of(config)
    return OptimizerConfig(
        name=settings.name,
        lr=settings.lr,
        lowrank_lr=config.lowrank_lr,
        lowrank_b_lr_ratio=settings.lowrank_b_lr_ratio,
        matrix_lr=settings.matrix_lr,
        matrices=_block_matrices(model, lowrank) if settings.matrix_lr else frozenset(),
        turns=restart.turns if restart.stagger == "layers" else 1,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        projection=ProjectionConfig(**settings.projection.model_dump()),
    )


def _block_matrices(model: nn.Module, lowrank: LowRankConfig) -> frozenset[str]:
    """The layers that `matrix_lr` is for: those that low rank is for, whatever its rank."""
    whole = replace(lowrank, r=1, rank_pattern={}, alpha_pattern={})
    return frozenset(find_targets(model, whole))
