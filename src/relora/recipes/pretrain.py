"""Pretraining: from a configuration to a run folder with a plain Hugging Face model in it.

This file assembles the run; the loop is in `train/loop.py`, the method in `lowrank/`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from relora.config import RunConfig
from relora.data.tokenizer import copy_tokenizer
from relora.distributed.group import together
from relora.distributed.whole import whole_on_first
from relora.errors import RunStopped, UserError
from relora.files.atomic import write_json
from relora.inference.generate import sample_texts
from relora.lowrank import low_rank_layers, merge
from relora.lowrank.takeover import take_over_
from relora.measure import Evaluation, token_loss
from relora.model.save import save_model
from relora.recipes.from_settings import factor_parameters, schedule_of, settled_lowrank
from relora.recipes.job import Job, Position, RunResult, measure_result, run_job
from relora.recipes.precision import settle_dtype_of_run
from relora.recipes.pretraining_inputs import PretrainingInputs, gather_pretraining, open_fitting_model
from relora.report.html import write_report
from relora.train.optim import check_optimizer
from relora.train.run import Run, Task


def pretrain(
    config: RunConfig, *, fresh: bool = False, strict: bool = False, quiet: bool = False, until: int | None = None
) -> RunResult:
    """Pretrain by a configuration to its end, continuing what its run folder holds; raises what `run_job` raises.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.
        until: stop after this step, with a checkpoint from which the same call goes on (see `run_job`).
    """
    with together() as group:
        with group.stage("the opening of data and model"):
            check_optimizer(config.optimizer.name)
            inputs = gather_pretraining(config)
        config, dtype_line = settle_dtype_of_run(config, inputs.device, inputs.model, fresh=fresh, group=group)
        job = job_of(config, inputs)
        return run_job(
            replace(job, notes=(*job.notes, dtype_line)) if dtype_line else job,
            lambda run, folder, position: _finish(config, inputs, run, folder, position),
            fresh=fresh,
            strict=strict,
            quiet=quiet,
            until=until,
        )


def job_of(config: RunConfig, inputs: PretrainingInputs) -> Job:
    """Build the job of a configuration from its opened inputs."""
    parameters = sum(parameter.numel() for parameter in inputs.model.parameters())
    trained = parameters + factor_parameters(config, inputs.model)
    return Job(
        config=config,
        device=inputs.device,
        task=Task(
            model=inputs.model,
            batch_at=inputs.batches.batch,
            place_of=inputs.batches.place,
            loss=token_loss,
            evaluate=lambda model, each_batch: inputs.evaluate(config, model, each_batch),
            initialize=_taking_over(config, inputs) if config.warm_start.takeover else None,
        ),
        schedule_of=schedule_of,
        lowrank_of=lambda kept: settled_lowrank(config, inputs.model, inputs.device, kept),
        content=inputs.content,
        # A checkpoint holds weights, m and v in fp32 at most; while one is written there is one more than is kept.
        needed_bytes=trained * 12 * (config.checkpoint.keep_last + 1) + parameters * 4,
        write_tokenizer=lambda folder: copy_tokenizer(inputs.held_out.folder.tokenizer_path, folder),
        notes=inputs.notes,
    )


def _taking_over(config: RunConfig, inputs: PretrainingInputs) -> Callable[[nn.Module], str]:
    """Make the function that lets the factors take over what the warm start has learnt since step 0."""

    def initialize(model: nn.Module) -> str:
        first, _ = open_fitting_model(config, inputs.held_out.folder)
        initial_weights = {path: first.get_parameter(f"{path}.weight") for path in low_rank_layers(model)}
        share = take_over_(model, initial_weights)
        return (
            f"the factors take over {100 * share:.0f}% (by squared norm) of what the warm start has changed in their "
            "layers; the rest stays in the weights"
        )

    return initialize


def _finish(config: RunConfig, inputs: PretrainingInputs, run: Run, folder: Path, position: Position) -> Evaluation:
    """Write the trained model, sampled texts and the report; return the held-out loss of the written model."""
    merge(inputs.model)
    with whole_on_first(inputs.model, folder, run.group):
        if run.group.is_first:
            save_model(inputs.model, folder / "model", inputs.tokenizer)
    run.group.meet("the trained model")
    evaluation = measure_result(run, position, lambda: inputs.evaluate_whole(inputs.model, run.reporter))
    with whole_on_first(inputs.model, folder, run.group):
        if not run.group.is_first:
            return evaluation
        try:
            _write_samples(config, inputs, folder)
        except UserError as error:  # the trained model does not depend on them
            run.reporter.warning(f"no samples of text: {error}")
    run.reporter.message(
        f"held-out perplexity {evaluation.perplexity:.2f} on all {evaluation.tokens:,} tokens; "
        f"model in {folder / 'model'}"
    )
    if not (folder / "metrics.jsonl").exists():
        raise RunStopped(f"{folder}: somebody removed it while the run wrote it; only what came last is there")
    try:
        run.reporter.message(f"report in {write_report(folder)}")
    except UserError as error:  # damaged metric files; the trained model does not depend on them
        run.reporter.warning(f"no report: {error}")
    return evaluation


def _write_samples(config: RunConfig, inputs: PretrainingInputs, folder: Path) -> None:
    """Write samples.json for the report: text with which the finished model continues the configured prompts."""
    settings = config.samples
    texts = sample_texts(
        inputs.model,
        inputs.tokenizer,
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
    write_json(folder / "samples.json", samples, ensure_ascii=False)
