"""Fine-tuning: from a trained model and examples to an adapter of a few MB, or to a model.

    lora, llama-adapter     RUN/adapter, in PEFT's format
    relora, full            RUN/model, a plain Hugging Face folder; a classifier is always written so

This file assembles the run; the loop is that of pretraining.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.adapters.added_tokens import without_token_rows
from relora.adapters.llama_adapter import save_prompts
from relora.adapters.save_load import save_adapter
from relora.config import FinetuneConfig
from relora.data.finetuning.instruct import prompts
from relora.data.tokenizer import save_tokenizer
from relora.device import free_memory_bytes
from relora.distributed.group import current_group, together
from relora.distributed.whole import whole_on_first
from relora.errors import UserError
from relora.files.atomic import write_json
from relora.inference.decoding import Sampling, continue_prompt
from relora.inference.loading import load_model_or_run
from relora.lowrank import merge
from relora.lowrank.gradient_init import gradient_svd_, weight_gradients
from relora.lowrank.token_rows import fold_rows
from relora.measure import Evaluation
from relora.model.load import max_positions
from relora.model.save import save_model
from relora.model.vocabulary import narrowest_dtype
from relora.recipes.finetuning_inputs import FinetuningInputs, gather_finetuning
from relora.recipes.from_settings import factor_parameters, form_of, lowrank_of, schedule_of, settled_lowrank
from relora.recipes.job import Job, Position, RunResult, measure_result, run_job
from relora.recipes.precision import settle_dtype_of_run
from relora.report.html import write_report
from relora.report.reporter import Reporter
from relora.train.optim import check_optimizer
from relora.train.run import Run, Task
from relora.train.step import Batch

CHANGES_BASE = ("pissa", "gradient-svd")
"""Initialisations that subtract from the frozen weight what they put into the factors."""
GRADIENT_BATCHES = 8
"""Micro-batches over which `gradient-svd` averages the gradient (LoRA-GA, arXiv 2407.05000, section 4)."""


def finetune(
    config: FinetuneConfig, *, fresh: bool = False, strict: bool = False, quiet: bool = False, until: int | None = None
) -> RunResult:
    """Fine-tune by a configuration to its end, continuing what its run folder holds; raises what `run_job` raises.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.
        until: stop after this step, with a checkpoint from which the same call goes on (see `run_job`).
    """
    with together() as group:
        with group.stage("the opening of data and model"):
            check_optimizer(config.optimizer.name)
            inputs = gather_finetuning(config)
        return train_on(config, inputs, fresh=fresh, strict=strict, quiet=quiet, until=until)


def train_on(
    config: FinetuneConfig,
    inputs: FinetuningInputs,
    *,
    fresh: bool = False,
    strict: bool = False,
    quiet: bool = False,
    until: int | None = None,
) -> RunResult:
    """Fine-tune on inputs that `gather_finetuning` has opened; afterwards `inputs.model` is the trained model."""
    config, dtype_line = settle_dtype_of_run(config, inputs.device, inputs.model, fresh=fresh, group=current_group())
    job = job_of(config, inputs)
    return run_job(
        replace(job, notes=(*job.notes, dtype_line)) if dtype_line else job,
        lambda run, folder, position: _finish(config, inputs, run, folder, position),
        fresh=fresh,
        strict=strict,
        quiet=quiet,
        until=until,
    )


def job_of(config: FinetuneConfig, inputs: FinetuningInputs) -> Job:
    """Build the job of a configuration from its opened inputs."""
    model, steps = inputs.model, inputs.batches.steps_per_epoch
    schedule_of(config, steps)  # raises before anything is written
    changes_base = config.method == "relora" or config.lowrank.init in CHANGES_BASE
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.method in ("lora", "relora"):
        trained = factor_parameters(config, model) + (parameters if changes_base else 0)
    model_bytes = parameters * 4 if _leaves_model(config) or inputs.is_grown else 0
    return Job(
        config=config,
        device=inputs.device,
        task=Task(
            model=model,
            batch_at=inputs.batches.batch,
            place_of=inputs.batches.place,
            loss=inputs.loss,
            evaluate=lambda trained, each_batch: inputs.evaluate(config, trained, each_batch),
            initialize=_gradient_svd(config, inputs) if config.lowrank.init == "gradient-svd" else None,
            saves_frozen=config.method in ("lora", "relora") and changes_base,
        ),
        schedule_of=lambda one: schedule_of(one, steps),
        lowrank_of=lambda kept: settled_lowrank(config, model, inputs.device, kept),
        content=inputs.content,
        # A checkpoint holds weights, m and v in fp32; while one is written there is one more than is kept.
        needed_bytes=trained * 12 * (config.checkpoint.keep_last + 1) + model_bytes,
        write_tokenizer=lambda folder: _write_start(config, inputs, folder),
        notes=inputs.notes,
    )


def _write_start(config: FinetuneConfig, inputs: FinetuningInputs, folder: Path) -> None:
    """Write the tokenizer into `folder` and, beside it, a base with added rows that an adapter needs; once."""
    save_tokenizer(inputs.tokenizer, folder)
    base = _base_of(config, inputs, folder.parent)
    if base != inputs.base and not base.is_dir():
        with without_token_rows(inputs.model):
            save_model(inputs.model, base, inputs.tokenizer, narrowest_dtype(inputs.model))


def _base_of(config: FinetuneConfig, inputs: FinetuningInputs, run: Path) -> Path:
    """Folder of the model that an adapter of the run belongs to: the one given, or RUN/base if rows were added."""
    return run / "base" if inputs.is_grown and not _leaves_model(config) else inputs.base


def _leaves_model(config: FinetuneConfig) -> bool:
    """Whether the run writes a whole model; otherwise it writes an adapter."""
    return config.task == "classification" or config.method in ("relora", "full")


def _finish(config: FinetuneConfig, inputs: FinetuningInputs, run: Run, folder: Path, position: Position) -> Evaluation:
    """Write the adapter or model, answers to held-out prompts and the report; return the held-out loss."""
    model, reporter = inputs.model, run.reporter
    if _leaves_model(config):
        merge(model)
        fold_rows(model)
    with whole_on_first(model, folder, run.group):
        left = _write_result(config, inputs, folder) if run.group.is_first else ""
    run.group.meet("the trained model")
    evaluation = measure_result(run, position, lambda: _evaluate_result(config, inputs, reporter, folder))
    with whole_on_first(model, folder, run.group):
        if not run.group.is_first:
            return evaluation
        if inputs.asks and config.samples.examples:
            try:
                without_room = _write_answers(config, inputs, run.schedule.total_steps, folder)
                if without_room:
                    reporter.warning(f"no answers to held-out prompts that {without_room}")
            except UserError as error:  # the trained model does not depend on them
                reporter.warning(f"no answers to held-out prompts: {error}")
    figures = {"loss": evaluation.loss, **(evaluation.scores or {"perplexity": evaluation.perplexity})}
    shown = ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
    unit = "examples" if inputs.is_classifier else "tokens"
    reporter.message(f"held-out {shown} on all {evaluation.tokens:,} {unit}; {left}")
    try:
        reporter.message(f"report in {write_report(folder)}")
    except UserError as error:  # damaged metric files; the trained model does not depend on them
        reporter.warning(f"no report: {error}")
    return evaluation


def _write_result(config: FinetuneConfig, inputs: FinetuningInputs, folder: Path) -> str:
    """Write the model, whose factors are merged, or the adapter; return a line about it."""
    base = str(_base_of(config, inputs, folder))
    if _leaves_model(config):
        return str(save_model(inputs.model, folder / "model", inputs.tokenizer))
    save = save_adapter if config.method == "lora" else save_prompts
    return str(save(inputs.model, folder / "adapter", base=base, overwrite=True))


def _evaluate_result(config: FinetuneConfig, inputs: FinetuningInputs, reporter: Reporter, folder: Path) -> Evaluation:
    """Measure the written result on all held-out examples.

    A written model has the weights of `inputs.model`. An adapter is used with its base in fp32, so where the base was
    trained on in fewer bits, or changed by the initialisation, base and adapter are opened anew. Where there is no
    memory for that, the figure is that of the base as it was trained on, and a warning says so.
    """
    base_is_changed = lowrank_of(config).base not in ("auto", "fp32") or config.lowrank.init in CHANGES_BASE
    if _leaves_model(config) or config.method != "lora" or not base_is_changed:
        return inputs.evaluate_whole(inputs.model, reporter)
    # A byte of nf4 codes holds two weights.
    weights = sum(weight.numel() * (2 if weight.dtype == torch.uint8 else 1) for weight in inputs.model.parameters())
    needed, free = 4 * weights, free_memory_bytes(inputs.device)
    if free is not None and needed > free:
        reporter.warning(
            "the held-out figure is that of the base as it was trained on; in fp32 its weights need "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} are free: `relora evaluate --dtype bf16` takes half"
        )
        return inputs.evaluate_whole(inputs.model, reporter)
    reporter.message(
        "the adapter is measured on its base in fp32; the figures above are of the base as it was trained on"
    )
    result = load_model_or_run(folder, device=str(inputs.device), trust_remote_code=config.model.trust_remote_code)
    return inputs.evaluate_whole(result.model, reporter)


def _write_answers(config: FinetuneConfig, inputs: FinetuningInputs, step: int, folder: Path) -> str:
    """Write samples.json for the report: greedy answers of the trained model to held-out prompts.

    A prompt that leaves less room than `max_new_tokens` in the model's context gets a shorter answer.

    Returns:
        What is true of the prompts without an answer, with their number; an empty text if each has one.
    """
    settings = config.samples
    records = inputs.held_out_records[: settings.examples]
    positions, without_room = max_positions(inputs.model), 0
    samples = []
    for prompt in prompts(records, inputs.tokenizer, form_of(config), skip_bad=config.data.skip_bad):
        room = settings.max_new_tokens
        if positions is not None:
            room = min(room, positions - len(prompt.input_ids))
        if room < 1:
            without_room += 1
            continue
        sampling = Sampling(max_new_tokens=room, do_sample=False)
        answer = continue_prompt(inputs.model, inputs.tokenizer, prompt.input_ids, sampling, config.seed)
        samples.append({"step": step, "prompt": answer.prompt, "text": answer.text, "reference": prompt.response})
    write_json(folder / "samples.json", samples, ensure_ascii=False)
    return f"leave no room in the model's {positions:,} positions: {without_room}" if without_room else ""


def _gradient_svd(config: FinetuneConfig, inputs: FinetuningInputs) -> Callable[[nn.Module], str | None]:
    """Make the function that initialises the factors along the mean gradient of the first micro-batches."""

    def mean_loss(batch: Batch) -> Callable[[nn.Module], Tensor]:
        def of(model: nn.Module) -> Tensor:
            loss, number = inputs.loss(model, *(tensor.to(inputs.device) for tensor in batch))
            return loss / number

        return of

    def initialize(model: nn.Module) -> str | None:
        size, number = config.batch.micro_sequences, 0
        micro_batches: list[Batch] = []
        while len(micro_batches) < GRADIENT_BATCHES:
            rows = (torch.split(tensor, size) for tensor in inputs.batches.batch(number))
            micro_batches += zip(*rows, strict=True)
            number += 1
        gradient_svd_(model, weight_gradients(model, map(mean_loss, micro_batches[:GRADIENT_BATCHES])))
        return None

    return initialize
