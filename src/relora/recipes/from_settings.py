"""Objects from a configuration: schedule, restarts, low-rank layers, optimizer, precision.

Every "settings -> object" of a run stands here once, so that the run, its plan, its probe and its export agree.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relora.config import FinetuneConfig, RunConfig, TrainingConfig
from relora.data.finetuning.instruct import InstructionForm
from relora.errors import UserError
from relora.lowrank import LowRankConfig, token_rows
from relora.lowrank.calibrate import calibrated
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates, layer_seconds
from relora.lowrank.kernel import Arithmetic
from relora.lowrank.restart import RestartConfig
from relora.lowrank.targets import choose_targets, find_targets
from relora.train.optim import OptimizerConfig
from relora.train.projected_optimizers import ProjectionConfig
from relora.train.run import Adaptive, CycleEnd, WarmStartEnd
from relora.train.schedule import Schedule

FINETUNING_EPOCHS = 3.0
"""Epochs of a fine-tuning run whose configuration gives neither epochs nor steps."""
FINETUNING_WARMUP_SHARE = 0.03
"""Warm-up of a fine-tuning run whose configuration gives none, as a share of its steps."""
_INT8_TIME_SHARE = 0.9
"""Int8 products are chosen only if they take at most this share of the predicted time: their rounding must pay."""


def schedule_of(config: TrainingConfig, steps_per_epoch: int | None = None) -> Schedule:
    """Build the schedule of a run.

    Args:
        steps_per_epoch: optimizer steps of one pass over the examples; needed for fine-tuning.

    Raises:
        UserError: the warm-up is as long as the run.
    """
    if isinstance(config, RunConfig):
        total, warmup = config.total_steps, config.schedule.warmup_steps
        warm_start = total if config.method == "full" else config.warm_start.steps
    else:
        assert isinstance(config, FinetuneConfig) and steps_per_epoch is not None
        given = config.schedule
        total = given.total_steps or math.ceil((given.epochs or FINETUNING_EPOCHS) * steps_per_epoch)
        warmup = round(FINETUNING_WARMUP_SHARE * total) if given.warmup_steps is None else given.warmup_steps
        if warmup >= total:
            raise UserError(f"schedule.warmup_steps ({warmup}) must be shorter than the run ({total} steps)")
        warm_start = 0 if config.method in ("lora", "relora") else total
    return Schedule(
        total_steps=total,
        warmup_steps=warmup,
        warm_start_steps=warm_start,
        min_lr_ratio=config.schedule.min_lr_ratio,
        **_restart_times(config),
    )


def most_restarts(config: RunConfig) -> int:
    """Upper bound of the number of restarts: a run may decide itself when it switches to low rank or restarts."""
    switch = None if config.method == "full" else config.earliest_switch
    return len(schedule_of(config).decided(switch, None).restarts)


def restart_of(config: TrainingConfig) -> RestartConfig:
    """Settings of the restart; for a method without restarts, the defaults."""
    restart = config.restart
    if config.method != "relora":
        return RestartConfig()
    return RestartConfig(
        optimizer=restart.optimizer,
        keep_ratio=restart.keep_ratio,
        init=restart.init,
        directions=restart.directions,
        retain=restart.retain,
        stagger=restart.stagger,
        turns=1 if restart.stagger == "none" else restart.turns,
    )


def adaptive_of(config: TrainingConfig) -> Adaptive:
    """Rules by which the run itself decides on the end of the warm start, on restarts and on ranks."""
    warm_start: WarmStartEnd | None = None
    cycle: CycleEnd | None = None
    switching = config if isinstance(config, RunConfig) and config.method != "full" else None
    if switching and switching.warm_start.auto:
        start = switching.warm_start
        warm_start = WarmStartEnd(window_steps=start.window_steps, slope=start.slope, energy=start.energy)
    restart = config.restart
    if config.method == "relora" and restart.adaptive:
        # Balanced factors have full rank from a cycle's first step on, so their rank tells nothing.
        cycle = CycleEnd(slope=restart.slope, rank_share=None if restart.init == "balanced" else restart.rank_share)
    return Adaptive(warm_start=warm_start, cycle=cycle, ranks=switching.lowrank.ranks if switching else "uniform")


def lowrank_of(config: TrainingConfig) -> LowRankConfig:
    """Settings of the low-rank layers; with `base: auto`, precision bf16 stores frozen weights in bf16."""
    settings = config.lowrank.model_dump(exclude={"ranks", "warmup_steps", "trainable_tokens"})
    if isinstance(config, FinetuneConfig):
        if config.lowrank.trainable_tokens:
            settings["trained_modules"] = (*settings["trained_modules"], token_rows.MODULE)
        # The base model stays on disk and frozen weights never change, so they need no master copy unless merged.
        settings |= {"rest": "frozen", "master": config.method == "relora"}
        if config.task == "classification":  # The classification head is new, so it trains in full.
            settings["trained_modules"] = (*settings["trained_modules"], "score")
    if config.lowrank.base == "auto":
        settings["base"] = "bf16" if config.precision.dtype == "bf16" else "auto"
    if isinstance(config, RunConfig):
        residual = config.lowrank.residual.model_dump()
        settings["residual"] = Residual() if config.method == "full" else Residual(**residual)
    return LowRankConfig(**settings)


def settled_lowrank(
    config: TrainingConfig, model: PreTrainedModel, device: torch.device, kept: Rates | None = None
) -> LowRankConfig:
    """Settings of the low-rank layers with the arithmetic that is fastest on this device.

    Args:
        kept: rates that a continued run was begun with; it must go on computing in the same way. None: measure.
    """
    lowrank = lowrank_of(config)
    if config.method not in ("lora", "relora"):
        return lowrank
    rates = kept or calibrated(device)
    arithmetic = frozen_arithmetic(config, model, rates)
    return replace(lowrank, frozen=arithmetic, cast=autocast_of(config), rates=rates)


def frozen_arithmetic(config: TrainingConfig, model: PreTrainedModel, rates: Rates) -> Arithmetic:
    """Arithmetic of the products with frozen weights: as configured, or with `auto` int8 where it is clearly faster."""
    if config.method not in ("lora", "relora") or config.precision.frozen == "fp32":
        return "native"
    if config.precision.frozen != "auto":
        return config.precision.frozen
    lowrank = lowrank_of(config)
    if lowrank.base == "nf4":  # NF4 has no int8 codes; its dequantized weight has the dtype of the other tensors.
        return "native"
    assert isinstance(config, RunConfig | FinetuneConfig)
    tokens = config.batch.micro_sequences * config.data.sequence_length
    targets = find_targets(model, lowrank)
    layers = [(*model.get_parameter(f"{name}.weight").shape, lowrank.of_layer(name).r) for name in targets]
    moved_share = 1 / lowrank.residual.every_steps if lowrank.residual.scale else 0.0

    def seconds(arithmetic: Arithmetic) -> float:
        return sum(layer_seconds(rates, tokens, out, inn, r, arithmetic, moved_share) for out, inn, r in layers)

    native: Arithmetic = "native" if autocast_of(config) is None else "bf16"
    return "int8" if seconds("int8") < _INT8_TIME_SHARE * seconds(native) else "native"


def factor_parameters(config: TrainingConfig, model: PreTrainedModel) -> int:
    """Count the parameters that the factors will add to `model`."""
    if config.method == "full":
        return 0
    lowrank = lowrank_of(config)
    targets = find_targets(model, lowrank)
    return sum(lowrank.of_layer(name).r * sum(model.get_parameter(f"{name}.weight").shape) for name in targets)


def lowrank_notes(config: TrainingConfig, model: nn.Module) -> list[str]:
    """Lines that say what of `model` will get no factors, although it may look as if it did; empty at full rank."""
    if config.method not in ("lora", "relora"):
        return []
    lowrank = lowrank_of(config)
    return choose_targets(model, lowrank).notes(lowrank.rest)


def optimizer_of(config: TrainingConfig, model: nn.Module, lowrank: LowRankConfig) -> OptimizerConfig:
    """Settings of the optimizer; `optimizer.matrix_lr` is for the layers that `lowrank` targets in `model`."""
    settings, restart = config.optimizer, restart_of(config)
    return OptimizerConfig(
        name=settings.name,
        factor_rule=settings.factors,
        matrix_rule=settings.matrices,
        momentum=settings.momentum,
        lr=settings.lr,
        lowrank_lr=config.lowrank_lr,
        lowrank_b_lr_ratio=settings.lowrank_b_lr_ratio,
        matrix_lr=settings.matrix_lr,
        matrices=_block_matrices(model, lowrank) if settings.matrix_lr or settings.matrices == "muon" else frozenset(),
        turns=restart.turns if restart.stagger == "layers" else 1,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        projection=ProjectionConfig(**settings.projection.model_dump()),
    )


def autocast_of(config: TrainingConfig) -> torch.dtype | None:
    """Dtype that autocast computes products in; None where they are computed in the dtype of the weights."""
    assert config.precision.dtype != "auto", "`precision.settle_dtype` comes first"
    return None if config.precision.dtype == "fp32" else torch.bfloat16


def form_of(config: FinetuneConfig) -> InstructionForm:
    """Layout, template and columns by which records become examples."""
    data = config.data
    return InstructionForm(data.layout, data.template, data.loss_on, data.prompt_column, data.response_column)


def _restart_times(config: TrainingConfig) -> dict[str, Any]:
    """Arguments of `Schedule` that say when restarts and their warm-ups are."""
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


def _block_matrices(model: nn.Module, lowrank: LowRankConfig) -> frozenset[str]:
    """Paths of the layers that `lowrank` targets; rank 1 finds also those that its rank does not fit."""
    rank_one = replace(lowrank, r=1, rank_pattern={}, alpha_pattern={})
    return frozenset(find_targets(model, rank_one))
