"""From a configuration to the parts of a run: data, model, timetable, each checked against the others.

Nothing is written here.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.config import FinetuneConfig, RunConfig, TrainingConfig
from relora.data.batches import HeldOut, TrainBatches, check_same_tokenizer
from relora.data.shards import PreparedFolder
from relora.data.tokenizer import fingerprint, load_tokenizer
from relora.device import choose_device
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.calibrate import calibrated
from relora.lowrank.costs import Rates, layer_seconds
from relora.lowrank.inject import find_targets
from relora.lowrank.kernel import Arithmetic
from relora.lowrank.linear import Residual
from relora.lowrank.restart import RestartConfig
from relora.model.load import build_model, check_fit, model_folder, open_model
from relora.report.trackers import check_trackers
from relora.train.run import Adaptive, CycleEnd, WarmStartEnd
from relora.train.schedule import Schedule

_CLEARLY_FASTER = 0.9
"""Of the low-rank layers' predicted time: what int8 must save at least to be worth its rounding."""


@dataclass(frozen=True)
class Ingredients:
    """Everything a run is made of, opened and checked against each other."""

    device: torch.device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: TrainBatches
    held_out: HeldOut
    bytes_per_token: float
    content: dict[str, str]
    """Fingerprints of what the configuration only points at: the tokens of `data`, the shape of `model.path`."""


def gather(config: RunConfig) -> Ingredients:
    """Open data, tokenizer and model, and refuse what does not fit together."""
    check_trackers(config.log.trackers)
    device = choose_device(config.device)
    batches, held_out = open_data(config)
    validation = held_out.folder
    model = open_fitting_model(config, validation)
    for folder in (*batches.folders, validation):
        folder.verify()
    tokenizer = load_tokenizer(str(validation.tokenizer_path))
    if fingerprint(tokenizer) != validation.fingerprint:
        raise UserError(f"{validation.tokenizer_path}: not the tokenizer that wrote {validation.path}; put it back")
    content = {"data": fingerprint_of(*(folder.content.encode() for folder in (*batches.folders, validation)))}
    if config.model.path is not None:
        content["model"] = fingerprint_of((model_folder(config.model.path) / "config.json").read_bytes())
    return Ingredients(device, model.to(device), tokenizer, batches, held_out, validation.bytes_per_token, content)


def open_data(config: RunConfig) -> tuple[TrainBatches, HeldOut]:
    """The prepared folders of a configuration, of one tokenizer and large enough."""
    sources = [(PreparedFolder.open(source.path), source.weight) for source in config.data.sources]
    validation = PreparedFolder.open(config.data.validation)
    check_same_tokenizer([*(folder for folder, _ in sources), validation])
    length = config.data.sequence_length
    batches = TrainBatches(sources, length, config.batch.sequences, config.seed)
    return batches, HeldOut(validation, length, config.evaluate.tokens, config.batch.micro_sequences)


def open_fitting_model(config: RunConfig, validation: PreparedFolder) -> PreTrainedModel:
    """The model of a configuration, once it is sure that the data and the low-rank settings fit it."""
    model = open_configured_model(
        config, eos_token_id=validation.index.eos_token_id, trust_remote_code=config.model.trust_remote_code
    )
    check_fit(model, validation.vocab_size, config.data.sequence_length)
    if config.method != "full":
        find_targets(model, lowrank_of(config))
    return model


def open_configured_model(
    config: RunConfig, *, eos_token_id: int | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of the `model` section, on the CPU, before any training.

    `trust_remote_code` is the caller's to say: the configuration of a run folder may be somebody else's.
    """
    model = config.model
    if model.preset is not None:
        return build_model(model.preset, model.overrides, seed=config.seed, eos_token_id=eos_token_id)
    assert model.path is not None  # ModelSettings sees to it
    return open_model(
        model.path,
        from_scratch=model.from_scratch,
        overrides=model.overrides,
        seed=config.seed,
        eos_token_id=eos_token_id,
        trust_remote_code=trust_remote_code,
    )


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


def fingerprint_of(*parts: bytes) -> str:
    """A hash of what a run is made of, for its checkpoints."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()
