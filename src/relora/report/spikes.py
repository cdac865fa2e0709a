"""How the training loss takes a boundary, i.e. a restart or the switch to low rank: from the logged losses alone.

    before           mean of the logged losses in a window before the boundary
    peak             highest logged loss in a window as long after it
    rise             peak - before
    noise            spread of single losses before it: sqrt(mean of the squared successive differences / 2)
    recovered_after  steps to the first logged step, from the peak on, where the mean of the last 5 is at most `before`

The window is twice `restart.warmup_steps` long, at least ten logging intervals, and ends at the next boundary.

A logged loss is that of one batch, so the highest of several lies above their mean without any spike. A rise counts as
a spike beyond 4 times the noise. Of boundaries where nothing happens, with independent normal losses, that calls 6%
spikes with 5 losses on either side, 3% with 10, 1% with 20 to 100. Successive differences (von Neumann 1941) do not
take the slope of a falling loss for noise, as a standard deviation would.

All is a function of metrics.jsonl, restarts.jsonl and config.yaml, so a run that was killed and continued tells the
same. The price: a spike that lives between two logged steps is not seen.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from relora.report.metrics import Record, number

NOISE_FACTOR = 4.0
"""A rise beyond this many times the noise is a spike."""
FEWEST_BEFORE = 5
"""With fewer logged losses before a boundary the noise is unknown, and nothing is measured."""
RUNNING_RECORDS = 5
"""Logged losses in the running mean that says when the loss is back."""
WINDOW_RECORDS = 10
"""A window is at least as many logging intervals long."""

Loss = tuple[int, float]
"""(step, training loss), as logged."""


@dataclass(frozen=True)
class Boundary:
    """Where the loss may jump: after `step` updates, `cycle` begins; cycle 0 begins with the switch to low rank."""

    step: int
    cycle: int

    @property
    def name(self) -> str:
        return "restart" if self.cycle else "switch to low rank"


@dataclass(frozen=True)
class Rise:
    """What the training loss did after one boundary, in nats per token; `recovered_after` None: not back yet."""

    boundary: Boundary
    before: float
    peak: float
    peak_step: int
    noise: float
    recovered_after: int | None

    @property
    def rise(self) -> float:
        return self.peak - self.before

    @property
    def is_spike(self) -> bool:
        return self.rise > NOISE_FACTOR * self.noise


def window_steps(config: Mapping[str, Any]) -> int:
    """Steps on either side of a boundary that are compared, of a run's configuration as it stands in config.yaml."""
    warmup, every = _setting(config, "restart", "warmup_steps"), _setting(config, "log", "every_steps")
    return max(2 * warmup, WINDOW_RECORDS * max(every, 1))


def measure(boundary: Boundary, window: int, before: Iterable[Loss], after: Sequence[Loss]) -> Rise | None:
    """The rise at a boundary; None where too few losses are logged.

    `before` and `after`: the logged losses between this boundary and the neighbouring ones, in order.
    """
    past = [loss for step, loss in before if step > boundary.step - window]
    soon = [(loss, step) for step, loss in after if step <= boundary.step + window]
    if len(past) < FEWEST_BEFORE or not soon:
        return None
    level = fmean(past)
    noise = math.dist(past[1:], past[:-1]) / math.sqrt(2 * (len(past) - 1))
    peak, peak_step = max(soon)
    return Rise(boundary, level, peak, peak_step, noise, _recovered_after(boundary, level, peak_step, after))


def rises(records: Sequence[Record], restarts: Sequence[Record], window: int) -> list[Rise]:
    """The rise at every boundary of a run, from the records of its two files."""
    boundaries = [Boundary(record["step"], record["cycle"]) for record in restarts]
    begun = [record["step"] for record in records if record.get("phase") == "low_rank" and record["cycle"] == 0]
    if begun:  # the first step of a cycle is always logged
        boundaries.append(Boundary(min(begun) - 1, 0))
    boundaries.sort(key=lambda boundary: boundary.step)
    stretches: list[list[Loss]] = [[] for _ in range(len(boundaries) + 1)]
    index = 0
    for step, loss in _losses(records):
        while index < len(boundaries) and step > boundaries[index].step:
            index += 1
        stretches[index].append((step, loss))
    measured = (measure(b, window, *around) for b, around in zip(boundaries, pairwise(stretches), strict=True))
    return [rise for rise in measured if rise is not None]


class LossWatch:
    """Finds out while a run goes on when the window after a boundary has passed; holds the losses of one window.

    Fed with the records in their order, of the files first where a run is continued.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._before: list[Loss] = []
        self._since: deque[Loss] = deque()
        self._pending: Boundary | None = None
        self._phase: object = None

    def record(self, record: Record) -> Rise | None:
        """A line of metrics.jsonl; the rise at the last boundary, once, when its window has passed."""
        step, phase = record["step"], record.get("phase")
        if phase == "low_rank" and self._phase == "warm_start":
            self.boundary(Boundary(step - 1, record["cycle"]))
        self._phase = phase
        self._since.extend(_losses([record]))
        passed = None
        if self._pending and step >= self._pending.step + self._window:
            passed = self._measured()
        while self._since and self._since[0][0] <= step - self._window:
            self._since.popleft()
        return passed

    def boundary(self, boundary: Boundary) -> Rise | None:
        """The next boundary; the rise at the one before it, if that one's window was cut short by this one."""
        passed = self._measured()
        self._before, self._since, self._pending = list(self._since), deque(), boundary
        return passed

    def _measured(self) -> Rise | None:
        if self._pending is None:
            return None
        boundary, self._pending = self._pending, None
        return measure(boundary, self._window, self._before, list(self._since))


def _losses(records: Iterable[Record]) -> Iterable[Loss]:
    """Of the steps that were taken: what was skipped may have a loss, too."""
    for record in records:
        loss = number(record, "loss")
        if record.get("kind") == "train" and loss is not None:
            yield record["step"], loss


def _recovered_after(boundary: Boundary, level: float, peak_step: int, after: Sequence[Loss]) -> int | None:
    recent: deque[float] = deque(maxlen=RUNNING_RECORDS)
    for step, loss in after:
        recent.append(loss)
        if step >= peak_step and fmean(recent) <= level:
            return step - boundary.step
    return None


def _setting(config: Mapping[str, Any], section: str, key: str) -> int:
    """A whole number of a configuration; 0 where it is not given."""
    tree = config.get(section)
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, int) else 0
