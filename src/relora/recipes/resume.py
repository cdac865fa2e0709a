"""Continuing a run: what may have changed since, what follows from it, and from which checkpoint it goes on.

Every key of the configuration is in one of three classes:

    free       changes nothing that is trained or measured: not spoken of
    allowed    changes what comes; said in one line each
    refused    makes another run of it: named, and nothing is touched
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from relora.config import RunConfig, TrainingConfig, load_any_config
from relora.errors import UserError
from relora.recipes.from_settings import adaptive_of
from relora.train.checkpoint import Checkpoint, Checkpoints
from relora.train.schedule import Schedule

Config = TypeVar("Config", bound=TrainingConfig)

FREE = ("output_dir", "log", "checkpoint", "samples")
"""Keys and sections."""
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
"""Keys and sections, with what is to be said of a change."""
FIXED = {
    "data": "data: the prepared folders hold other tokens",
    "model": "model.path: its config.json is another",
    "base": "model.path: its weights are others",
}
"""What must be what it was, though the configuration cannot tell, with the line to be said otherwise."""

UNNOTED = {"compile": "none", "frozen": "native", "sums": "in any order"}
"""What was so before it was noted."""


def changes_since(folder: Path, config: Config, schedule_of: Callable[[Config], Schedule]) -> list[str]:
    """What differs between the run in `folder`, if there is one, and `config`: a line for every allowed change.

    Raises:
        UserError: a key of the third class differs, or the run is longer already than `config` wants it.
    """
    if not (folder / "config.yaml").is_file():
        return []
    there = load_any_config(folder / "config.yaml")
    if type(there) is not type(config):
        raise UserError(f"output_dir: {folder} holds a run of another verb; choose another output_dir")
    old, new = _flat(there), _flat(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _in(key, FREE)]
    # what a method or a variant fills in comes after what was written
    refused = sorted((key for key in changed if not _in(key, ALLOWED)), key=lambda key: key.count("."))
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
        lines.append(_longer(before, now, done, by_itself=adaptive_of(config).watches_loss))
    return lines


def newest(checkpoints: Checkpoints, *, strict: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None where there is none yet, and a line for every damaged one passed over.

    Raises:
        UserError: there are checkpoints but none is sound, or none any more though the run has a model, or with
            `strict` the newest is not sound.
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
    """Lines on what changed around the run: it goes on, but its last bits are not those of an uninterrupted one.

    Raises:
        UserError: the prepared data holds other tokens, or the model is another; or with `strict` anything differs.
    """
    for key, what in FIXED.items():
        if key in now and then.get(key, now[key]) != now[key]:
            raise UserError(f"{what} than when the run began; put the old one back")
    changed = [
        f"{key} was {then.get(key, 'not noted')}, is {value}"
        for key, value in now.items()
        if key not in FIXED and then.get(key, UNNOTED.get(key)) != value
    ]
    lines = []
    if changed:
        lines.append(f"not bit for bit what an uninterrupted run gives: {'; '.join(changed)}")
    if "data" not in then:
        lines.append("the checkpoint does not say which data it was trained on; that it is the same was not checked")
    if lines and strict:
        raise UserError(f"{lines[0]}; without --strict the run goes on")
    return lines


def _longer(old: Schedule, new: Schedule, done: int, *, by_itself: bool) -> str:
    if by_itself:  # the checkpoint knows when it restarted, and the run when it will
        old, new, counted = old.decided(None, ()), new.decided(None, ()), "restarts as the run decides"
    else:
        # one that the old schedule left out, for being too near to its end, is not made up for
        restarts = sum(step < done for step in old.restarts) + sum(step >= done for step in new.restarts)
        counted = f"{restarts} restarts in all instead of {len(old.restarts)}"
    return (
        f"the cosine now ends at step {new.total_steps} instead of {old.total_steps}: at step {done} the learning rate "
        f"goes from {old.lr_factor(min(done, old.total_steps - 1)):.3f} to {new.lr_factor(done):.3f} of its peak; "
        f"{counted}. A run of {new.total_steps} steps from "
        "the start would have had the new rates all along"
    )


def _remark(key: str) -> str:
    remark = next(remark for name, remark in ALLOWED.items() if _in(key, (name,)))
    return f" ({remark})" if remark else ""


def _in(key: str, names: Sequence[str] | dict[str, str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(config: TrainingConfig) -> dict[str, object]:
    """The settings as dotted keys, with paths and weights of the training data apart."""
    tree = config.model_dump(mode="json")
    tree["data"]["train"] = {"path": tree["data"]["train"]}
    if isinstance(config, RunConfig):
        sources = config.data.sources
        tree["data"]["train"] = {"path": [s.path for s in sources], "weight": [s.weight for s in sources]}
    return _dotted(tree)


def _dotted(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [_dotted(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}
