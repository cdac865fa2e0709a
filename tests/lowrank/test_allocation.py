"""Ranks by layer: within their bounds and the budget, as good as the best there is, injected as they were chosen."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.allocation import allocate, with_ranks

Layers = tuple[dict[str, list[float]], dict[str, tuple[int, int]], int]


@st.composite
def layers(draw: st.DrawFn, most_layers: int = 5, most_side: int = 12, *, alike: bool = False) -> Layers:
    """(spectra, shapes, r): r is at most the smaller side of each."""
    names = [f"layer{n}" for n in range(draw(st.integers(1, most_layers)))]
    side = st.integers(1, most_side)
    one = draw(st.tuples(side, side))
    shapes = {name: one if alike else draw(st.tuples(side, side)) for name in names}
    r = draw(st.integers(1, min(min(shape) for shape in shapes.values())))
    spectra = {
        name: sorted(draw(st.lists(st.floats(0, 1e3), min_size=min(shape), max_size=min(shape))), reverse=True)
        for name, shape in shapes.items()
    }
    return spectra, shapes, r


def price(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def captured(ranks: dict[str, int], spectra: dict[str, list[float]]) -> float:
    """Sum over the layers of the share of their energy."""
    return sum(sum(spectra[name][:rank]) / (sum(spectra[name]) or 1.0) for name, rank in ranks.items())


def bounds(shape: tuple[int, int], r: int) -> range:
    return range(math.ceil(r / 4), min(2 * r, *shape) + 1)


def best(spectra: dict[str, list[float]], shapes: dict[str, tuple[int, int]], r: int) -> float:
    """By trying all."""
    budget = price(dict.fromkeys(shapes, r), shapes)
    choices = itertools.product(*(bounds(shapes[name], r) for name in spectra))
    allowed = (dict(zip(spectra, ranks, strict=True)) for ranks in choices)
    return max(captured(ranks, spectra) for ranks in allowed if price(ranks, shapes) <= budget)


@given(layers())
def test_within_the_bounds_and_the_budget_of_the_uniform_rank(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    uniform = dict.fromkeys(shapes, r)
    assert ranks.keys() == spectra.keys()
    assert all(rank in bounds(shapes[name], r) for name, rank in ranks.items())
    left = price(uniform, shapes) - price(ranks, shapes)
    assert left >= 0
    for name, rank in ranks.items():  # nothing that fits is left
        assert sum(shapes[name]) > left or rank == bounds(shapes[name], r)[-1]


@given(layers(most_layers=3, most_side=6, alike=True))
def test_the_best_there_is_where_all_layers_cost_the_same(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    assert captured(ranks, spectra) == pytest.approx(best(spectra, shapes, r), rel=1e-9)


@given(layers(most_layers=3, most_side=6))
def test_else_it_misses_at_most_one_direction(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    rest = [spectra[n][ranks[n]] / (sum(spectra[n]) or 1.0) for n in spectra if ranks[n] < len(spectra[n])]
    assert captured(ranks, spectra) >= best(spectra, shapes, r) - max(rest, default=0.0) - 1e-9


def test_where_the_energy_is() -> None:
    """One layer of rank one beside one whose directions are all alike."""
    spectra = {"steep": [1.0, *[0.0] * 15], "flat": [1.0] * 16}
    assert allocate(spectra, dict.fromkeys(spectra, (16, 16)), 4) == {"steep": 1, "flat": 7}


def test_a_layer_counts_by_its_own_measure() -> None:
    """A gradient a thousand times as large says nothing of the rank."""
    spectra = {"small": [3e-3, 2e-3, 1e-3, 0.0], "large": [3.0, 2.0, 1.0, 0.0]}
    assert allocate(spectra, dict.fromkeys(spectra, (4, 4)), 2) == {"small": 2, "large": 2}


def test_of_nothing_follows_nothing() -> None:
    """Without any energy all grow alike."""
    spectra = {name: [0.0] * 8 for name in "abc"}
    assert allocate(spectra, dict.fromkeys(spectra, (8, 8)), 3) == {"a": 3, "b": 3, "c": 3}


class Twice(nn.Module):
    """Paths of which one ends like the other, and one holds what a regular expression reads otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.inner = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "a+b": nn.Linear(8, 8)})


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_are_injected_with_the_scaling_of_the_uniform_one(rslora: bool) -> None:
    ranks = {"blocks.0": 2, "blocks.1": 5, "inner.blocks.0": 3, "inner.a+b": 5}
    config = LowRankConfig(r=4, lora_alpha=6, rslora=rslora, target_modules=".*")
    model = Twice()
    inject(model, with_ranks(config, ranks))
    found = low_rank_layers(model)
    assert {name: layer.r for name, layer in found.items()} == ranks
    assert [layer.scaling for layer in found.values()] == pytest.approx([config.scaling] * 4)


def test_no_ranks_change_nothing() -> None:
    config = LowRankConfig(r=4)
    assert with_ranks(config, {}) == config
