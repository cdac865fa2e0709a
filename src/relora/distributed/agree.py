"""Agreement between the ranks: one configuration and one set of data at the start, and the same weights ever after.

Replicas compute each update by themselves, from the same sums. One extra random draw, one flipped bit or another
library on one rank, and they drift apart without a sign: the losses still look alike. So a hash of every tensor is
compared after each restart and at each save, and the first tensor that differs stops the run.

    hash of a tensor = sum over rows i of (2 i + 1) · (sum of the row's 512 words of 8 bytes)  mod 2^64

The words are the tensor's bits, and those that fill no row count one by one. That is one pass over the memory (13 GB a
second of one core; sums of shorter words are 20 times as slow), and it changes with every single bit and with the order
of rows. It is no protection against somebody who wants two tensors to have the same hash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relora.distributed.group import Group
from relora.errors import RunStopped, UserError

_ROW_WORDS = 512


class RankDrift(RunStopped):
    """A tensor is not the same on all ranks."""


def tensor_hashes(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the hash of each tensor, in order: [n] int64 on the CPU."""
    return torch.stack([_hash(tensor) for tensor in tensors.values()]).cpu() if tensors else torch.zeros(0).long()


def check_equal(group: Group, tensors: Mapping[str, Tensor], when: str, sharers: int = 1) -> None:
    """Compare tensors by their hashes with those of the other ranks; do nothing alone.

    Args:
        sharers: number of consecutive ranks that share one copy of the tensors; then a rank is compared with those that
            have the same part of another copy.

    Raises:
        RankDrift: one differs; the message names the first, and the ranks that differ from the majority.
    """
    if group.world == sharers:
        return
    hashes = tensor_hashes(tensors)
    numbers = torch.arange(1, len(hashes) + 1) * 2 - 1
    digests = torch.zeros(group.world, 2, dtype=torch.int64)
    digests[group.rank] = torch.stack([(hashes * numbers).sum(), torch.tensor(len(hashes))])
    copies = group.sum_(digests).view(-1, sharers, 2)
    if bool((copies == copies[0]).all()):
        return
    everything = group.gather([list(tensors), hashes.tolist()])
    for part in range(sharers):
        same_part = everything[part::sharers]
        if any(other != same_part[0] for other in same_part):
            common = max(same_part, key=same_part.count)
            everything = [own if rank % sharers == part else common for rank, own in enumerate(everything)]
            break
    raise RankDrift(f"{_first_difference(everything)} {when}; the ranks have drifted apart, so nothing was saved")


def check_same(group: Group, facts: Mapping[str, Any]) -> None:
    """Compare facts about what the ranks are to train, before they begin.

    Args:
        facts: JSON values by the name under which the user knows them.

    Raises:
        UserError: one differs; the message names the first, two ranks and their values.
    """
    found = group.gather(facts)
    for rank, other in enumerate(found[1:], start=1):
        for name in (*found[0], *other):
            here, there = found[0].get(name), other.get(name)
            if here != there:
                raise UserError(
                    f"{name}: {_short(here)} on rank 0, {_short(there)} on rank {rank}; all ranks have to train by one "
                    "configuration on the same data"
                )


def _hash(tensor: Tensor) -> Tensor:
    """Hash the bits of one tensor: int64 scalar on its device."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64)
    rows = words[: len(words) // _ROW_WORDS * _ROW_WORDS].view(-1, _ROW_WORDS)
    odd = torch.arange(len(rows), device=tensor.device) * 2 + 1
    rest = torch.cat([words[rows.numel() :], flat[whole:].long()])
    factors = torch.arange(len(rest), device=tensor.device) * 2 + 1
    return (rows.sum(1) * odd).sum() + (rest * factors).sum() * 31


def _first_difference(everything: Sequence[tuple[list[str], list[int]]]) -> str:
    """Describe the first tensor that is not the same on all ranks.

    Args:
        everything: for each rank the names of its tensors and their hashes.
    """
    for names in zip(*(names for names, _ in everything), strict=False):
        if len({*names}) > 1:
            return f"rank {_odd_ones(names)} has other tensors than the rest ({', '.join(sorted({*names}))})"
    for index, name in enumerate(everything[0][0]):
        hashes = [hashes[index] if index < len(hashes) else None for _, hashes in everything]
        if len({*hashes}) > 1:
            return f"rank {_odd_ones(hashes)} has another {name} than the rest"
    return f"rank {_odd_ones([len(names) for names, _ in everything])} has more or fewer tensors than the rest"


def _odd_ones(values: Sequence[Any]) -> str:
    """Name the ranks whose value is not the most frequent one; where two are as frequent, not that of rank 0."""
    common = max(values, key=lambda value: (values.count(value), value == values[0]))
    return ", ".join(str(rank) for rank, value in enumerate(values) if value != common)


def _short(value: Any) -> str:
    """Write a value for a message, cut where it is long."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
