"""`relora plan`: what a run will take and how long, before anything is built; a configuration that fits; a real try.

A run's memory is that of its worst moment over all phases:

    process + tensors of the step + what the allocator loses + the copy that a background checkpoint is written from

Tensors are counted in a step without memory (`relora.planning`), the process is measured, and the allocator's loss is a
measured share of the blocks on its heap (benchmarks/plan.py). On a GPU the device's own memory counts, and the rest is
main memory; that was not run.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora.config import RunConfig, parse_config, to_yaml
from relora.device import choose_device
from relora.errors import UserError
from relora.lowrank import inject
from relora.lowrank.calibrate import calibrated
from relora.measure import token_loss
from relora.model.blocks import training_blocks
from relora.planning import Candidate, StepFigures, StepShape, best_fit, simulate
from relora.planning.probe import Measured, probe, process_bytes
from relora.recipes.from_settings import adaptive_of, autocast_of, most_restarts, schedule_of, settled_lowrank
from relora.recipes.pretraining_inputs import open_configured_model
from relora.train.embeddings import rows_added_in_place
from relora.train.optim import CODES_PER_SCALE, FEWEST_CODES
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS, projected_matrices, state_shapes
from relora.train.schedule import Phase

HEAP_LOSS = 0.35
"""Of the bytes on glibc's heap, what lies unused beside them; 0.1 to 0.7 was measured, 1.7 where blocks recompute."""
NO_HEAP = 2**20
"""Where glibc asks the system for every block of so many bytes (MALLOC_MMAP_THRESHOLD_), nothing is lost."""
CHECKPOINTING = ("none", "selective", "full")
BASES = ("fp32", "bf16", "int8")
_NO_WARM_START = {"method": "lora", "warm_start": {"steps": 0, "auto": False}, "lowrank": {"ranks": "uniform"}}


@dataclass(frozen=True)
class PhaseCost:
    """One stretch of the run."""

    name: Phase
    first_step: int
    steps: int
    figures: StepFigures
    allocator: int
    """Bytes that the allocator loses at the peak."""
    process: int
    """Bytes of interpreter and libraries; 0 on a GPU, whose memory they do not take."""
    snapshot: int
    """Bytes of the copy that a checkpoint is written from while training goes on; 0 on a GPU."""
    measured: Measured | None = None
    """By `--probe`."""

    @property
    def predicted_peak(self) -> int:
        """Bytes of a step."""
        return self.figures.peak + self.allocator + self.process

    @property
    def peak(self) -> int:
        """Bytes of a step; as measured, where it was."""
        return self.measured.peak if self.measured else self.predicted_peak

    @property
    def checkpoint_peak(self) -> int:
        """Bytes of a step that is taken while a checkpoint is written."""
        return self.peak + self.snapshot

    @property
    def step_seconds(self) -> float:
        """As measured, where it was."""
        return self.measured.step_seconds if self.measured else self.figures.seconds

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return self.step_seconds * self.steps


@dataclass(frozen=True)
class Alternative:
    """The same run with other settings."""

    method: str
    base: str | None
    activation_checkpointing: str
    peak: int
    step_seconds: float
    """Of a low-rank step; in a full-rank run of any."""


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    method: str
    device: str
    process: int
    """Bytes of interpreter and libraries."""
    phases: list[PhaseCost]
    restarts: int
    """As many as there can be."""
    adaptive_switch: bool
    """The phases are those of the longest warm start."""
    alternatives: list[Alternative]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return max(phase.checkpoint_peak for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(phase.seconds for phase in self.phases)


def make_plan(config: RunConfig, *, probed: bool = False, alternatives: bool = True) -> Plan:
    """The plan of a configuration; `UserError` as the run's.

    Args:
        probed: take real steps of each phase, too.
        alternatives: go through the methods, bases and kinds of checkpointing that were not chosen, too.
    """
    device, process = choose_device(config.device), process_bytes()
    phases = [_phase_cost(config, *stretch, process, device) for stretch in _stretches(config)]
    if probed:
        phases = [replace(phase, measured=probe(config, phase.name)) for phase in phases]
    adaptive = adaptive_of(config).warm_start is not None
    others = _alternatives(config, process, device) if alternatives else []
    return Plan(config.method, str(device), process, phases, most_restarts(config), adaptive, others)


def fitting(config: RunConfig, limit: int) -> RunConfig:
    """The configuration, changed as little and as fast as may be, whose peak is within `limit` bytes.

    Raises:
        UserError: nothing fits; it names the smallest peak that was found.
    """
    device, process = choose_device(config.device), process_bytes()
    known: dict[tuple[object, ...], PhaseCost] = {}
    peaks = []

    def cost(candidate: Candidate) -> tuple[int, float]:
        changed = _changed(config, candidate)
        found = []
        for name, first, steps in _stretches(changed):
            key = (name, *(candidate if name == "low_rank" else candidate[:2]))
            if key not in known:
                known[key] = _phase_cost(changed, name, first, steps, process, device)
            found.append(known[key])
        peaks.append(max(phase.checkpoint_peak for phase in found))
        return peaks[-1], sum(phase.seconds for phase in found)

    full = config.method == "full"
    own_base, r = config.lowrank.base, config.lowrank.r
    fit = best_fit(
        cost,
        limit,
        micro_sequences=[n for n in range(1, config.batch.sequences + 1) if config.batch.sequences % n == 0],
        activation_checkpointing=CHECKPOINTING,
        bases=(own_base,) if full else tuple(dict.fromkeys((own_base, *_bases(config)))),
        ranks=(r,) if full else _halvings(r),
    )
    if fit is None:
        raise UserError(
            f"--fit {format_bytes(limit)}: nothing fits, the smallest peak is {format_bytes(min(peaks))}; "
            "take a smaller model, shorter sequences or `optimizer.name: adamw-8bit`"
        )
    return _changed(config, fit.candidate)


def write_config(config: RunConfig, out: Path) -> None:
    """As YAML that `relora pretrain` reads; `UserError` where the file is there."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(to_yaml(config))
    except FileExistsError:
        raise UserError(f"{out}: is there already and was left as it is; give another --out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


def size_in_bytes(text: str) -> int:
    """`6GiB`, `800MB` -> bytes; `UserError` for anything else."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BGIKMbgikm ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--fit {text}: give a size, e.g. 6GiB or 800MB")
    return size


def as_figures(plan: Plan) -> dict[str, Any]:
    """For `--json`: every figure, sums included."""
    tree = asdict(plan)
    for phase, cost in zip(tree["phases"], plan.phases, strict=True):
        phase |= {name: getattr(cost, name) for name in ("predicted_peak", "peak", "checkpoint_peak", "seconds")}
    return {**tree, "peak": plan.peak, "seconds": plan.seconds}


def _stretches(config: RunConfig) -> list[tuple[Phase, int, int]]:
    """(phase, first step, steps)."""
    schedule = schedule_of(config)
    first, total = schedule.warm_start_steps, schedule.total_steps
    stretches: list[tuple[Phase, int, int]] = [(schedule.phase(0), 0, first)] if first else []
    return [*stretches, ("low_rank", first, total - first)] if first < total else stretches


def _phase_cost(
    config: RunConfig, name: Phase, first_step: int, steps: int, process: int, device: torch.device
) -> PhaseCost:
    figures = step_figures(config, name, device)
    on_cpu = device.type == "cpu"
    allocator = allocator_loss(figures) if on_cpu else 0
    snapshot = figures.snapshot if on_cpu and config.checkpoint.background else 0
    return PhaseCost(name, first_step, steps, figures, allocator, process if on_cpu else 0, snapshot)


def allocator_loss(figures: StepFigures) -> int:
    """Bytes that the allocator of main memory holds beside what lives."""
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    mapped_all = threshold.isdecimal() and int(threshold) <= NO_HEAP
    return 0 if mapped_all else int(HEAP_LOSS * figures.heap)


def step_figures(config: RunConfig, phase: Phase, device: torch.device) -> StepFigures:
    """What a step of a phase takes."""
    with torch.device("meta"):
        model = open_configured_model(config, trust_remote_code=config.model.trust_remote_code)
    rates = calibrated(device)
    lowrank = settled_lowrank(config, model, device, rates)
    autocast = autocast_of(config)

    def run_pass(model: nn.Module, ids: Tensor) -> None:
        blocks = training_blocks(model, checkpointing=config.memory.activation_checkpointing)
        with blocks, rows_added_in_place(model):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss, tokens = token_loss(model, ids, ids)
            torch.autograd.backward(loss / tokens)

    shape = StepShape(
        micro_sequences=config.batch.micro_sequences,
        sequence_length=config.data.sequence_length,
        micro_batches=config.batch.sequences // config.batch.micro_sequences,
        device=device,
        rates=rates,
    )

    def prepare(model: nn.Module) -> None:
        if phase == "low_rank":
            inject(model, lowrank, seed=config.seed)

    return simulate(model, shape, run_pass, prepare=prepare, moments=_moments(config, model), residual=lowrank.residual)


def _moments(config: RunConfig, model: nn.Module) -> Callable[[nn.Parameter], list[Tensor]]:
    optimizer = config.optimizer

    def fp32(parameter: nn.Parameter) -> list[Tensor]:
        return [torch.empty_like(parameter.data) for _ in "mv"]

    def codes(parameter: nn.Parameter) -> list[Tensor]:
        if parameter.numel() < FEWEST_CODES:
            return fp32(parameter)
        scales = -(-parameter.numel() // CODES_PER_SCALE)
        return [
            tensor
            for _ in "mv"
            for tensor in (
                torch.empty_like(parameter.data, dtype=torch.uint8),
                parameter.data.new_empty(scales, dtype=torch.float32),
            )
        ]

    @cache
    def matrices() -> set[int]:  # of the model where it trains: its parameters were others before
        return {id(matrix) for matrix in projected_matrices(model, optimizer.projection.rank).values()}

    def projected(parameter: nn.Parameter) -> list[Tensor]:
        if id(parameter) not in matrices():
            return fp32(parameter)
        moment, projection = state_shapes(parameter.shape, optimizer.projection.rank)
        return [parameter.data.new_empty(shape) for shape in (moment, moment, projection)]

    if optimizer.name in PROJECTED_OPTIMIZERS:
        return projected
    return codes if optimizer.name == "adamw-8bit" else fp32


def _alternatives(config: RunConfig, process: int, device: torch.device) -> list[Alternative]:
    """Every method, base and kind of activation checkpointing, at the same batch."""
    found = []
    full: dict[str, PhaseCost] = {}
    for checkpointing in CHECKPOINTING:
        changed = _with(config, {"method": "full", "memory": {"activation_checkpointing": checkpointing}})
        full[checkpointing] = _phase_cost(changed, "full", 0, changed.total_steps, process, device)
        cost = full[checkpointing]
        found.append(Alternative("full", None, checkpointing, cost.checkpoint_peak, cost.figures.seconds))
    try:
        low_rank = config if config.method != "full" else _with(config, _NO_WARM_START)
        return found + _low_rank_alternatives(low_rank, full, process, device)
    except UserError:
        if config.method != "full":
            raise
        return found  # the low-rank settings, which this run has no use for, do not fit it


def _low_rank_alternatives(
    config: RunConfig, full: dict[str, PhaseCost], process: int, device: torch.device
) -> list[Alternative]:
    found = []
    for base in _bases(config):
        for checkpointing in CHECKPOINTING:
            memory = {"memory": {"activation_checkpointing": checkpointing}}
            changed = _with(config, {"lowrank": {"base": base}, **memory})
            cost = _phase_cost(changed, "low_rank", 0, 1, process, device)
            warm = full[checkpointing].checkpoint_peak
            for method in ("lora", "relora"):
                peak = max(cost.checkpoint_peak, warm if method == "relora" else 0)
                found.append(Alternative(method, base, checkpointing, peak, cost.figures.seconds))
    return found


def _bases(config: RunConfig) -> tuple[str, ...]:
    """Ways to store frozen weights; those that move in every step cannot be rounded."""
    return BASES[:1] if config.lowrank.residual.scale else BASES


def _halvings(r: int) -> tuple[int, ...]:
    """r, and halves of it down to 8."""
    return (r, *(r >> times for times in range(1, r.bit_length()) if r >> times >= 8))


def _changed(config: RunConfig, candidate: Candidate) -> RunConfig:
    return _with(
        config,
        {
            "batch": {"micro_sequences": candidate.micro_sequences},
            "memory": {"activation_checkpointing": candidate.activation_checkpointing},
            "lowrank": {"base": candidate.base, "r": candidate.r},
        },
    )


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration with other keys, checked anew."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for section, value in changes.items():
        tree[section] = {**tree[section], **value} if isinstance(value, dict) else value
    return parse_config(tree)


def format_bytes(size: int) -> str:
    """Bytes, for a person."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
