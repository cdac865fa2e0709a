"""Continuing a run: what may have changed since it began, and from which checkpoint it goes on.

Everything here is looked up and refused before anything is written. Each key of the configuration is in one of three
classes:

    free       changes nothing that is trained or measured: not mentioned
    allowed    changes what is still to come: one line for each
    refused    makes it another run: named, and nothing is touched
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from relora.config import RunConfig, TrainingConfig, load_any_config
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.calibrate import from_json, to_json
from relora.lowrank.costs import Rates
from relora.recipes.from_settings import adaptive_of
from relora.runs.settings import is_run
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import Checkpoint
from relora.train.schedule import Schedule
from relora.train.state import numeric_environment

Config = TypeVar("Config", bound=TrainingConfig)

FREE = ("output_dir", "log", "checkpoint", "samples")
"""Keys and sections that may change without a word."""
ALLOWED = {
    "schedule.total_steps": "",
    "schedule.total_tokens": "",
    "schedule.epochs": "",
    "optimizer": "the moments stay",
    "evaluate.every_steps": "",
    "evaluate.tokens": "held-out figures before and after do not compare",
    "non_finite": "",
    "batch.micro_sequences": "sums are rounded, and dropout is drawn, differently",
    "device": "sums are rounded, and dropout is drawn, differently",
    "compile": "sums are rounded, and dropout is drawn, differently",
    "deterministic": "",
    "memory": "the same bits, but for compiled blocks",
    "variant": "what it stands for is compared",
    "data.train.path": "the same tokens",
    "data.validation": "the same tokens",
}
"""Keys and sections that may change, with a remark on what the change does (empty: none needed)."""
FIXED = {
    "data": "data: the prepared folders hold other tokens",
    "model": "model.path: its config.json is another",
    "base": "model.path: its weights are others",
}
"""Fingerprints that must stay the same though the configuration does not show them, with the start of the refusal."""

HELD_OUT = "held_out"
"""Setting that says how held-out tokens are chosen in training; checkpoints from before samples do not have it."""
SAMPLE = "keyed sample"
"""Its value where they are drawn from a larger held-out part."""

DEFAULT_SETTINGS = {"compile": "none", "frozen": "native", "sums": "in any order"}
"""Settings of checkpoints that were written before these were recorded."""


@dataclass(frozen=True)
class Start:
    """The place from which a job trains, and how it computes from there."""

    checkpoint: Checkpoint | None
    """None: from step 0."""
    lowrank: LowRankConfig
    settings: dict[str, str | int]
    """Everything beside the configuration that changes numbers; saved with every checkpoint."""
    warnings: list[str]

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.checkpoint.step if self.checkpoint else 0


def find_start(
    folder: Path,
    checkpoints: Checkpoints,
    config: Config,
    device: torch.device,
    content: Mapping[str, str],
    schedule_of: Callable[[Config], Schedule],
    lowrank_of: Callable[[Rates | None], LowRankConfig],
    *,
    strict: bool,
) -> Start:
    """Find the checkpoint to continue from in a run folder, and check that this configuration continues that run.

    Args:
        content: fingerprints of the data and the model, under keys of `FIXED`, and the setting `HELD_OUT`.
        schedule_of, lowrank_of: see `relora.recipes.job.Job`.
        strict: see `relora.recipes.job.run_job`.

    Raises:
        UserError: the folder holds another run, no sound checkpoint, or one of other data; nothing was written.
    """
    warnings = changes_since(folder, config, schedule_of)
    checkpoint, damaged = newest(checkpoints, strict=strict)
    warnings += damaged
    # A continued run computes by the rates that it was begun with, whatever this machine measures today.
    kept = from_json(str(checkpoint.manifest.settings.get("rates"))) if checkpoint else None
    lowrank = lowrank_of(kept)
    settings = {**numeric_environment(device, config.precision.dtype), **content}
    settings["compile"] = "inductor" if config.compile else "none"
    if device.type == "cuda":
        settings["sums"] = "in one order" if config.deterministic else "in any order"
    settings["frozen"] = lowrank.frozen
    if checkpoint:
        warnings += check_settings(checkpoint.manifest.settings, settings, strict=strict)
    if lowrank.rates:
        settings["rates"] = to_json(lowrank.rates)
    return Start(checkpoint, lowrank, settings, warnings)


def changes_since(folder: Path, config: Config, schedule_of: Callable[[Config], Schedule]) -> list[str]:
    """List the allowed changes between the run in `folder`, if there is one, and `config`: a line for each.

    Raises:
        UserError: a refused key differs, or the run has done more steps than `config` wants.
    """
    if not is_run(folder):
        return []
    there = load_any_config(folder / "config.yaml")
    if type(there) is not type(config):
        raise UserError(f"output_dir: {folder} holds a run of another verb; choose another output_dir")
    old, new = flat_settings(there), flat_settings(config)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in differing if not covered_by(key, FREE)]
    # Keys near the top come first: those below may only have been filled in by a method or a variant.
    refused = sorted((key for key in changed if not covered_by(key, ALLOWED)), key=lambda key: key.count("."))
    if refused:
        shown = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in refused[:3])
        raise UserError(
            f"output_dir: {folder} holds another run; it differs in {shown}; choose another output_dir, "
            "or --fresh to move that run aside"
        )
    done = max(Checkpoints(folder / "checkpoints").steps(), default=0)
    before, now = schedule_of(there), schedule_of(config)
    if now.total_steps < done:
        raise UserError(
            f"schedule: {folder} has done {done} steps, more than the {now.total_steps} asked for; "
            "see `relora export --checkpoint` for an earlier state"
        )
    lines = [f"{key}: {old.get(key)} -> {new.get(key)}{_remark(key)}" for key in changed]
    if before.total_steps != now.total_steps and done:
        lines.append(_new_length(before, now, done, by_itself=adaptive_of(config).watches_loss))
    return lines


def newest(checkpoints: Checkpoints, *, strict: bool) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to continue from (None: there is none yet), and a line for every damaged one passed over.

    Raises:
        UserError: there are checkpoints but none is sound; or there is a model but no checkpoint any more; or with
            `strict` the newest is damaged.
    """
    checkpoint, broken = checkpoints.latest()
    if checkpoint is None:
        finished = checkpoints.folder.with_name("model").exists()
        if broken or finished:
            reason = f"{broken[0]}; no checkpoint in" if broken else "the run has a model, but none of"
            raise UserError(
                f"{reason} {checkpoints.folder} is sound: put a copy of one there, "
                "or --fresh to move the run aside and start over"
            )
        return None, []
    if broken and strict:
        raise UserError(f"{broken[0]}; without --strict the run goes on from step {checkpoint.step}")
    return checkpoint, [f"{line}; an older checkpoint is used" for line in broken]


def check_settings(then: dict[str, str | int], now: dict[str, str | int], *, strict: bool) -> list[str]:
    """List changed circumstances: the run goes on, but its last bits are not those of an uninterrupted one.

    Args:
        then, now: settings beside the configuration, as a checkpoint has them and as they are.

    Raises:
        UserError: the prepared data holds other tokens, or the model is another; or with `strict` anything differs.
    """
    other_sample = now.get(HELD_OUT) == SAMPLE and HELD_OUT not in then
    if other_sample and "base" in now:  # in fine-tuning the fingerprint did not cover all held-out examples
        then = {key: value for key, value in then.items() if key != "data"}
    for key, what in FIXED.items():
        if key in now and then.get(key, now[key]) != now[key]:
            raise UserError(f"{what} than when the run began; put the old one back")
    changed = [
        f"{key} was {then.get(key, 'not noted')}, is {value}"
        for key, value in now.items()
        if key not in (*FIXED, HELD_OUT) and then.get(key, DEFAULT_SETTINGS.get(key)) != value
    ]
    lines = []
    if changed:
        lines.append(f"not bit for bit what an uninterrupted run gives: {'; '.join(changed)}")
    if "data" not in then:
        lines.append("the checkpoint does not say which data it was trained on; that it is the same was not checked")
    if lines and strict:
        raise UserError(f"{lines[0]}; without --strict the run goes on")
    if other_sample:
        lines.append("held-out figures before and after do not compare: from here on they are of a sample of the whole")
    return lines


def _new_length(old: Schedule, new: Schedule, done: int, *, by_itself: bool) -> str:
    """Describe how another total of steps changes the schedule; `by_itself`: the run decides on its restarts."""
    if by_itself:  # The checkpoint holds the restarts so far, and later ones are not known yet.
        old, new, counted = old.decided(None, ()), new.decided(None, ()), "restarts as the run decides"
    else:
        # A restart that the old schedule left out, as too near to its end, is not done later.
        restarts = sum(step < done for step in old.restarts) + sum(step >= done for step in new.restarts)
        counted = f"{restarts} restarts in all instead of {len(old.restarts)}"
    return (
        f"the cosine now ends at step {new.total_steps} instead of {old.total_steps}: at step {done} the learning rate "
        f"goes from {old.lr_factor(min(done, old.total_steps - 1)):.3f} to {new.lr_factor(done):.3f} of its peak; "
        f"{counted}. A run of {new.total_steps} steps from "
        "the start would have had the new rates all along"
    )


def _remark(key: str) -> str:
    """The remark of `ALLOWED` on a changed key, in brackets; empty where there is none."""
    remark = next(remark for name, remark in ALLOWED.items() if covered_by(key, (name,)))
    return f" ({remark})" if remark else ""


def covered_by(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names`, or lies in one of those sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat_settings(config: TrainingConfig) -> dict[str, object]:
    """The settings by dotted key; paths and weights of the training data are separate keys."""
    tree = config.model_dump(mode="json")
    tree["data"]["train"] = {"path": tree["data"]["train"]}
    if isinstance(config, RunConfig):
        sources = config.data.sources
        tree["data"]["train"] = {"path": [s.path for s in sources], "weight": [s.weight for s in sources]}
    return _dotted(tree)


def _dotted(tree: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested sections by dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [_dotted(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}
