"""The gradients of a step, summed over all processes while the backward pass still runs.

    the sequences of a step    0 ................................. n
    rank k of W takes          [k n / W, (k + 1) n / W)            cut into micro-batches from its own start
    gradient                   sum over all micro-batches of all ranks; each loss is divided by the step's tokens

Only what trains travels, and that changes within a run: all at first, factors after the switch, with a residual also
the frozen weights at some steps. `DistributedDataParallel` fixes its set of parameters when it is built and leaves one
that begins to train later unreduced, without a word. Here the set is read anew at every step.

In the backward pass of a rank's last micro-batch each gradient that is complete goes into a flat buffer of its bucket;
a bucket that is full is summed over the ranks at once, while the pass goes on. Buckets are sent in one order on all
ranks, whatever order their gradients came in. A gradient is then a view of its bucket: the price is one copy of each
gradient, and the memory of one bucket.

A tensor without a gradient on some ranks, such as an expert that got no token, counts as zero there; one without any on
all ranks keeps none, so that the optimizer leaves it alone. Each bucket carries a flag for every tensor of it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.distributed.group import ALONE, Group
from relora.errors import UserError

BUCKET_BYTES = 25 * 2**20
"""Size from which a bucket is sent; torch's own choice for its buckets."""


@dataclass(frozen=True)
class Share:
    """A micro-batch: the rank that computes it, and its sequences in the batch of the step."""

    rank: int
    sequences: range


class Reduction:
    """How the gradients of a step's micro-batches come together. Alone, they add up in `.grad`, and nothing travels."""

    adds_rows_in_place = True
    """Whether the gradient of an embedding may be added to `.grad` past autograd (see `train.embeddings`)."""

    def __init__(self, group: Group = ALONE) -> None:
        self.group = group
        self.waited_seconds = 0.0
        """Time spent waiting for other ranks so far."""
        self.sent_bytes = 0
        """Bytes that this rank has given to sums over the ranks so far."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.group.rank

    def shares(self, sequences: int, micro_sequences: int) -> list[Share]:
        """Return the micro-batches of a step on all ranks, in the order of their sequences."""
        bounds = [rank * sequences // self.group.world for rank in range(self.group.world + 1)]
        return [
            Share(rank, range(first, min(first + micro_sequences, stop)))
            for rank, (start, stop) in enumerate(pairwise(bounds))
            for first in range(start, stop, micro_sequences)
        ]

    def passes(self, shares: Sequence[Share]) -> int:
        """Return the number of passes that this rank takes through the model: one for each of its micro-batches."""
        return sum(share.rank == self.rank for share in shares)

    @contextmanager
    def step(self, parameters: Sequence[nn.Parameter], shares: Sequence[Share]) -> Iterator[None]:
        """Hold what the step of these parameters and micro-batches needs; `backward` and `finish` are called inside."""
        yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward pass of a micro-batch; `loss` is its sum divided by the tokens of the whole step.

        Args:
            last: whether it is the last micro-batch of this rank in the step.
        """
        torch.autograd.backward(loss)

    def finish(self, micro_losses: list[Tensor]) -> Tensor:
        """Complete the gradients, and return the summed losses of all micro-batches of the step, in order."""
        return torch.stack(micro_losses)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, out of the gradients on this rank: a scalar."""
        return nn.utils.get_total_norm(gradients)


@dataclass
class _Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    missing: int
    """Number of gradients that are not complete yet."""
    flat: Tensor | None = None
    work: Any = None
    """Handle of the sum that is under way."""


@dataclass
class _Step:
    """State of `Buckets` during one step."""

    shares: Sequence[Share]
    parameters: Sequence[nn.Parameter]
    buckets: list[_Bucket] = field(default_factory=list)
    of_parameter: dict[int, _Bucket] = field(default_factory=dict)
    sent: int = 0
    """Number of buckets whose sum has begun."""


class Buckets(Reduction):
    """Sums over several ranks in flat buckets, begun during the last backward pass of the step."""

    adds_rows_in_place = False

    def __init__(self, group: Group, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(group)
        self.bucket_bytes = bucket_bytes
        self._step: _Step | None = None

    @contextmanager
    def step(self, parameters: Sequence[nn.Parameter], shares: Sequence[Share]) -> Iterator[None]:
        self._step = _Step(shares, parameters)
        try:
            yield
        finally:
            self._step = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if not last:
            torch.autograd.backward(loss)
            return
        step = self._step
        assert step is not None
        step.buckets = [_Bucket(own, len(own)) for own in in_buckets(step.parameters, self.bucket_bytes)]
        step.of_parameter = {id(one): bucket for bucket in step.buckets for one in bucket.parameters}
        with ExitStack() as hooks:
            for parameter in step.parameters:
                hook = parameter.register_post_accumulate_grad_hook(self._gradient_is_complete)  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
            torch.autograd.backward(loss)

    def finish(self, micro_losses: list[Tensor]) -> Tensor:
        step = self._step
        assert step is not None
        started = time.perf_counter()
        losses = losses_of_all(self.group, micro_losses, step.shares)
        with self.group.guarded("the sum of the gradients"):
            self._send(step, step.buckets)  # those with a tensor that got no gradient in the last micro-batch
            for bucket in step.buckets:
                bucket.work.wait()
        for bucket in step.buckets:
            self._take(bucket)
        self.group.completed()
        self.waited_seconds += time.perf_counter() - started
        return losses

    def _gradient_is_complete(self, parameter: Tensor) -> None:
        """Begin the sums of all buckets, in order, that have become complete with this gradient."""
        step = self._step
        assert step is not None
        step.of_parameter[id(parameter)].missing -= 1
        ready = step.sent
        while ready < len(step.buckets) and not step.buckets[ready].missing:
            ready += 1
        self._send(step, step.buckets[:ready])

    def _send(self, step: _Step, buckets: Sequence[_Bucket]) -> None:
        """Begin the sums of those buckets that have not been sent yet; their gradients become views of the bucket."""
        for bucket in buckets[step.sent :]:
            gradients = [parameter.grad for parameter in bucket.parameters]
            bucket.flat = packed(bucket.parameters, gradients)
            for parameter, view in zip(bucket.parameters, views(bucket.flat, bucket.parameters), strict=True):
                if parameter.grad is not None:
                    parameter.grad = view  # frees the gradient's own memory
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
            self.sent_bytes += bucket.flat.nbytes
        step.sent = max(step.sent, len(buckets))

    def _take(self, bucket: _Bucket) -> None:
        """Give tensors that had no gradient here the sum of the other ranks', if one of them had a gradient."""
        assert bucket.flat is not None
        if all(parameter.grad is not None for parameter in bucket.parameters):
            return
        for parameter, gradient in zip(bucket.parameters, unpacked(bucket.flat, bucket.parameters), strict=True):
            parameter.grad = gradient


def packed(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> Tensor:
    """Copy gradients into one flat tensor, zeros for those that are absent, and at its end a flag for each."""
    flat = parameters[0].new_zeros(sum(one.numel() for one in parameters) + len(parameters))
    for index, (gradient, view) in enumerate(zip(gradients, views(flat, parameters), strict=True)):
        if gradient is not None:
            view.copy_(gradient)
            flat[index - len(parameters)] = 1
    return flat


def unpacked(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients of a sum of packed tensors as views of it; None where no rank had one.

    A GPU is waited for, to read the flags.
    """
    flags = flat[-len(parameters) :].tolist()
    return [view if flag else None for view, flag in zip(views(flat, parameters), flags, strict=True)]


def views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the part of a packed tensor that belongs to each parameter, in its shape."""
    sizes = [parameter.numel() for parameter in parameters]
    parts = torch.split(flat[: sum(sizes)], sizes)
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def in_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Put parameters into buckets of one dtype each, the last parameters first: their gradients come first."""
    buckets: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        own = filling.setdefault(parameter.dtype, [])
        own.append(parameter)
        if sum(one.nbytes for one in own) >= bucket_bytes:
            buckets.append(filling.pop(parameter.dtype))
    return [*buckets, *filling.values()]


def losses_of_all(group: Group, micro_losses: list[Tensor], shares: Sequence[Share]) -> Tensor:
    """Return the losses of all micro-batches, in order, of which this rank has its own; exactly, since others are zero.

    Args:
        micro_losses: of this rank's micro-batches.
        shares: all micro-batches of the step.
    """
    own = [index for index, share in enumerate(shares) if share.rank == group.rank]
    losses = micro_losses[0].new_zeros(len(shares))
    losses[own[0] : own[-1] + 1] = torch.stack(micro_losses)
    return group.sum_(losses)


def check_share(group: Group, sequences: int, micro_sequences: int, *, deterministic: bool) -> None:
    """Raise `UserError` if some rank would have no sequence of a step, or with `deterministic` no micro-batch."""
    if group.world > sequences:
        raise UserError(
            f"batch.sequences: a step has {sequences} sequences for {group.world} processes; start at most "
            f"{sequences}, or raise it"
        )
    parts = -(-sequences // micro_sequences)
    if deterministic and group.world > parts:
        raise UserError(
            f"distributed.deterministic: adds up whole micro-batches, and a step of {parts} has none for some of "
            f"{group.world} processes; lower `batch.micro_sequences` to {max(1, sequences // group.world)} or less"
        )
