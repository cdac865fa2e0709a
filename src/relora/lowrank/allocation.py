"""Allocation of a rank to every layer, within the parameter budget of one rank for all layers.

    maximise  sum over l of e_l(1) + ... + e_l(r_l)      e_l(k): share of layer l's energy in its k-th direction
    subject to  sum over l of r_l (in_l + out_l) <= r sum over l of (in_l + out_l),   r/4 <= r_l <= 2r

Energies are squared singular values, so every e_l falls with k. The greedy algorithm always adds the direction that
captures the most energy per parameter. It is optimal if all directions cost the same, and misses at most the energy of
one direction otherwise. AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) prunes towards such a budget during training;
PreLoRA (arXiv 2509.21619) chooses ranks at the switch to low rank, as this module does. The price is that of the
spectra (see `train.adaptive`).
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
    """Return a rank for each layer, so that all factors together have no more parameters than with rank `r` everywhere.

    Args:
        spectra: squared singular values of each layer's update, descending, by the layer's name.
        shapes: shapes of the weights, [out, in] or [in, out]; r is at most the smaller side of each.
        r: the rank whose number of parameters is the budget.
    """
    ranks = {name: max(1, math.ceil(r / 4)) for name in spectra}
    largest_ranks = {name: min(2 * r, *shapes[name]) for name in spectra}
    parameters_left = sum((r - rank) * sum(shapes[name]) for name, rank in ranks.items())
    totals = {name: math.fsum(spectrum) for name, spectrum in spectra.items()}

    def priority(name: str) -> tuple[float, int, str]:
        """Sort key of a layer: first the layer whose next direction captures the most energy per parameter.

        Between equal gains the layer with the smaller rank comes first, so that such layers grow together.
        """
        k, spectrum = ranks[name], spectra[name]
        share = spectrum[k] / totals[name] if k < len(spectrum) and totals[name] > 0 else 0.0
        return -share / sum(shapes[name]), k, name

    heap = [priority(name) for name in spectra if ranks[name] < largest_ranks[name]]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        direction_parameters = sum(shapes[name])
        if direction_parameters > parameters_left:
            continue  # a direction of a smaller layer may still fit
        parameters_left -= direction_parameters
        ranks[name] += 1
        if ranks[name] < largest_ranks[name]:
            heapq.heappush(heap, priority(name))
    return ranks


def with_ranks(config: LowRankConfig, ranks: Mapping[str, int]) -> LowRankConfig:
    """Return the configuration with these ranks for the layers at these paths, and the same scale s as before.

    lora_alpha changes with the rank, so that s stays the one of `config`.
    """
    alphas = {name: config.scaling * (math.sqrt(r) if config.rslora else r) for name, r in ranks.items()}
    return replace(
        config,
        rank_pattern={**_exact_path_patterns(ranks), **config.rank_pattern},
        alpha_pattern={**_exact_path_patterns(alphas), **config.alpha_pattern},
    )


def _exact_path_patterns(values: Mapping[str, T]) -> dict[str, T]:
    """Return one pattern for each value, which matches exactly the paths that have this value.

    It is anchored at the start of the path, because patterns otherwise match the ends of paths.
    """
    paths: dict[T, list[str]] = {}
    for name, value in values.items():
        paths.setdefault(value, []).append(re.escape(name))
    return {f"^({'|'.join(names)})": value for value, names in paths.items()}
