"""Prediction of a step on several processes: its computing, what it sends, how long that takes, and a rank's memory.

    replicate   a ring sum of the gradients of what trains             2 (W - 1)/W · g bytes a step
    shard       weights are gathered for each pass forward and back,   (W - 1)/W · (2 w + g) bytes a micro-batch
                and the gradients summed to the rank that has the rows
    hybrid      shard among the N ranks of a machine, then a ring sum of each rank's rows among the W/N machines

W ranks; g: bytes of the gradients of what trains, in fp32; w: bytes of all weights as they are stored. A rank computes
its share of the step's sequences, as `phase_cost` predicts for so many. Of the time that sending takes, the part that
fits into the backward passes of the micro-batches that send is hidden, as far as `Link.overlap` says.

Every link is as fast as the slowest one of the ring, and latencies are left out: with more than some hundred processes
and small buckets, real sums take longer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from relora.config import RunConfig
from relora.device import choose_device
from relora.errors import UserError
from relora.model.blocks import decoder_blocks
from relora.planning.model_shape import shape_of
from relora.planning.phase_cost import PhaseCost, phase_cost, phases_of
from relora.planning.probe import process_bytes
from relora.planning.sizes import rate_in_bytes
from relora.planning.variants import with_changes

DIVIDED = ("weights", "frozen weights", "factors", "moments", "gradients")
"""Kinds of memory that are divided among the ranks of a sharded model."""
_BACKWARD_SHARE = 2 / 3
"""Share of a micro-batch's time that its backward pass takes, during which gradients can be sent."""


@dataclass(frozen=True)
class Link:
    """How fast processes send to one another."""

    bandwidth: float
    """Bytes that a process sends in a second, over the slowest link between two machines (or processes)."""
    within: float
    """The same among the processes of one machine; for `hybrid`."""
    per_machine: int
    """Processes of one machine; for `hybrid`."""
    overlap: float
    """Share of the backward pass in which sending costs nothing, 0 to 1."""


@dataclass(frozen=True)
class Scaled:
    """One phase of a run on several processes; the fields are keys of `relora plan --world --json`."""

    world: int
    strategy: str
    """`replicate`, `shard` or `hybrid`."""
    phase: str
    sequences: int
    """Most sequences of a step on one rank."""
    sent_bytes: int
    """Bytes that a rank sends in a step."""
    computing: float
    """Seconds that a rank computes in a step."""
    sending: float
    """Seconds that sending takes in a step."""
    exposed: float
    """Seconds of these in which nothing is computed."""
    peak: int
    """Bytes of a rank at the worst moment of a step."""
    efficiency: float
    """Tokens per second of all ranks, relative to as many times one process."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.computing + self.exposed


def link_of(bandwidth: str, within: str | None, per_machine: int, overlap: float) -> Link:
    """Read a link from the options of `relora plan`; `within` is the bandwidth where it is not given."""
    slowest = rate_in_bytes(bandwidth, "--bandwidth")
    return Link(slowest, rate_in_bytes(within, "--within") if within else slowest, per_machine, overlap)


def scale_figures(found: Sequence[Scaled]) -> list[dict[str, Any]]:
    """Convert predictions to the list of `relora plan --world --json`."""
    return [asdict(one) | {"step_seconds": one.step_seconds} for one in found]


def scale(
    config: RunConfig, worlds: Sequence[int], link: Link, *, step_seconds: Sequence[float] | None = None
) -> list[Scaled]:
    """Predict every phase of a run on so many processes, under each strategy that they can have.

    Args:
        step_seconds: measured seconds of a step on one process, one for each phase, in place of predicted ones.

    Raises:
        UserError: more processes than sequences in a step, machines that do not divide them, other numbers of
            `step_seconds` than phases, or what `make_plan` raises.
    """
    sequences = config.batch.sequences
    for world in worlds:
        if world > sequences:
            raise UserError(
                f"--world {world}: a step has only {sequences} sequences; raise `batch.sequences`, or take fewer "
                "processes"
            )
        if world > link.per_machine and world % link.per_machine:
            raise UserError(
                f"--world {world}: is no whole number of machines with {link.per_machine} processes each; give another "
                "--per-machine"
            )
    phases = phases_of(config)
    if step_seconds is not None and len(step_seconds) != len(phases):
        names = ", ".join(name for name, _, _ in phases)
        raise UserError(f"--step-seconds: give {len(phases)}, one for each phase ({names}), separated by commas")
    device, process = choose_device(config.device), process_bytes()
    share_of_unit = _largest_unit(config)
    found = []
    for index, (name, first, steps) in enumerate(phases):
        alone = phase_cost(config, name, first, steps, process, device)
        measured = step_seconds[index] if step_seconds is not None else alone.figures.seconds
        correction = measured / alone.figures.seconds
        for world in worlds:
            part, micro_batches = _share(config, world)
            cost = phase_cost(part, name, first, steps, process, device)
            for strategy in ("replicate", *(("shard",) if world > 1 else ()), *_hybrid(world, link)):
                scaled = _scaled(cost, strategy, world, micro_batches, link, correction, share_of_unit)
                efficiency = measured / (world * scaled.step_seconds)
                found.append(replace(scaled, sequences=ceil(sequences / world), efficiency=efficiency))
    return found


def _hybrid(world: int, link: Link) -> tuple[str, ...]:
    """Return `hybrid` where there are several machines with several processes each."""
    return ("hybrid",) if 1 < link.per_machine < world else ()


def _share(config: RunConfig, world: int) -> tuple[RunConfig, int]:
    """Return the configuration of the rank that has most to compute, and its micro-batches in a step."""
    sequences = ceil(config.batch.sequences / world)
    micro = min(config.batch.micro_sequences, sequences)
    micro_batches = ceil(sequences / micro)
    batch = {"sequences": micro * micro_batches, "micro_sequences": micro}
    return with_changes(config, {"batch": batch}), micro_batches


def _scaled(
    cost: PhaseCost, strategy: str, world: int, micro_batches: int, link: Link, correction: float, unit: float
) -> Scaled:
    """Predict one phase under one strategy; `correction` is that of the predicted time, `unit` see `_largest_unit`."""
    figures = cost.figures
    gradients = 4 * figures.trained
    weights = sum(figures.memory.get(kind, 0) for kind in ("weights", "frozen weights", "factors"))
    computing = correction * figures.seconds
    hidden = link.overlap * _BACKWARD_SHARE * computing
    if strategy == "replicate":
        sent = round(2 * (world - 1) / world * gradients)
        sending, hidden = sent / link.bandwidth, hidden / micro_batches  # only the last micro-batch sends
        peak = cost.checkpoint_peak
    else:
        ranks = world if strategy == "shard" else link.per_machine
        machines = world // ranks
        within = (ranks - 1) / ranks * (2 * weights + gradients) * micro_batches
        between = 2 * (machines - 1) / machines * gradients / ranks * micro_batches
        sent = round(within + between)
        sending = within / (link.bandwidth if strategy == "shard" and world > link.per_machine else link.within)
        sending += between / link.bandwidth
        divided = sum(figures.memory.get(kind, 0) for kind in DIVIDED) * (1 - 1 / ranks)
        gathered = 2 * unit * (weights + gradients)  # one unit computes while the next is gathered
        peak = round(cost.checkpoint_peak - divided - cost.snapshot * (1 - 1 / ranks) + gathered)
    exposed = max(0.0, sending - hidden)
    return Scaled(world, strategy, cost.name, 0, sent, computing, sending, exposed, peak, 0.0)


def _largest_unit(config: RunConfig) -> float:
    """Return the largest share of the parameters that a sharded model gathers at once: a block, or all outside them."""
    model = shape_of(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return float(max(*blocks, whole - sum(blocks)) / whole)
