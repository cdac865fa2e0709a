"""Fine-tuning: a trained model and examples -> an adapter of a few MB, or a model.

    lora, llama-adapter     RUN/adapter, in PEFT's format
    relora, full            RUN/model, a plain Hugging Face folder; so is every classifier

This file assembles; the loop is that of pretraining.
"""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.adapters.llama_adapter import save_prompts
from relora.adapters.save_load import save_adapter
from relora.config import FinetuneConfig
from relora.data.finetuning.classification import encode_classes, settle_padding
from relora.data.finetuning.instruct import encode, prompts, shown
from relora.data.tokenizer import load_tokenizer, save_tokenizer
from relora.errors import UserError
from relora.files.atomic import write_durably
from relora.inference.decoding import Sampling, continue_prompt
from relora.lowrank import merge
from relora.lowrank.gradient_init import gradient_svd_, weight_gradients
from relora.measure import Evaluation
from relora.model.load import save_model
from relora.recipes.finetuning_inputs import FinetuningInputs, base_folder, gather_finetuning, read_records
from relora.recipes.from_settings import factor_parameters, form_of, schedule_for, settled_lowrank
from relora.recipes.job import Job, RunResult, run_job
from relora.report.html import write_report
from relora.train.optim import check_optimizer
from relora.train.run import Run
from relora.train.step import Batch

MOVES_BASE = ("pissa", "gradient-svd")
"""Beginnings that take from the frozen weight what they put into the factors."""
GRADIENT_BATCHES = 8
"""Micro-batches whose gradient `gradient-svd` begins with (LoRA-GA, arXiv 2407.05000, section 4)."""


def finetune(config: FinetuneConfig, *, fresh: bool = False, strict: bool = False, quiet: bool = False) -> RunResult:
    """Run a configuration to its end, continuing what its run folder holds; see `run_job` for what is raised.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.
    """
    check_optimizer(config.optimizer.name)
    return train_on(config, gather_finetuning(config), fresh=fresh, strict=strict, quiet=quiet)


def train_on(
    config: FinetuneConfig, parts: FinetuningInputs, *, fresh: bool = False, strict: bool = False, quiet: bool = False
) -> RunResult:
    """As `finetune`, with what it gathered first; `parts.model` is the trained one afterwards."""
    return run_job(
        job_of(config, parts),
        lambda run, folder: _finish(config, parts, run, folder),
        fresh=fresh,
        strict=strict,
        quiet=quiet,
    )


def job_of(config: FinetuneConfig, parts: FinetuningInputs) -> Job:
    """What there is to do."""
    model, steps = parts.model, parts.batches.steps_per_epoch
    schedule_for(config, steps)  # refused before anything is written
    moves_base = config.method == "relora" or config.lowrank.init in MOVES_BASE
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.method in ("lora", "relora"):
        trained = factor_parameters(config, model) + (parameters if moves_base else 0)
    return Job(
        config=config,
        device=parts.device,
        model=model,
        write_tokenizer=lambda folder: save_tokenizer(parts.tokenizer, folder),
        schedule_of=lambda one: schedule_for(one, steps),
        lowrank_of=lambda kept: settled_lowrank(config, model, parts.device, kept),
        batch_at=parts.batches.batch,
        place_of=parts.batches.place,
        loss=parts.loss,
        evaluate=lambda trained, each_batch: parts.evaluate(config, trained, each_batch),
        content=parts.content,
        # weights, m and v in fp32, in every checkpoint and in one more; and the model, should it be written
        needed_bytes=trained * 12 * (config.checkpoint.keep_last + 1) + parameters * 4 * _leaves_model(config),
        saves_frozen=config.method in ("lora", "relora") and moves_base,
        initialize=_gradient_svd(config, parts) if config.lowrank.init == "gradient-svd" else None,
        notes=parts.notes,
    )


def show_examples(config: FinetuneConfig, number: int) -> str:
    """The first training examples as the model will see them, for a person."""
    tokenizer = load_tokenizer(str(base_folder(config)), trust_remote_code=config.model.trust_remote_code)
    records, _ = read_records(config)
    data = config.data
    if config.task == "classification":
        settle_padding(tokenizer)
        examples = encode_classes(
            records,
            tokenizer,
            sequence_length=data.sequence_length,
            text_columns=data.text_columns,
            label_column=data.label_column,
        )
        rows = []
        for one in range(min(number, len(examples))):
            label = examples.labels[one].item()
            text = tokenizer.decode(examples.ids[examples.bounds[one] : examples.bounds[one + 1]].tolist())
            rows.append(f"{examples.places[one]}: {examples.names[int(label)] if examples.names else label}\n{text}")
        return "\n\n".join(rows)
    first = list(islice(records, number))
    found = encode(first, tokenizer, form_of(config), sequence_length=data.sequence_length + 1, skip_bad=data.skip_bad)
    return "\n\n".join([str(found), *(shown(example, tokenizer) for example in found.examples)])


def _leaves_model(config: FinetuneConfig) -> bool:
    """Else an adapter."""
    return config.task == "classification" or config.method in ("relora", "full")


def _finish(config: FinetuneConfig, parts: FinetuningInputs, run: Run, folder: Path) -> Evaluation:
    """What was trained, answers to held-out prompts, and the report."""
    model, reporter = parts.model, run.reporter
    if _leaves_model(config):
        merge(model)
        left = save_model(model, folder / "model", parts.tokenizer)
    elif config.method == "lora":
        left = save_adapter(model, folder / "adapter", base=str(parts.base), overwrite=True)
    else:
        shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a shorter run
        left = save_prompts(model, folder / "adapter", base=str(parts.base))
    evaluation = run.evaluate(model, lambda: None)
    if parts.asks:
        _write_answers(config, parts, run.schedule.total_steps, folder)
    figures = {"loss": evaluation.loss, **(evaluation.scores or {"perplexity": evaluation.perplexity})}
    reporter.message(f"held-out {', '.join(f'{name} {figure:.4g}' for name, figure in figures.items())}; {left}")
    try:
        reporter.message(f"report in {write_report(folder)}")
    except UserError as error:  # figures that cannot be read any more: the training is not touched by that
        reporter.warning(f"no report: {error}")
    return evaluation


def _write_answers(config: FinetuneConfig, parts: FinetuningInputs, step: int, folder: Path) -> None:
    """What the trained model answers to held-out prompts, greedily."""
    settings = config.samples
    records = parts.held_out_records[: settings.examples]
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, do_sample=False)
    samples = []
    for prompt in prompts(records, parts.tokenizer, form_of(config), skip_bad=config.data.skip_bad):
        answer = continue_prompt(parts.model, parts.tokenizer, prompt.input_ids, sampling, config.seed)
        samples.append({"step": step, "prompt": answer.prompt, "text": answer.text, "reference": prompt.response})
    write_durably(folder / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def _gradient_svd(config: FinetuneConfig, parts: FinetuningInputs) -> Callable[[nn.Module], None]:
    """Begins the factors along the gradient of the first micro-batches."""

    def mean_loss(batch: Batch) -> Callable[[nn.Module], Tensor]:
        def of(model: nn.Module) -> Tensor:
            loss, number = parts.loss(model, *(tensor.to(parts.device) for tensor in batch))
            return loss / number

        return of

    def initialize(model: nn.Module) -> None:
        size, number = config.batch.micro_sequences, 0
        micro_batches: list[Batch] = []
        while len(micro_batches) < GRADIENT_BATCHES:
            rows = (torch.split(tensor, size) for tensor in parts.batches.batch(number))
            micro_batches += zip(*rows, strict=True)
            number += 1
        gradient_svd_(model, weight_gradients(model, map(mean_loss, micro_batches[:GRADIENT_BATCHES])))

    return initialize
