"""A run folder read back: what the report draws, whether the run is finished or not.

Files may be missing (a run that has only begun, one without restarts) and figures may be null or damaged; only a run
without a single record is refused. Every figure is checked to be a number here, so that nothing below has to ask.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from relora.errors import UserError
from relora.files.untrusted import YAML_BYTES, inside, parse_yaml, read_json
from relora.report.metrics import Record, number, read_json_lines
from relora.report.spikes import Rise, rises, window_steps

INCIDENT_KINDS = ("skipped", "rewind")
"""Records of numbers that went wrong and were lived with: a step left out, a return to a checkpoint."""


class HeldOut(NamedTuple):
    """The held-out loss after `step` updates."""

    step: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows


@dataclass(frozen=True)
class Segment:
    """A stretch of training between two events: the warm start, one low-rank cycle, a full-rank run."""

    phase: str
    cycle: int
    first: tuple[int, int]
    """(step, tokens) where it begins."""
    last: tuple[int, int]
    before: HeldOut | None
    """The last measurement that does not lie in it."""
    measured: tuple[HeldOut, ...]
    """The measurements in it, in order; the last one closes it."""

    @property
    def after(self) -> HeldOut | None:
        return self.measured[-1] if self.measured else None

    @property
    def lowest(self) -> HeldOut | None:
        return min(self.measured, key=lambda point: point.loss, default=None)


@dataclass(frozen=True)
class History:
    """Everything that the files of one run say."""

    name: str
    train: list[Record]
    evaluations: list[Record]
    incidents: list[Record]
    """Skipped steps and rewinds, in order."""
    restarts: list[Record]
    rises: list[Rise]
    """How the training loss took the switch to low rank and every restart, where enough of it is logged."""
    held_out: list[HeldOut]
    """One point per step, from the evaluations and from the measurements around restarts."""
    segments: list[Segment]
    samples: list[Record]
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def last(self) -> tuple[int, int]:
        """(step, tokens) of the latest record."""
        records = self.train + self.evaluations + self.incidents
        return max((record["step"], record["tokens"]) for record in records)

    @property
    def step_seconds(self) -> float:
        """Seconds of all training steps, without evaluations, restarts, checkpoints and the start.

        The `step_seconds` of a record is the mean over the steps since the record before it.
        """
        total, done = 0.0, 0
        for record in self.train:
            total += (record["step"] - done) * (number(record, "step_seconds") or 0.0)
            done = record["step"]
        return total

    @property
    def seconds(self) -> float:
        """Seconds of training steps, evaluations and restarts; pauses between two parts of a run do not count."""
        other = sum(number(record, "seconds") or 0.0 for record in self.evaluations + self.restarts)
        return self.step_seconds + other

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, None where it is not given: `setting("lowrank", "r")`."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_history(run_folder: Path) -> History:
    """Raises `UserError` for a folder without records and for a file that cannot be read."""
    metrics = run_folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{metrics}: no such file; give the folder of a run that has begun to train")
    records: list[Record] = [record for record in read_json_lines(metrics) if has_place(record)]
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    incidents = [record for record in records if record.get("kind") in INCIDENT_KINDS]
    if not train and not evaluations and not incidents:
        raise UserError(f"{metrics}: holds no records yet; wait for the first logged step")
    restarts_file = run_folder / "restarts.jsonl"
    events = read_json_lines(restarts_file) if restarts_file.exists() else []
    restarts: list[Record] = [record for record in events if has_place(record)]
    held_out = _held_out(evaluations, restarts)
    config_text, config = read_config(run_folder)
    environment = _read_json(run_folder, "environment.json")
    samples = _read_json(run_folder, "samples.json")
    return History(
        name=run_folder.resolve().name,
        train=train,
        evaluations=evaluations,
        incidents=incidents,
        restarts=restarts,
        rises=rises(records, restarts, window_steps(config)),
        held_out=held_out,
        segments=list(_segments(train, restarts, held_out)),
        samples=[item for item in samples if isinstance(item, dict)] if isinstance(samples, list) else [],
        config_text=config_text,
        config=config,
        environment=environment if isinstance(environment, dict) else {},
    )


def has_place(record: Record) -> bool:
    """Whether a record says where it belongs; one that does not is damaged."""
    return all(isinstance(record.get(key), int) for key in ("step", "tokens", "cycle"))


def _held_out(evaluations: list[Record], restarts: list[Record]) -> list[HeldOut]:
    losses = [(record, number(record, "validation_loss")) for record in evaluations]
    losses += [(record, number(record, "loss_after")) for record in restarts]
    points = {
        record["step"]: HeldOut(record["step"], record["tokens"], loss) for record, loss in losses if loss is not None
    }
    return sorted(points.values())


def _segments(train: list[Record], restarts: list[Record], held_out: list[HeldOut]) -> Iterator[Segment]:
    """A segment ends where the next restart says, else (the end of the warm start) at its last logged step."""
    began = {record["cycle"]: (record["step"], record["tokens"]) for record in restarts}
    groups = [
        (str(phase), cycle, list(records))
        for (phase, cycle), records in groupby(train, key=lambda record: (record.get("phase"), record["cycle"]))
    ]
    first = (0, 0)
    for index, (phase, cycle, records) in enumerate(groups):
        last = (records[-1]["step"], records[-1]["tokens"])
        if index + 1 < len(groups):
            last = began.get(groups[index + 1][1], last)
        elif held_out:
            last = max(last, (held_out[-1].step, held_out[-1].tokens))
        yield Segment(
            phase,
            cycle,
            first,
            last,
            before=next((point for point in reversed(held_out) if point.step <= first[0]), None),
            measured=tuple(point for point in held_out if first[0] < point.step <= last[0]),
        )
        first = last


def read_config(run_folder: Path) -> tuple[str, Mapping[str, Any]]:
    """The configuration of a run as text and as settings; empty where there is none, or none that can be read."""
    try:
        text = inside(run_folder, "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        tree = parse_yaml(text, "config.yaml") if len(text) <= YAML_BYTES else None
    except UserError:
        tree = None  # shown as it is
    return text, tree if isinstance(tree, dict) else {}


def _read_json(run_folder: Path, name: str) -> Any:
    path = inside(run_folder, name)
    return read_json(path) if path.exists() else None
