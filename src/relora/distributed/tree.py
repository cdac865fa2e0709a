"""The sum of a step's gradients in one fixed order, whatever the number of processes.

    0   1   2   3   4   5        micro-batches of the step, cut alike for every number of processes
     \\ /     \\ /     \\ /
      01      23      45         a fixed binary tree: the left part is the largest power of two that leaves something
       \\      /        |
         0123          |
            \\         /
             012345

Floating-point sums depend on their order, so a plain sum over ranks gives other last bits for every number of ranks.
Here a rank has consecutive micro-batches. It adds up what lies below the largest nodes that it has all of; the nodes
are exchanged, and every rank adds up the rest in the same order. So 1, 2, 3 and more processes give the same bits, as
long as each computes with the same number of threads.

The price: a rank holds up to log2(micro-batches) sums of gradients at a time, and sends the gradients of its nodes to
all others, which is W / 2 times what a sum over the ranks takes; nothing of it overlaps with the backward pass.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.distributed.group import ALONE, Group
from relora.distributed.reduce import BUCKET_BYTES, Reduction, Share, in_buckets, losses_of_all, packed, unpacked

Gradients = list[Tensor | None]
"""One gradient for each parameter; None where there is none."""


@dataclass(frozen=True)
class Node:
    """A node of the tree: the micro-batches from `first` to `stop`."""

    first: int
    stop: int

    @property
    def children(self) -> tuple["Node", "Node"]:
        """The two nodes below; the left one has the largest power of two of micro-batches that is less than all."""
        middle = self.first + (1 << ((self.stop - self.first - 1).bit_length() - 1))
        return Node(self.first, middle), Node(middle, self.stop)

    def all_below(self) -> Iterator["Node"]:
        """Yield this node and all below it."""
        yield self
        if self.stop - self.first > 1:
            for child in self.children:
                yield from child.all_below()

    def largest_within(self, part: range) -> list["Node"]:
        """Return the largest nodes, this one or below it, that hold nothing but micro-batches of `part`; in order."""
        if part.start <= self.first and self.stop <= part.stop:
            return [self]
        if self.stop <= part.start or part.stop <= self.first or self.stop - self.first == 1:
            return []
        return [node for child in self.children for node in child.largest_within(part)]


class Tree(Reduction):
    """Sums in the order of the tree, on one process as on several."""

    adds_rows_in_place = False

    def __init__(self, group: Group = ALONE, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(group)
        self.bucket_bytes = bucket_bytes
        self._parameters: Sequence[nn.Parameter] = ()
        self._shares: Sequence[Share] = ()
        self._nodes: frozenset[Node] = frozenset()
        self._sums: list[tuple[Node, Gradients]] = []
        self._next = 0

    def shares(self, sequences: int, micro_sequences: int) -> list[Share]:
        """Return the micro-batches of a step, cut alike for every number of ranks; each rank has whole ones."""
        parts = [
            range(first, min(first + micro_sequences, sequences)) for first in range(0, sequences, micro_sequences)
        ]
        return [
            Share(rank, part)
            for rank in range(self.group.world)
            for part in parts[len(parts) * rank // self.group.world : len(parts) * (rank + 1) // self.group.world]
        ]

    @contextmanager
    def step(self, parameters: Sequence[nn.Parameter], shares: Sequence[Share]) -> Iterator[None]:
        self._parameters, self._shares = parameters, shares
        self._nodes = frozenset(Node(0, len(shares)).all_below())
        self._next = self._parts()[self.rank].start
        try:
            yield
        finally:
            self._parameters, self._shares, self._sums = (), (), []

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)
        gradients: Gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        node = Node(self._next, self._next + 1)
        while self._sums and (parent := Node(self._sums[-1][0].first, node.stop)) in self._nodes:
            gradients, node = _added(self._sums.pop()[1], gradients), parent
        self._sums.append((node, gradients))
        self._next += 1

    def finish(self, micro_losses: list[Tensor]) -> Tensor:
        started = time.perf_counter()
        losses = losses_of_all(self.group, micro_losses, self._shares)
        if self.group.world == 1:
            (_, summed), *_ = self._sums
            for parameter, gradient in zip(self._parameters, summed, strict=True):
                parameter.grad = gradient
        else:
            self._exchange()
        self.waited_seconds += time.perf_counter() - started
        return losses

    def _parts(self) -> list[range]:
        """Return the micro-batches of every rank, by their numbers."""
        counts = [sum(share.rank == rank for share in self._shares) for rank in range(self.group.world)]
        ends = [*accumulate(counts)]
        return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]

    def _exchange(self) -> None:
        """Exchange the nodes of all ranks, a bucket of parameters at a time, and add them up to the root."""
        root = Node(0, len(self._shares))
        nodes = [root.largest_within(part) for part in self._parts()]
        rows = max(map(len, nodes))
        places = {node: rank * rows + row for rank, own in enumerate(nodes) for row, node in enumerate(own)}
        number = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        for bucket in in_buckets(self._parameters, self.bucket_bytes):
            sums = [packed(bucket, [gradients[number[id(one)]] for one in bucket]) for _, gradients in self._sums]
            own = torch.stack([*sums, *[sums[0]] * (rows - len(sums))])  # ranks with fewer nodes fill up their rows
            everything = own.new_empty(self.group.world * rows, own.shape[1])
            with self.group.guarded("the sum of the gradients"):
                dist.all_gather_single(everything, own)
            self.sent_bytes += own.nbytes
            for parameter, gradient in zip(bucket, unpacked(_total(root, everything, places), bucket), strict=True):
                parameter.grad = gradient
        self.group.completed()


def _added(left: Gradients, right: Gradients) -> Gradients:
    """Add two nodes' gradients, into those of the left one."""
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(left, right, strict=True)]


def _total(node: Node, everything: Tensor, places: dict[Node, int]) -> Tensor:
    """Add up what lies below a node, in the order of the tree.

    Args:
        everything: the exchanged nodes, packed, one in a row.
        places: row of each node.
    """
    if (row := places.get(node)) is not None:
        return everything[row]
    left, right = (_total(child, everything, places) for child in node.children)
    return left + right
