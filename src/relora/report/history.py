"""History of a run, read from its folder for the report, whether the run is finished or not.

Files may be missing (the run has only begun, or has no restarts), and figures may be null or damaged; only a folder
without any record is refused. Records without integers for step, tokens and cycle are dropped here, so that the code
that draws can rely on these three.
"""

import math
from bisect import bisect_right
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
"""Kinds of the records of incidents, i.e. of a non-finite loss or gradient: a skipped step, a rewind."""


class HeldOut(NamedTuple):
    """Held-out loss (nats per token) after `step` optimizer steps."""

    step: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return exp(loss), of at most 700: exp(710) overflows."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Segment:
    """Part of a run between two boundaries: the warm start, low-rank cycles, or a whole full-rank run."""

    phase: str
    cycle: int
    """Number of its cycle; of its first one, where restarts are so frequent that only some are measured."""
    last_cycle: int
    first: tuple[int, int]
    """(step, tokens) at its beginning."""
    last: tuple[int, int]
    """(step, tokens) at its end."""
    before: HeldOut | None
    """Last held-out measurement at or before its beginning."""
    measured: tuple[HeldOut, ...]
    """Held-out measurements after its beginning, in order, up to and including its end."""

    @property
    def after(self) -> HeldOut | None:
        """Last held-out measurement of the segment."""
        return self.measured[-1] if self.measured else None

    @property
    def lowest(self) -> HeldOut | None:
        """Held-out measurement of the segment with the lowest loss."""
        return min(self.measured, key=lambda point: point.loss, default=None)


@dataclass(frozen=True)
class History:
    """Content of the files of one run."""

    name: str
    train: list[Record]
    evaluations: list[Record]
    """Held-out measurements in training, which may be of a sample."""
    final: Record | None
    """Measurement of the result on the whole held-out part; None in a run that is not finished."""
    incidents: list[Record]
    """Records of skipped steps and rewinds, in order."""
    restarts: list[Record]
    rises: list[Rise]
    """Rise of the training loss after the switch and after every restart, where enough losses are logged."""
    held_out: list[HeldOut]
    """Held-out measurements, one per step: evaluations and the measurements after restarts."""
    segments: list[Segment]
    samples: list[Record]
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def measured_restarts(self) -> list[Record]:
        """Restarts with a held-out loss on both sides: all, unless they are frequent; a page tells of these alone."""
        return _measured(self.restarts)

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
        measured = self.evaluations + ([] if self.final is None else [self.final])
        return self.step_seconds + sum(number(record, "seconds") or 0.0 for record in measured + self.restarts)

    @property
    def is_sampled(self) -> bool:
        """Whether held-out measurements in training were of a sample."""
        return any(record.get("sample") is True for record in self.evaluations)

    def setting(self, *keys: str) -> Any:
        """Return a value of the configuration, e.g. `setting("lowrank", "r")`; None where it is not given."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_history(run_folder: Path) -> History:
    """Read the files of a run folder.

    Raises:
        UserError: the folder has no records, or a file cannot be read.
    """
    metrics = run_folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{metrics}: no such file; give the folder of a run that has begun to train")
    records: list[Record] = [record for record in read_json_lines(metrics) if has_position(record)]
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    finals = [record for record in records if record.get("kind") == "final"]
    incidents = [record for record in records if record.get("kind") in INCIDENT_KINDS]
    if not train and not evaluations and not incidents:
        raise UserError(f"{metrics}: holds no records yet; wait for the first logged step")
    restarts_file = run_folder / "restarts.jsonl"
    events = read_json_lines(restarts_file) if restarts_file.exists() else []
    restarts: list[Record] = [record for record in events if has_position(record)]
    held_out = _held_out(evaluations, restarts)
    config_text, config = read_config(run_folder)
    environment = _read_json(run_folder, "environment.json")
    samples = _read_json(run_folder, "samples.json")
    return History(
        name=run_folder.resolve().name,
        train=train,
        evaluations=evaluations,
        final=finals[-1] if finals else None,
        incidents=incidents,
        restarts=restarts,
        rises=rises(records, restarts, window_steps(config)),
        held_out=held_out,
        segments=list(_segments(train, _measured(restarts), held_out)),
        samples=[item for item in samples if isinstance(item, dict)] if isinstance(samples, list) else [],
        config_text=config_text,
        config=config,
        environment=environment if isinstance(environment, dict) else {},
    )


def has_position(record: Record) -> bool:
    """Whether a record has integers for step, tokens and cycle; one without them is damaged."""
    return all(isinstance(record.get(key), int) for key in ("step", "tokens", "cycle"))


def _held_out(evaluations: list[Record], restarts: list[Record]) -> list[HeldOut]:
    """Collect the held-out measurements in order; at a restart, the one after it replaces the one before it."""
    losses = [(record, number(record, "validation_loss")) for record in evaluations]
    losses += [(record, number(record, "loss_after")) for record in restarts]
    points = {
        record["step"]: HeldOut(record["step"], record["tokens"], loss) for record, loss in losses if loss is not None
    }
    return sorted(points.values())


def _measured(restarts: list[Record]) -> list[Record]:
    """Return the restarts that have a held-out loss; all, if none has."""
    return [restart for restart in restarts if number(restart, "loss_before") is not None] or restarts


def _segments(train: list[Record], restarts: list[Record], held_out: list[HeldOut]) -> Iterator[Segment]:
    """Divide a run at its boundaries; segments are found by the phase and cycle of the logged steps.

    Cycles that no restart in `restarts` begins belong to the segment before them.
    A segment ends at the step of the restart that begins the next cycle. The warm start, which no restart follows, ends
    at its last logged step, and the last segment at the last logged step or measurement.
    """
    began = {record["cycle"]: (record["step"], record["tokens"]) for record in restarts}
    starts = sorted({0, *began})

    def place(record: Record) -> tuple[str, int]:
        return str(record.get("phase")), starts[bisect_right(starts, record["cycle"]) - 1]

    groups = [(phase, cycle, list(records)) for (phase, cycle), records in groupby(train, key=place)]
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
            records[-1]["cycle"],
            first,
            last,
            before=next((point for point in reversed(held_out) if point.step <= first[0]), None),
            measured=tuple(point for point in held_out if first[0] < point.step <= last[0]),
        )
        first = last


def read_config(run_folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the configuration of a run as text and as settings; both empty where it is missing.

    Settings are empty, and the text is not, where the text is not a YAML mapping of permitted size.
    """
    try:
        text = inside(run_folder, "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        tree = parse_yaml(text, "config.yaml") if len(text) <= YAML_BYTES else None
    except UserError:
        tree = None  # the report still shows the text
    return text, tree if isinstance(tree, dict) else {}


def _read_json(run_folder: Path, name: str) -> Any:
    """Read a JSON file of the run folder; None where it is missing."""
    path = inside(run_folder, name)
    return read_json(path) if path.exists() else None
