"""A rank for every layer under the budget of one rank for all: where an update needs more directions, it gets them.

    maximise  sum over l of e_l(1) + ... + e_l(r_l)      e_l(k): share of layer l's energy in its k-th direction
    subject to  sum over l of r_l (in_l + out_l) <= r sum over l of (in_l + out_l),   r/4 <= r_l <= 2r

Energies are squared singular values, so every e_l falls with k, and the greedy choice, always the direction that
captures most per parameter, is the best there is where all directions cost the same; else it misses at most the energy
of one direction. AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) prunes towards such a budget while it trains; PreLoRA
(arXiv 2509.21619) sets ranks at the switch, as is done here. The price is that of the spectra (see `train.decisions`).
"""

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from relora.lowrank.config import LowRankConfig

T = TypeVar("T", int, float)


def allocate(spectra: Mapping[str, Sequence[float]], shapes: Mapping[str, tuple[int, int]], r: int) -> dict[str, int]:
    """Ranks by name, of no more parameters together than `r` for every layer has.

    Args:
        spectra: squared singular values of every layer's update, descending.
        shapes: of the weights, [out, in] either way round; r is at most the smaller side of each.
    """
    ranks = {name: max(1, -(-r // 4)) for name in spectra}
    most = {name: min(2 * r, *shapes[name]) for name in spectra}
    left = sum((r - rank) * sum(shapes[name]) for name, rank in ranks.items())
    totals = {name: math.fsum(spectrum) for name, spectrum in spectra.items()}

    def gain(name: str) -> tuple[float, int, str]:
        """Of the next direction, negative: the heap has the smallest first; what gains alike grows alike."""
        k, spectrum = ranks[name], spectra[name]
        share = spectrum[k] / totals[name] if k < len(spectrum) and totals[name] > 0 else 0.0
        return -share / sum(shapes[name]), k, name

    heap = [gain(name) for name in spectra if ranks[name] < most[name]]
    heapq.heapify(heap)
    while heap:
        *_, name = heapq.heappop(heap)
        if sum(shapes[name]) > left:
            continue  # another may be small enough
        left -= sum(shapes[name])
        ranks[name] += 1
        if ranks[name] < most[name]:
            heapq.heappush(heap, gain(name))
    return ranks


def with_ranks(config: LowRankConfig, ranks: Mapping[str, int]) -> LowRankConfig:
    """The same with these ranks for the layers at these paths, and the scaling that they all had."""
    alphas = {name: config.scaling * (math.sqrt(r) if config.rslora else r) for name, r in ranks.items()}
    return replace(
        config,
        rank_pattern={**_exactly(ranks), **config.rank_pattern},
        alpha_pattern={**_exactly(alphas), **config.alpha_pattern},
    )


def _exactly(values: Mapping[str, T]) -> dict[str, T]:
    """One pattern for all paths of a value; it matches whole paths, though patterns are matched at the end."""
    paths: dict[T, list[str]] = {}
    for name, value in values.items():
        paths.setdefault(value, []).append(re.escape(name))
    return {f"^({'|'.join(names)})": value for value, names in paths.items()}
