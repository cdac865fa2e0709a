"""`relora plan --fit`: the fastest configuration that fits into a memory limit.

Micro-batch, activation checkpointing and base may change; the rank only if nothing fits otherwise. Method and tokens of
a step stay. Memory grows with the micro-batch, so the largest micro-batch that fits is found by bisection.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from relora.config import RunConfig, to_yaml
from relora.device import choose_device
from relora.errors import UserError
from relora.files.atomic import write_text
from relora.planning.phase_cost import PhaseCost, phase_cost, phases_of
from relora.planning.probe import process_bytes
from relora.planning.sizes import format_bytes
from relora.planning.variants import CHECKPOINTING, bases_for, halved_ranks, with_changes


class Candidate(NamedTuple):
    """Values of the settings that may change to make a run fit."""

    micro_sequences: int
    activation_checkpointing: str
    base: str
    r: int


class Fit(NamedTuple):
    """A candidate that fits, with its cost."""

    candidate: Candidate
    peak: int
    """Bytes at the worst moment of the run."""
    seconds: float
    """Seconds by which candidates are compared: those of all steps of the run."""


def fitting(config: RunConfig, limit: int) -> RunConfig:
    """Return the configuration with the fastest settings whose peak is within `limit` bytes.

    Raises:
        UserError: nothing fits; the message names the smallest peak that was found.
    """
    device, process = choose_device(config.device), process_bytes()
    known: dict[tuple[object, ...], PhaseCost] = {}
    peaks = []

    def cost(candidate: Candidate) -> tuple[int, float]:
        """Return peak in bytes and seconds of the run."""
        changed = _changed(config, candidate)
        phases = []
        for name, first, steps in phases_of(changed):
            if name == "low_rank":
                key: tuple[object, ...] = (name, *candidate)
            else:  # base and rank make no difference at full rank
                key = (name, candidate.micro_sequences, candidate.activation_checkpointing)
            if key not in known:
                known[key] = phase_cost(changed, name, first, steps, process, device)
            phases.append(known[key])
        peaks.append(max(phase.checkpoint_peak for phase in phases))
        return peaks[-1], sum(phase.seconds for phase in phases)

    sequences, own_base, r = config.batch.sequences, config.lowrank.base, config.lowrank.r
    bases: Sequence[str] = (own_base,)
    ranks: Sequence[int] = (r,)
    if config.method != "full":
        bases = tuple(dict.fromkeys((own_base, *bases_for(config))))
        ranks = halved_ranks(r)
    fit = best_fit(
        cost,
        limit,
        micro_sequences=[n for n in range(1, sequences + 1) if sequences % n == 0],
        activation_checkpointing=CHECKPOINTING,
        bases=bases,
        ranks=ranks,
    )
    if fit is None:
        raise UserError(
            f"--fit {format_bytes(limit)}: nothing fits, the smallest peak is {format_bytes(min(peaks))}; "
            "take a smaller model, shorter sequences or `optimizer.name: adamw-8bit`"
        )
    return _changed(config, fit.candidate)


def best_fit(
    cost: Callable[[Candidate], tuple[int, float]],
    limit: int,
    *,
    micro_sequences: Sequence[int],
    activation_checkpointing: Sequence[str],
    bases: Sequence[str],
    ranks: Sequence[int],
) -> Fit | None:
    """Find the fastest candidate whose peak is within `limit` bytes; None if no candidate fits.

    Args:
        cost: candidate -> (peak in bytes, seconds).
        micro_sequences: sizes of the micro-batch, ascending; the peak must not fall with them.
        ranks: ranks in the order in which they are tried; the next one only if nothing fits with those before.
    """
    for r in ranks:
        fits = []
        for base in bases:
            for checkpointing in activation_checkpointing:
                fit = _largest_fit(cost, limit, micro_sequences, checkpointing, base, r)
                if fit is not None:
                    fits.append(fit)
        if fits:
            return min(fits, key=lambda fit: fit.seconds)
    return None


def write_config(config: RunConfig, out: Path) -> None:
    """Write a configuration as YAML that `relora pretrain` reads.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    try:
        write_text(out, to_yaml(config), replace=False)
    except FileExistsError:
        raise UserError(f"{out}: is there already and was left as it is; give another --out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


def _largest_fit(
    cost: Callable[[Candidate], tuple[int, float]],
    limit: int,
    micro_sequences: Sequence[int],
    checkpointing: str,
    base: str,
    r: int,
) -> Fit | None:
    """Find the candidate with the largest micro-batch that fits, by bisection; None if the smallest does not."""
    found = None
    low, high = 0, len(micro_sequences)  # sizes before index `low` fit, those from index `high` on do not
    while low < high:
        middle = (low + high) // 2
        candidate = Candidate(micro_sequences[middle], checkpointing, base, r)
        peak, seconds = cost(candidate)
        if peak <= limit:
            found, low = Fit(candidate, peak, seconds), middle + 1
        else:
            high = middle
    return found


def _changed(config: RunConfig, candidate: Candidate) -> RunConfig:
    """Return the configuration with the settings of a candidate."""
    return with_changes(
        config,
        {
            "batch": {"micro_sequences": candidate.micro_sequences},
            "memory": {"activation_checkpointing": candidate.activation_checkpointing},
            "lowrank": {"base": candidate.base, "r": candidate.r},
        },
    )
