"""A whole search: from a configuration and a space to a study in a folder, and what is written about it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from relora.config import FinetuneConfig, RunConfig
from relora.data.pretraining.shards import PreparedFolder
from relora.errors import Interrupted, UserError
from relora.experiments.tune.draws import Base
from relora.experiments.tune.limits import Limits, check_limits
from relora.experiments.tune.output import Result, write_files
from relora.experiments.tune.sampler import SAMPLERS
from relora.experiments.tune.search import Budget, Plan, Search
from relora.experiments.tune.spaces import Config, read_space
from relora.experiments.tune.standing import best_trials
from relora.experiments.tune.storage import storage_errors
from relora.experiments.tune.study import Study
from relora.files.locks import FileLock
from relora.planning.model_shape import with_settled_dtype
from relora.recipes.finetuning_inputs import base_folder, read_records
from relora.runs.changes import flat_settings
from relora.runs.fingerprints import file_digest, fingerprint_of
from relora.runs.settings import is_run

_WITHOUT_EFFECT = ("output_dir", "device", "log", "checkpoint", "samples")
"""Sections of the configuration that change none of a trial's numbers."""
OBJECTIVES = {"loss": "loss", "memory": "peak_bytes", "adapter": "adapter_bytes", "seconds": "seconds"}
"""Name of an objective of a Pareto front -> figure of a trial."""


def tune(
    path: Path,
    overrides: Sequence[str],
    *,
    space: Path | None,
    storage: str | None,
    budget: Budget,
    limits: Limits,
    rungs: tuple[float, ...],
    sampler: str,
    jobs: int,
    objectives: Sequence[str] = ("loss",),
    device: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Result:
    """Search the settings of a configuration, or join a search; write best.yaml, the table and the page of the study.

    Args:
        path, overrides: the configuration; its `output_dir` is the folder of the study.
        space: file of the space; None for the built-in one.
        storage: see `relora.experiments.tune.storage.open_storage`.
        objectives: names of `OBJECTIVES` among which a Pareto front is shown; the search itself follows the loss.
        device: device of this worker; None for the configured one.
        tell: called with a line for each part of a trial that ends.

    Raises:
        UserError: a setting that cannot be used; nothing has been trained then.
        Interrupted: a signal arrived; the same command continues.
    """
    _check(budget, sampler, jobs, objectives)
    base = _base_of(path, overrides, device)
    config = base.with_values({})
    found = read_space(space, config)
    folder = Path(config.output_dir)
    if is_run(folder):
        raise UserError(f"output_dir: {folder} holds a run; give the search a folder of its own")
    check_limits(limits, config)
    purpose = {
        "configuration": _flat(config),
        "data": {"fingerprint": data_fingerprint(config)},
        "space": {key: json.dumps(one) for key, one in found.as_tree().items()},
        "search": {"rungs": list(rungs)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "study.lock"):
        study = Study(folder, storage, purpose)
    plan = Plan(
        base=base, config=config, space=found, budget=budget, limits=limits, rungs=rungs, sampler=sampler, jobs=jobs
    )
    search = Search(plan, study, tell)

    def result() -> Result:
        trials = study.trials()
        return Result(folder, path, tuple(overrides), base, config, found, rungs, trials, tuple(objectives))

    with closing(study), storage_errors():
        try:
            search.run()
        except Interrupted:
            if best_trials(study.trials()):
                write_files(result(), study)
            raise
        ended = result()
        if not best_trials(ended.trials):
            reasons = [trial.reason for trial in ended.trials if trial.reason]
            raise UserError(
                f"{folder}: no trial has a finite loss; {reasons[-1] if reasons else 'all of them diverged'}"
            )
        write_files(ended, study)
    return ended


def _base_of(path: Path, overrides: Sequence[str], device: str | None) -> Base:
    """Return what all trials have in common: one dtype, too, whatever each of them would take."""
    base = Base(path, (*overrides, *(() if device is None else (f"device={device}",))))
    dtype = with_settled_dtype(base.with_values({})).precision.dtype
    return Base(path, (*base.overrides, f"precision.dtype={dtype}"))


def data_fingerprint(config: Config) -> str:
    """Hash what the configuration only points at: tokens, or records and the base model."""
    if isinstance(config, RunConfig):
        folders = [*(source.path for source in config.data.sources), config.data.validation]
        return fingerprint_of(*(PreparedFolder.open(folder).content.encode() for folder in folders))
    assert isinstance(config, FinetuneConfig)
    train, held_out, _ = read_records(config)
    records = hashlib.blake2b(json.dumps([train, held_out], default=str).encode()).digest()
    base = base_folder(config)
    return fingerprint_of(records, *(file_digest(file) for file in sorted(base.glob("*.safetensors"))))


def _check(budget: Budget, sampler: str, jobs: int, objectives: Sequence[str]) -> None:
    """Refuse options that mean nothing."""
    if budget.trials is None and budget.hours is None and budget.tokens is None:
        raise UserError("tune: how much may it do? give --trials N, --hours H or --tokens T")
    counts = {
        "--trials": budget.trials,
        "--hours": budget.hours,
        "--tokens": budget.tokens,
        "--seeds": budget.seeds,
        "--finalists": budget.finalists,
        "--jobs": jobs,
    }
    for option, value in counts.items():
        if value is not None and not value > 0:
            raise UserError(f"{option} {value:g}: must be above 0")
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler}: is none of {', '.join(SAMPLERS)}")
    for name in objectives:
        if name not in OBJECTIVES:
            raise UserError(f"--objectives: `{name}` is none of {', '.join(OBJECTIVES)}")
    if "loss" not in objectives:
        raise UserError("--objectives: `loss` must be among them; the search follows it")


def _flat(config: Config) -> Mapping[str, Any]:
    """Return the settings of a configuration that decide a trial's numbers, by dotted key."""
    flat = flat_settings(config)
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in (*_WITHOUT_EFFECT, "data.train.path"))
        and key not in ("data.validation", "model.path")
    }
