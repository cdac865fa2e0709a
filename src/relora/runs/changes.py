"""Differences between a run as it began and as it is to be continued.

Each key of the configuration is in one of three classes:

    free       changes nothing that is trained or measured: not mentioned
    allowed    changes what is still to come: one line for each
    refused    makes it another run: named, and nothing is touched
"""

from collections.abc import Iterable
from pathlib import Path

from relora.config import RunConfig, TrainingConfig
from relora.errors import UserError

FREE = ("output_dir", "log", "checkpoint", "samples", "distributed.strategy", "distributed.timeout_seconds")
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
    "distributed.deterministic": "sums are rounded differently",
    "memory": "the same bits, but for compiled blocks",
    "variant": "what it stands for is compared",
    "data.train.path": "the same tokens",
    "data.validation": "the same tokens",
}
"""Keys and sections that may change, with a remark on what the change does (empty: none needed)."""
OTHER_MOMENTS = ("optimizer.factors", "optimizer.matrices")
"""Keys within `ALLOWED` that may not change: the moments of one rule are none for another."""
FIXED = {
    "data": "data: the prepared folders hold other tokens",
    "model": "model.path: its config.json is another",
    "base": "model.path: its weights are others",
}
"""Fingerprints that must stay the same though the configuration does not show them, with the start of the refusal."""
HELD_OUT = "held_out"
"""Setting that says how held-out tokens are chosen in training; checkpoints from before samples do not have it."""
SAMPLE, WHOLE = "systematic sample", "whole"
"""Its values: they are drawn from a larger held-out part, or are all of it. Other samples were drawn in other ways."""
DEFAULT_SETTINGS = {"compile": "none", "frozen": "native", "sums": "in any order", "gradient_sums": "in turn"}
"""Settings of checkpoints that were written before these were recorded."""


def allowed_changes(there: TrainingConfig, here: TrainingConfig, folder: Path) -> list[str]:
    """List the allowed changes from the configuration of a run folder to a new one: a line for each.

    Raises:
        UserError: a refused key differs.
    """
    old, new = flat_settings(there), flat_settings(here)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in differing if not covered_by(key, FREE)]
    # Keys near the top come first: those below may only have been filled in by a method or a variant.
    not_allowed = (key for key in changed if not covered_by(key, ALLOWED) or key in OTHER_MOMENTS)
    refused = sorted(not_allowed, key=lambda key: key.count("."))
    if refused:
        shown = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in refused[:3])
        raise UserError(
            f"output_dir: {folder} holds another run; it differs in {shown}; choose another output_dir, "
            "or --fresh to move that run aside"
        )
    return [f"{key}: {old.get(key)} -> {new.get(key)}{_remark(key)}" for key in changed]


def check_settings(then: dict[str, str | int], now: dict[str, str | int], *, strict: bool) -> list[str]:
    """List changed circumstances: the run goes on, but its last bits are not those of an uninterrupted one.

    Args:
        then, now: settings beside the configuration, as a checkpoint has them and as they are.

    Raises:
        UserError: the prepared data holds other tokens, or the model is another; or with `strict` anything differs.
    """
    other_sample = now.get(HELD_OUT) == SAMPLE and then.get(HELD_OUT) not in (SAMPLE, WHOLE)
    if (
        other_sample and HELD_OUT not in then and "base" in now
    ):  # in fine-tuning the fingerprint did not cover all held-out examples
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
        lines.append(
            "held-out figures before and after do not compare: from here on they are of another sample of the whole"
        )
    return lines


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
