"""Pretraining: raw settings -> a run folder with a plain Hugging Face model in it.

This file assembles; the loop is in `train/loop.py`, the method in `lowrank/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.config import RunConfig
from relora.data.batches import HeldOut, TrainBatches, check_same_tokenizer
from relora.data.shards import PreparedFolder
from relora.data.tokenizer import copy_tokenizer, load_tokenizer
from relora.device import choose_device
from relora.lowrank import LowRankConfig, merge
from relora.lowrank.inject import find_targets
from relora.measure import Evaluation, evaluate, token_loss
from relora.model.load import build_model, check_fit, open_model, save_model
from relora.recipes.generate import sample_texts
from relora.recipes.run_folder import check_space, claim, write_environment
from relora.report.console import Console
from relora.report.html import write_report
from relora.report.reporter import Reporter
from relora.report.trackers import check_trackers, open_trackers
from relora.train.checkpoint import Checkpoints
from relora.train.loop import Run, begin, train
from relora.train.optim import OptimizerConfig
from relora.train.schedule import Schedule
from relora.train.state import numeric_environment


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run leaves."""

    folder: Path
    steps: int
    tokens: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Ingredients:
    """Everything a run is made of, opened and checked against each other; nothing is written yet."""

    device: torch.device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: TrainBatches
    held_out: HeldOut
    bytes_per_token: float


def pretrain(config: RunConfig, *, fresh: bool = False, quiet: bool = False) -> PretrainResult:
    """Run a configuration to its end, continuing what its run folder holds.

    Raises:
        UserError: a setting, a folder or a combination that cannot be used, found before anything is written.
        RunStopped, Interrupted: see `relora.errors`; the same call continues from the last checkpoint.
    """
    parts = gather(config)
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    # a checkpoint holds at most weights, m and v in fp32; one more than is kept while it is written, and the model
    needed = parameters * (12 * (config.checkpoint.keep_last + 1) + 4)
    check_space(Path(config.output_dir), needed, continuing=not fresh)
    with claim(config, fresh) as folder:
        write_environment(folder, parameters)
        copy_tokenizer(parts.held_out.folder.tokenizer_path, folder / "tokenizer")  # an export needs no data
        return _run(config, parts, folder, quiet)


def _run(config: RunConfig, parts: Ingredients, folder: Path, quiet: bool) -> PretrainResult:
    """From the newest checkpoint, if there is one, to the model, the samples and the report."""
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
    checkpoint, broken = checkpoints.latest()
    environment = numeric_environment(parts.device, config.precision.dtype)
    trackers = open_trackers(
        config.log.trackers, folder, config.model_dump(mode="json"), checkpoint.step if checkpoint else 0
    )
    with Reporter(folder, config.total_steps, trackers, Console(quiet=quiet)) as reporter:
        for line in broken:
            reporter.warning(f"{line}; an older checkpoint is used")
        if checkpoint:
            reporter.message(f"continuing after step {checkpoint.step} of {config.total_steps}")
            _warn_of_changes(checkpoint.settings, environment, reporter)
        run = assemble(config, parts, reporter, checkpoints, environment)
        state = train(run, begin(run, checkpoint))
        merge(parts.model)
        evaluation = run.evaluate(parts.model)
        save_model(parts.model, folder / "model", parts.tokenizer)
        _write_samples(config, parts, folder)
        report = write_report(folder)
        reporter.message(
            f"held-out perplexity {evaluation.perplexity:.2f}; model in {folder / 'model'}, report in {report}"
        )
    return PretrainResult(folder, state.step, state.tokens, evaluation)


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
    return Ingredients(device, model.to(device), tokenizer, batches, held_out, validation.bytes_per_token)


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
    model = open_configured_model(config, eos_token_id=validation.index.eos_token_id)
    check_fit(model, validation.vocab_size, config.data.sequence_length)
    if config.method != "full":
        find_targets(model, lowrank_of(config))
    return model


def open_configured_model(config: RunConfig, *, eos_token_id: int | None = None) -> PreTrainedModel:
    """The model of the `model` section, on the CPU, before any training."""
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
    )


def schedule_of(config: RunConfig) -> Schedule:
    """The timetable of a configuration."""
    return Schedule(
        total_steps=config.total_steps,
        warmup_steps=config.schedule.warmup_steps,
        warm_start_steps=config.total_steps if config.method == "full" else config.warm_start.steps,
        restart_every_steps=config.restart.every_steps if config.method == "relora" else None,
        restart_warmup_steps=config.restart.warmup_steps,
        min_lr_ratio=config.schedule.min_lr_ratio,
    )


def lowrank_of(config: RunConfig) -> LowRankConfig:
    """What the switch to low rank injects; with `base: auto`, precision bf16 stores frozen weights in bf16."""
    settings = config.lowrank.model_dump()
    if config.lowrank.base == "auto":
        settings["base"] = "bf16" if config.precision.dtype == "bf16" else "auto"
    return LowRankConfig(**settings)


def assemble(
    config: RunConfig,
    parts: Ingredients,
    reporter: Reporter,
    checkpoints: Checkpoints,
    environment: dict[str, str | int],
) -> Run:
    """The run that the loop takes."""
    optimizer = config.optimizer
    autocast = None if config.precision.dtype == "fp32" else torch.bfloat16
    return Run(
        model=parts.model,
        schedule=schedule_of(config),
        batch_at=parts.batches.batch,
        loss=token_loss,
        evaluate=lambda model: evaluate(
            model, parts.held_out, bytes_per_token=parts.bytes_per_token, autocast=autocast
        ),
        optimizer=OptimizerConfig(
            lr=optimizer.lr,
            lowrank_lr=config.lowrank_lr,
            lowrank_b_lr_ratio=optimizer.lowrank_b_lr_ratio,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
        lowrank=lowrank_of(config),
        restart_reset=config.restart.optimizer,
        restart_keep_ratio=config.restart.keep_ratio,
        reporter=reporter,
        checkpoints=checkpoints,
        numeric_environment=environment,
        autocast=autocast,
        seed=config.seed,
        micro_sequences=config.batch.micro_sequences,
        clip_grad_norm=optimizer.clip_grad_norm,
        log_every_steps=config.log.every_steps,
        evaluate_every_steps=config.evaluate.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )


def _write_samples(config: RunConfig, parts: Ingredients, folder: Path) -> None:
    """Text that the finished model writes, for the report."""
    settings = config.samples
    texts = sample_texts(
        parts.model,
        parts.tokenizer,
        settings.prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=config.seed,
    )
    samples = [
        {"step": config.total_steps, "prompt": prompt, "text": text}
        for prompt, text in zip(settings.prompts, texts, strict=True)
    ]
    (folder / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _warn_of_changes(then: dict[str, object], now: dict[str, str | int], reporter: Reporter) -> None:
    """Say what changes the last bits of a continued run."""
    changed = [f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value]
    if changed:
        reporter.warning(f"not bit for bit what an uninterrupted run gives: {'; '.join(changed)}")
