"""The runs of a comparison of pretraining methods: each in a process of its own, several side by side, none twice.

    RUNS/lora-warm-lr0.004-1000steps-seed0-1f3a9c2e/      a run folder, and in it
        outcome.json                                      the result of the run, written when it has ended

The last part of a folder's name is a hash of every setting that decides the run's numbers, and of the tokens. So a
comparison finds a run that an earlier one made, and never mistakes one run for another. An interrupted run is
continued. A run whose numbers stop being finite has an outcome, too.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from relora.config import RunConfig
from relora.data.pretraining.shards import PreparedFolder
from relora.errors import Diverged, UserError
from relora.experiments.results import PretrainingOutcome
from relora.files.atomic import write_json
from relora.files.untrusted import read_json
from relora.processes import RUNS_STOPPED, Call, run_in_processes
from relora.recipes.pretrain import pretrain
from relora.report.history import read_history
from relora.report.metrics import number
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS

OUTCOME = "outcome.json"
_WITHOUT_EFFECT = {"output_dir", "log", "checkpoint", "samples"}
"""Sections of the configuration that change none of a run's numbers."""
_LARGE_FILES = ("checkpoints", "model", "report.html")
"""Parts of a finished run that are deleted unless asked to keep; `relora report` can write the page again."""


def with_run_folder(config: RunConfig, runs: Path, name: str) -> RunConfig:
    """Return the configuration with its run folder inside `runs`; the folder's name begins with `name`."""
    folder = runs / f"{name}-{config.total_steps}steps-seed{config.seed}-{_fingerprint(config)[:8]}"
    return config.model_copy(update={"output_dir": str(folder)})


def run_all(
    configs: Sequence[RunConfig], *, jobs: int, keep: bool, on_outcome: Callable[[int, PretrainingOutcome], None]
) -> list[PretrainingOutcome]:
    """Return the outcomes of all runs in their order, making or continuing those that have none, `jobs` at a time.

    Args:
        keep: leave checkpoints, models and reports in the run folders.
        on_outcome: called with the index and the outcome of every run that was made, as soon as it ends.

    Raises:
        UserError, RunStopped: a run ended with this error; numbers that are not finite are an outcome instead.
        Interrupted: a signal arrived. In each of these cases the runs under way stop with a checkpoint.
    """
    saved = [_saved_outcome(config) for config in configs]
    missing = [index for index, outcome in enumerate(saved) if outcome is None]
    made = run_in_processes(
        [Call(configs[index].output_dir, train_and_record, (configs[index], keep)) for index in missing],
        jobs=jobs,
        on_result=lambda position, outcome: on_outcome(missing[position], outcome),
        when_stopped=RUNS_STOPPED,
    )
    made_now = dict(zip(missing, made, strict=True))
    return [outcome or made_now[index] for index, outcome in enumerate(saved)]


def train_and_record(config: RunConfig, keep: bool) -> PretrainingOutcome:
    """Train a run to its end and write outcome.json; delete the large files of the run unless they are to be kept."""
    folder = Path(config.output_dir)
    outcome = _train(config)
    write_json(folder / OUTCOME, asdict(outcome))
    if not keep:
        for name in _LARGE_FILES:
            _delete(folder / name)
    return outcome


def _train(config: RunConfig) -> PretrainingOutcome:
    """Train a run to its end, or until its numbers stop being finite."""
    try:
        result = pretrain(config, quiet=True)
    except Diverged as error:
        print(f"{config.output_dir}: {error}", file=sys.stderr)
        result = None
    history = read_history(Path(config.output_dir))
    evaluation = result.evaluation if result else None
    if evaluation and not math.isfinite(evaluation.loss):
        evaluation = None
    steps, tokens = history.last
    seconds = history.step_seconds
    return PretrainingOutcome(
        folder=config.output_dir,
        diverged=evaluation is None,
        seed=config.seed,
        lr=config.optimizer.lr,
        lowrank_lr=None if config.method == "full" else config.lowrank_lr,
        loss=evaluation.loss if evaluation else None,
        perplexity=evaluation.perplexity if evaluation else None,
        held_out_tokens=evaluation.tokens if evaluation else 0,
        steps=steps,
        tokens=tokens,
        trainable_parameters=result.trainable_parameters if result else 0,
        parameters=int(number(history.environment, "parameters") or 0),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory_bytes=int(max((number(record, "peak_memory_bytes") or 0 for record in history.train), default=0)),
        memory=result.memory if result else None,
    )


def _saved_outcome(config: RunConfig) -> PretrainingOutcome | None:
    """Read the outcome of a run from its folder; None if the run has not ended.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(config.output_dir) / OUTCOME
    if not file.is_file():
        return None
    try:
        outcome = TypeAdapter(PretrainingOutcome).validate_python(read_json(file))
    except ValidationError:
        raise UserError(f"{file}: damaged; delete its folder, and the run is made again") from None
    return replace(outcome, folder=config.output_dir)  # the folder may have been moved since the run


def _fingerprint(config: RunConfig) -> str:
    """Hash every setting that decides the numbers of a run, and its tokens; settings its method ignores are left out.

    A full-rank run ignores all settings of factors, so comparisons that differ in these share their full-rank runs.
    """
    tree: dict[str, Any] = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    tree["measured"] = "whole"  # earlier versions measured the first `evaluate.tokens` held-out tokens
    tree["data"] |= {
        "train": [(PreparedFolder.open(source.path).content, source.weight) for source in config.data.sources],
        "validation": PreparedFolder.open(config.data.validation).content,
    }
    if config.method == "full":
        for key in ("variant", "lowrank", "warm_start", "restart"):
            del tree[key]
        if config.optimizer.matrix_lr is not None:
            tree["matrices"] = config.lowrank.target_modules
        of_factors = ("factors", "lowrank_lr", "lowrank_b_lr_ratio")
        tree["optimizer"] = {key: value for key, value in tree["optimizer"].items() if key not in of_factors}
    if config.optimizer.name not in PROJECTED_OPTIMIZERS:
        del tree["optimizer"]["projection"]
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def _delete(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
