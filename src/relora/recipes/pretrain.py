"""Pretraining: raw settings -> a run folder with a plain Hugging Face model in it.

This file assembles; the loop is in `train/loop.py`, the method in `lowrank/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from relora.config import RunConfig
from relora.data.tokenizer import copy_tokenizer
from relora.durable import write_durably
from relora.errors import RunStopped, UserError
from relora.lowrank import LowRankConfig, merge
from relora.lowrank.calibrate import from_json, to_json
from relora.measure import Evaluation, evaluate, token_loss
from relora.model.blocks import training_blocks
from relora.model.head import whole_logits_reason
from relora.model.load import save_model
from relora.recipes.continuing import changes_since, check_settings, newest
from relora.recipes.generate import sample_texts
from relora.recipes.parts import Ingredients, autocast_of, factor_parameters, gather, schedule_of, settled_lowrank
from relora.recipes.run_folder import check_space, claim, describe_run
from relora.report.console import Console
from relora.report.html import write_report
from relora.report.reporter import Reporter
from relora.report.trackers import open_trackers
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.optim import OptimizerConfig, check_optimizer
from relora.train.run import Run, begin
from relora.train.state import numeric_environment

LOOK_EVERY_STEPS = 16
"""On a GPU, whose fused AdamW can hold back an update by itself, the host may run so many steps ahead."""


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run leaves."""

    folder: Path
    steps: int
    tokens: int
    evaluation: Evaluation


def pretrain(config: RunConfig, *, fresh: bool = False, strict: bool = False, quiet: bool = False) -> PretrainResult:
    """Run a configuration to its end, continuing what its run folder holds.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.

    Raises:
        UserError: a setting, a folder or a combination that cannot be used, found before anything is written.
        RunStopped, Interrupted: see `relora.errors`; the same call continues from the last checkpoint.
    """
    check_optimizer(config.optimizer.name)
    parts = gather(config)
    checkpointing = config.memory.activation_checkpointing
    blocks = training_blocks(parts.model, checkpointing=checkpointing, compiled=config.compile)
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    # a checkpoint holds at most weights, m and v in fp32; one more than is kept while it is written, and the model
    trained = parameters + factor_parameters(config, parts.model)
    needed = trained * 12 * (config.checkpoint.keep_last + 1) + parameters * 4
    check_space(Path(config.output_dir), needed, continuing=not fresh)
    settings = numeric_environment(parts.device, config.precision.dtype) | parts.content
    settings["compile"] = "inductor" if config.compile else "none"
    with claim(config, fresh) as folder, _checkpoints(config, folder) as checkpoints:
        warnings = changes_since(folder, config)
        checkpoint, broken = newest(checkpoints, strict=strict)
        warnings += broken
        kept = from_json(str(checkpoint.manifest.settings.get("rates"))) if checkpoint else None
        lowrank = settled_lowrank(config, parts.model, parts.device, kept)
        settings["frozen"] = lowrank.frozen
        if checkpoint:
            warnings += check_settings(checkpoint.manifest.settings, settings, strict=strict)
        if lowrank.rates:
            settings["rates"] = to_json(lowrank.rates)
        describe_run(folder, config, parameters)
        copy_tokenizer(parts.held_out.folder.tokenizer_path, folder / "tokenizer")  # an export needs no data
        trackers = open_trackers(
            config.log.trackers, folder, config.model_dump(mode="json"), checkpoint.step if checkpoint else 0
        )
        with Reporter(folder, config.total_steps, trackers, Console(quiet=quiet)) as reporter:
            if checkpoint:
                reporter.message(f"continuing after step {checkpoint.step} of {config.total_steps}")
            for line in warnings:
                reporter.warning(line)
            if reason := whole_logits_reason(parts.model):
                reporter.warning(f"the logits of a whole micro-batch are kept in memory: {reason}")
            if lowrank.frozen == "int8":
                reporter.message("low-rank phase: products with frozen weights in int8 (precision.frozen)")
            run = assemble(config, parts, lowrank, reporter, checkpoints, settings)
            with blocks:
                state = train(run, begin(run, checkpoint))
            evaluation = _finish(config, parts, run, folder)
    return PretrainResult(folder, state.step, state.tokens, evaluation)


def _checkpoints(config: RunConfig, folder: Path) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(folder / "checkpoints", settings.keep_last, background=settings.background)


def _finish(config: RunConfig, parts: Ingredients, run: Run, folder: Path) -> Evaluation:
    """The trained run's model, samples and report."""
    merge(parts.model)
    evaluation = run.evaluate(parts.model, lambda: None)
    save_model(parts.model, folder / "model", parts.tokenizer)
    _write_samples(config, parts, folder)
    run.reporter.message(f"held-out perplexity {evaluation.perplexity:.2f}; model in {folder / 'model'}")
    if not (folder / "metrics.jsonl").exists():
        raise RunStopped(f"{folder}: somebody removed it while the run wrote it; only what came last is there")
    try:
        run.reporter.message(f"report in {write_report(folder)}")
    except UserError as error:  # figures that cannot be read any more: the training is not touched by that
        run.reporter.warning(f"no report: {error}")
    return evaluation


def assemble(
    config: RunConfig,
    parts: Ingredients,
    lowrank: LowRankConfig,
    reporter: Reporter,
    checkpoints: Checkpoints,
    settings: dict[str, str | int],
) -> Run:
    """The run that the loop takes."""
    optimizer = config.optimizer
    autocast = autocast_of(config)
    return Run(
        model=parts.model,
        schedule=schedule_of(config),
        batch_at=parts.batches.batch,
        place_of=parts.batches.place,
        loss=token_loss,
        evaluate=lambda model, each_batch: evaluate(
            model,
            parts.held_out,
            bytes_per_token=parts.bytes_per_token,
            autocast=autocast,
            each_batch=each_batch,
        ),
        optimizer=OptimizerConfig(
            name=optimizer.name,
            lr=optimizer.lr,
            lowrank_lr=config.lowrank_lr,
            lowrank_b_lr_ratio=optimizer.lowrank_b_lr_ratio,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
        lowrank=lowrank,
        restart_reset=config.restart.optimizer,
        restart_keep_ratio=config.restart.keep_ratio,
        reporter=reporter,
        checkpoints=checkpoints,
        settings=settings,
        autocast=autocast,
        seed=config.seed,
        micro_sequences=config.batch.micro_sequences,
        clip_grad_norm=optimizer.clip_grad_norm,
        non_finite=config.non_finite.policy,
        non_finite_limit=config.non_finite.limit,
        look_every_steps=LOOK_EVERY_STEPS if parts.device.type == "cuda" and optimizer.name == "adamw" else 1,
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
    write_durably(folder / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
