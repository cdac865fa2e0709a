"""Pretraining: raw settings -> a run folder with a plain Hugging Face model in it.

This file assembles; the loop is in `train/loop.py`, the method in `lowrank/`.
"""

import json
from pathlib import Path

from relora.config import RunConfig
from relora.data.tokenizer import copy_tokenizer
from relora.errors import RunStopped, UserError
from relora.files.atomic import write_durably
from relora.inference.generate import sample_texts
from relora.lowrank import merge
from relora.measure import Evaluation, evaluate, token_loss
from relora.model.load import save_model
from relora.recipes.from_settings import autocast_of, factor_parameters, schedule_of, settled_lowrank
from relora.recipes.job import Job, RunResult, run_job
from relora.recipes.pretraining_inputs import PretrainingInputs, gather_pretraining
from relora.report.html import write_report
from relora.train.optim import check_optimizer
from relora.train.run import Run


def pretrain(config: RunConfig, *, fresh: bool = False, strict: bool = False, quiet: bool = False) -> RunResult:
    """Run a configuration to its end, continuing what its run folder holds; see `run_job` for what is raised.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.
    """
    check_optimizer(config.optimizer.name)
    parts = gather_pretraining(config)
    return run_job(
        job_of(config, parts),
        lambda run, folder: _finish(config, parts, run, folder),
        fresh=fresh,
        strict=strict,
        quiet=quiet,
    )


def job_of(config: RunConfig, parts: PretrainingInputs) -> Job:
    """What there is to do."""
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    trained = parameters + factor_parameters(config, parts.model)
    return Job(
        config=config,
        device=parts.device,
        model=parts.model,
        write_tokenizer=lambda folder: copy_tokenizer(parts.held_out.folder.tokenizer_path, folder),
        schedule_of=schedule_of,
        lowrank_of=lambda kept: settled_lowrank(config, parts.model, parts.device, kept),
        batch_at=parts.batches.batch,
        place_of=parts.batches.place,
        loss=token_loss,
        evaluate=lambda model, each_batch: evaluate(
            model,
            parts.held_out,
            bytes_per_token=parts.bytes_per_token,
            autocast=autocast_of(config),
            each_batch=each_batch,
        ),
        content=parts.content,
        # a checkpoint holds at most weights, m and v in fp32; one more than is kept while it is written, and the model
        needed_bytes=trained * 12 * (config.checkpoint.keep_last + 1) + parameters * 4,
    )


def _finish(config: RunConfig, parts: PretrainingInputs, run: Run, folder: Path) -> Evaluation:
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


def _write_samples(config: RunConfig, parts: PretrainingInputs, folder: Path) -> None:
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
