"""The runs of a comparison of pretraining methods: each in a process of its own, several side by side, none twice.

    RUNS/lora-warm-lr0.004-1000steps-seed0-1f3a9c2e/      a run folder, and in it
        outcome.json                                      the result of the run, written when it has ended
        outcome-250.json                                  what a search has measured at step 250, on the way there

The last part of a folder's name is a hash of every setting that decides the run's numbers, and of the tokens. So a
comparison finds a run that an earlier one made, and never mistakes one run for another. An interrupted run is
continued, and so is one that a search has stopped on its way and lets go on. A run whose numbers stop being finite has
an outcome, too.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from relora.config import RunConfig
from relora.data.pretraining.shards import PreparedFolder
from relora.errors import UserError
from relora.experiments.parts import CHECKPOINTS, clear, step_of, train_part
from relora.experiments.results import PretrainingOutcome
from relora.files.atomic import write_json
from relora.files.untrusted import read_json
from relora.processes import RUNS_STOPPED, Call, run_in_processes
from relora.report.metrics import number
from relora.runs.folder import is_being_written
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS

OUTCOME = "outcome.json"
_WITHOUT_EFFECT = {"output_dir", "log", "checkpoint", "samples"}
"""Sections of the configuration that change none of a run's numbers."""
_LARGE_FILES = (CHECKPOINTS, "model", "report.html")
"""Parts of a finished run that are deleted unless asked to keep; `relora report` can write the page again."""


def with_run_folder(config: RunConfig, runs: Path, name: str) -> RunConfig:
    """Return the configuration with its run folder inside `runs`; the folder's name begins with `name`."""
    folder = runs / f"{name}-{config.total_steps}steps-seed{config.seed}-{_fingerprint(config)[:8]}"
    return config.model_copy(update={"output_dir": str(folder)})


def run_all(
    asked: Sequence[tuple[RunConfig, float]],
    *,
    jobs: int,
    keep: bool,
    on_outcome: Callable[[int, PretrainingOutcome], None],
) -> list[PretrainingOutcome]:
    """Return the outcomes of all runs in their order, making or continuing those that have none, `jobs` at a time.

    Args:
        asked: the run, and the share of it after its warm start at which it is to be measured; 1 for its end.
        keep: leave checkpoints, models and reports in the run folders.
        on_outcome: called with the index and the outcome of every run that was made, as soon as it ends.

    Raises:
        UserError, RunStopped: a run ended with this error; numbers that are not finite are an outcome instead.
        Interrupted: a signal arrived. In each of these cases the runs under way stop with a checkpoint.
    """
    saved = [_saved_outcome(config, share) for config, share in asked]
    missing = [index for index, outcome in enumerate(saved) if outcome is None]
    made = run_in_processes(
        [Call(asked[index][0].output_dir, train_and_record, (*asked[index], keep)) for index in missing],
        jobs=jobs,
        on_result=lambda position, outcome: on_outcome(missing[position], outcome),
        when_stopped=RUNS_STOPPED,
    )
    made_now = dict(zip(missing, made, strict=True))
    return [outcome or made_now[index] for index, outcome in enumerate(saved)]


def end_of(config: RunConfig, share: float) -> int:
    """Return the step at which a share of a run ends. It is a share of what follows the warm start.

    Within the warm start nothing of the factors has trained, and runs with other rates of these are all alike.
    """
    return step_of(share, config.total_steps, first=_warm_start(config)) or config.total_steps


def drop_checkpoints(configs: Iterable[RunConfig]) -> None:
    """Delete the checkpoints of runs that a search has stopped on their way and does not let go on."""
    for config in configs:
        folder = Path(config.output_dir)
        if not is_being_written(folder):
            clear(folder, CHECKPOINTS)


def train_and_record(config: RunConfig, share: float, keep: bool) -> PretrainingOutcome:
    """Take a run to a share of it and write the outcome there; delete large files of an ended run unless kept."""
    outcome = _outcome_at(config, share)
    write_json(_outcome_file(config, share), asdict(outcome))
    if share >= 1 and not keep:
        clear(Path(config.output_dir), *_LARGE_FILES)
    return outcome


def _outcome_at(config: RunConfig, share: float) -> PretrainingOutcome:
    """Train a run to a share of it, or until its numbers stop being finite."""
    part = train_part(config, share, first=_warm_start(config))
    result, history = part.result, part.history
    steps, tokens = history.last
    seconds = history.step_seconds
    return PretrainingOutcome(
        folder=config.output_dir,
        diverged=result is None,
        seed=config.seed,
        lr=config.optimizer.lr,
        lowrank_lr=None if config.method == "full" else config.lowrank_lr,
        loss=result.evaluation.loss if result else None,
        perplexity=result.evaluation.perplexity if result else None,
        held_out_tokens=result.evaluation.tokens if result else 0,
        steps=steps,
        tokens=tokens,
        trainable_parameters=result.trainable_parameters if result else 0,
        parameters=int(number(history.environment, "parameters") or 0),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory_bytes=int(max((number(record, "peak_memory_bytes") or 0 for record in history.train), default=0)),
        memory=result.memory if result else None,
    )


def _warm_start(config: RunConfig) -> int:
    """Return the number of steps before the factors train; 0 for a full-rank run."""
    return 0 if config.method == "full" else config.warm_start.steps


def _outcome_file(config: RunConfig, share: float) -> Path:
    """Return the file that holds, or will hold, the outcome of a run at a share of it."""
    name = OUTCOME if share >= 1 else f"outcome-{end_of(config, share)}.json"
    return Path(config.output_dir) / name


def _saved_outcome(config: RunConfig, share: float) -> PretrainingOutcome | None:
    """Read the outcome of a run from its folder; None if the run has not come so far.

    Raises:
        UserError: the file is damaged.
    """
    file = _outcome_file(config, share)
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
