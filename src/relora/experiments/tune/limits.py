"""Limits of a trial. Memory and the size of the adapter are predicted, and a trial that exceeds them never starts.

Memory is what `relora plan` predicts for the worst moment of the run. Time is measured: a trial whose whole run would
take longer, by what it took so far, is given up at its next rung.
"""

from dataclasses import dataclass

from relora.config import FinetuneConfig, RunConfig
from relora.device import choose_device
from relora.errors import UserError
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.spaces import Config
from relora.planning.model_shape import shape_of
from relora.planning.phase_cost import finetuning_peak, phase_cost, phases_of
from relora.planning.probe import process_bytes
from relora.planning.sizes import format_bytes
from relora.recipes.from_settings import factor_parameters, schedule_of

BYTES_OF_FACTOR = 4
"""Bytes of a number in an adapter's file, fp32."""


@dataclass(frozen=True)
class Limits:
    """Largest values that a trial may have; None where there is no limit."""

    memory: int | None = None
    """Bytes at the worst moment of the run."""
    adapter: int | None = None
    """Bytes of the factors."""
    minutes: float | None = None
    """Minutes of the training steps of the whole run."""


def planned_figures(config: Config, *, with_memory: bool) -> dict[str, float]:
    """Return what is known of a trial before it runs: bytes of its factors and, where asked for, at its peak.

    Raises:
        UserError: the settings do not fit the model, or its memory cannot be planned.
    """
    model = shape_of(config)
    found: dict[str, float] = {"adapter_bytes": BYTES_OF_FACTOR * factor_parameters(config, model)}
    if isinstance(config, RunConfig):
        schedule_of(config)
    if with_memory:
        found["planned_bytes"] = _peak(config)
    return found


def why_not(figures: dict[str, float], limits: Limits) -> str | None:
    """Return which limit a trial would exceed, with its figures; None if none."""
    kinds = (("planned_bytes", "memory", limits.memory), ("adapter_bytes", "adapter", limits.adapter))
    for key, name, limit in kinds:
        if limit is not None and figures.get(key, 0) > limit:
            return f"{name}: {format_bytes(int(figures[key]))}, and --{name} allows {format_bytes(limit)}"
    return None


def too_slow(trial: Trial, limits: Limits) -> str | None:
    """Return that a trial's whole run would take too long, by the seconds that it has taken so far; None if not."""
    if limits.minutes is None or not trial.share:
        return None
    minutes = trial.figures.get("seconds", 0.0) / trial.share / 60
    return (
        f"time: {minutes:.1f} minutes a run, and --minutes allows {limits.minutes:g}"
        if minutes > limits.minutes
        else None
    )


def _peak(config: Config) -> int:
    """Return the predicted bytes at the worst moment of a run."""
    if isinstance(config, FinetuneConfig):
        return finetuning_peak(config)
    process, device = process_bytes(), choose_device(config.device)
    phases = [phase_cost(config, name, first, steps, process, device) for name, first, steps in phases_of(config)]
    return max(phase.checkpoint_peak for phase in phases)


def check_limits(limits: Limits, config: Config) -> None:
    """Refuse a limit that means nothing here.

    Raises:
        UserError: the memory cannot be planned, or there are no factors whose size could be limited.
    """
    if limits.adapter is not None and config.method not in ("lora", "relora"):
        raise UserError(f"--adapter: `method: {config.method}` has no factors; leave it out")
    if limits.minutes is not None and limits.minutes <= 0:
        raise UserError(f"--minutes {limits.minutes:g}: must be above 0")
    if limits.memory is not None:
        _peak(config)  # says what cannot be planned
        if choose_device(config.device).type == "cpu" and process_bytes() > limits.memory:
            raise UserError(
                f"--memory: a process takes {format_bytes(process_bytes())} before it has a model, and "
                f"{format_bytes(limits.memory)} are allowed; allow more"
            )
