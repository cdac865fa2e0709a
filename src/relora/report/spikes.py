"""Loss spikes: the rise of the training loss after a boundary (a restart or the switch), from the logged losses.

    before           mean of the logged losses in a window before the boundary
    peak             highest logged loss in a window of the same length after it
    rise             peak - before
    noise            spread of single losses before it: sqrt(mean of the squared successive differences / 2)
    recovered_after  steps from the boundary to the first logged step, at or after the peak, where the mean of the last
                     5 logged losses is at most `before`

The window is twice `restart.warmup_steps` long, at least ten logging intervals, and ends at the next boundary.

A logged loss is that of one batch, so the highest of several lies above their mean even without a spike. Only a rise of
more than 4 times the noise counts as a spike. At boundaries without any effect, and with independent normal losses,
this rule finds a spike in 6% of cases with 5 losses on either side, in 3% with 10, in 1% with 20 to 100. Successive
differences (von Neumann 1941) do not count the slope of a falling loss as noise, as a standard deviation would.

All figures are a function of metrics.jsonl, restarts.jsonl and config.yaml, so a run that was killed and continued
shows the same ones. The price: a spike between two logged steps is not seen.
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
"""Multiple of the noise above which a rise counts as a spike."""
FEWEST_BEFORE = 5
"""Least number of logged losses before a boundary; with fewer the noise is unknown, and nothing is measured."""
RUNNING_RECORDS = 5
"""Number of logged losses in the running mean that decides when the loss has recovered."""
WINDOW_RECORDS = 10
"""Least length of a window, in logging intervals."""

Loss = tuple[int, float]
"""(step, training loss), as logged."""


@dataclass(frozen=True)
class Boundary:
    """Beginning of a cycle after `step` optimizer steps; cycle 0 begins with the switch to low rank."""

    step: int
    cycle: int

    @property
    def name(self) -> str:
        """Name of the event at the boundary, as it is shown."""
        return "restart" if self.cycle else "switch to low rank"


@dataclass(frozen=True)
class Rise:
    """Rise of the training loss after one boundary, in nats per token; the figures are those of the module's table."""

    boundary: Boundary
    before: float
    peak: float
    peak_step: int
    noise: float
    recovered_after: int | None
    """None where the loss has not recovered yet."""

    @property
    def rise(self) -> float:
        """Highest loss after the boundary minus the mean loss before it."""
        return self.peak - self.before

    @property
    def is_spike(self) -> bool:
        """Whether the rise exceeds the noise by the factor `NOISE_FACTOR`."""
        return self.rise > NOISE_FACTOR * self.noise


def window_steps(config: Mapping[str, Any]) -> int:
    """Return the length of a window in steps for a configuration as config.yaml holds it."""
    warmup, every = _setting(config, "restart", "warmup_steps"), _setting(config, "log", "every_steps")
    return max(2 * warmup, WINDOW_RECORDS * max(every, 1))


def measure(boundary: Boundary, window: int, before: Iterable[Loss], after: Sequence[Loss]) -> Rise | None:
    """Measure the rise at one boundary; None where too few losses are logged.

    Args:
        window: length of the windows in steps.
        before: logged losses between the previous boundary and this one, in order.
        after: logged losses between this boundary and the next one, in order.
    """
    losses_before = [loss for step, loss in before if step > boundary.step - window]
    losses_after = [(loss, step) for step, loss in after if step <= boundary.step + window]
    if len(losses_before) < FEWEST_BEFORE or not losses_after:
        return None
    level = fmean(losses_before)
    noise = math.dist(losses_before[1:], losses_before[:-1]) / math.sqrt(2 * (len(losses_before) - 1))
    peak, peak_step = max(losses_after)
    return Rise(boundary, level, peak, peak_step, noise, _recovered_after(boundary, level, peak_step, after))


def rises(records: Sequence[Record], restarts: Sequence[Record], window: int) -> list[Rise]:
    """Measure the rise at every boundary of a run; boundaries with too few logged losses are left out.

    Args:
        records: records of metrics.jsonl, in order.
        restarts: records of restarts.jsonl.
        window: length of the windows in steps.
    """
    boundaries = [Boundary(record["step"], record["cycle"]) for record in restarts]
    first_cycle = [record["step"] for record in records if record.get("phase") == "low_rank" and record["cycle"] == 0]
    if first_cycle:  # the first step of a cycle is always logged
        boundaries.append(Boundary(min(first_cycle) - 1, 0))
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
    """Measurement of rises while a run goes on: reports each one when the window after its boundary has passed.

    It is given the records in their order; those of the files come first where a run is continued. It keeps the losses
    of one window before the last boundary, and those after it.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._before: list[Loss] = []
        self._since: deque[Loss] = deque()
        self._pending: Boundary | None = None
        self._phase: object = None

    def record(self, record: Record) -> Rise | None:
        """Take a record of metrics.jsonl; return the rise at the last boundary when its window has just passed."""
        step, phase = record["step"], record.get("phase")
        if phase == "low_rank" and self._phase == "warm_start":
            self.boundary(Boundary(step - 1, record["cycle"]))
        self._phase = phase
        self._since.extend(_losses([record]))
        rise = None
        if self._pending and step >= self._pending.step + self._window:
            rise = self._measure_pending()
        while self._since and self._since[0][0] <= step - self._window:
            self._since.popleft()
        return rise

    def boundary(self, boundary: Boundary) -> Rise | None:
        """Take the next boundary; return the rise at the previous one if this boundary cuts its window short."""
        rise = self._measure_pending()
        self._before, self._since, self._pending = list(self._since), deque(), boundary
        return rise

    def _measure_pending(self) -> Rise | None:
        """Measure the rise at the last boundary unless that is done already."""
        if self._pending is None:
            return None
        boundary, self._pending = self._pending, None
        return measure(boundary, self._window, self._before, list(self._since))


def _losses(records: Iterable[Record]) -> Iterable[Loss]:
    """Yield the losses of the logged steps; records of skipped steps may have a loss as well, and are left out."""
    for record in records:
        loss = number(record, "loss")
        if record.get("kind") == "train" and loss is not None:
            yield record["step"], loss


def _recovered_after(boundary: Boundary, level: float, peak_step: int, after: Sequence[Loss]) -> int | None:
    """Return the steps from the boundary until the running mean is back at `level`; None where it is not yet."""
    recent: deque[float] = deque(maxlen=RUNNING_RECORDS)
    for step, loss in after:
        recent.append(loss)
        if step >= peak_step and fmean(recent) <= level:
            return step - boundary.step
    return None


def _setting(config: Mapping[str, Any], section: str, key: str) -> int:
    """Return an integer setting of a configuration; 0 where it is not given."""
    tree = config.get(section)
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, int) else 0
