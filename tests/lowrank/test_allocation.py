"""Allocation of ranks: within bounds and budget, as good as the optimum, and injected as they were chosen."""

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
def layers(draw: st.DrawFn, max_layers: int = 5, max_side: int = 12, *, same_shape: bool = False) -> Layers:
    """Draw (spectra, shapes, r); r is at most the smaller side of every shape."""
    names = [f"layer{n}" for n in range(draw(st.integers(1, max_layers)))]
    side = st.integers(1, max_side)
    common_shape = draw(st.tuples(side, side))
    shapes = {name: common_shape if same_shape else draw(st.tuples(side, side)) for name in names}
    r = draw(st.integers(1, min(min(shape) for shape in shapes.values())))
    spectra = {
        name: sorted(draw(st.lists(st.floats(0, 1e3), min_size=min(shape), max_size=min(shape))), reverse=True)
        for name, shape in shapes.items()
    }
    return spectra, shapes, r


def parameter_count(ranks: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def captured(ranks: dict[str, int], spectra: dict[str, list[float]]) -> float:
    """Sum over the layers of the share of energy that their first directions hold."""
    return sum(sum(spectra[name][:rank]) / (sum(spectra[name]) or 1.0) for name, rank in ranks.items())


def bounds(shape: tuple[int, int], r: int) -> range:
    return range(math.ceil(r / 4), min(2 * r, *shape) + 1)


def best_possible(spectra: dict[str, list[float]], shapes: dict[str, tuple[int, int]], r: int) -> float:
    """Return the largest captured energy within the budget, by trying all ranks."""
    budget = parameter_count(dict.fromkeys(shapes, r), shapes)
    choices = itertools.product(*(bounds(shapes[name], r) for name in spectra))
    allowed = (dict(zip(spectra, ranks, strict=True)) for ranks in choices)
    return max(captured(ranks, spectra) for ranks in allowed if parameter_count(ranks, shapes) <= budget)


@given(layers())
def test_within_the_bounds_and_the_budget_of_the_uniform_rank(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    uniform = dict.fromkeys(shapes, r)
    assert ranks.keys() == spectra.keys()
    assert all(rank in bounds(shapes[name], r) for name, rank in ranks.items())
    left = parameter_count(uniform, shapes) - parameter_count(ranks, shapes)
    assert left >= 0
    for name, rank in ranks.items():  # no further direction fits into the budget
        assert sum(shapes[name]) > left or rank == bounds(shapes[name], r)[-1]


@given(layers(max_layers=3, max_side=6, same_shape=True))
def test_optimal_if_all_layers_have_one_shape(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    assert captured(ranks, spectra) == pytest.approx(best_possible(spectra, shapes, r), rel=1e-9)


@given(layers(max_layers=3, max_side=6))
def test_otherwise_it_misses_at_most_one_direction(given: Layers) -> None:
    spectra, shapes, r = given
    ranks = allocate(spectra, shapes, r)
    next_directions = [spectra[n][ranks[n]] / (sum(spectra[n]) or 1.0) for n in spectra if ranks[n] < len(spectra[n])]
    assert captured(ranks, spectra) >= best_possible(spectra, shapes, r) - max(next_directions, default=0.0) - 1e-9


def test_ranks_go_where_the_energy_is() -> None:
    """One layer has an update of rank one, the other one whose directions have equal energies."""
    spectra = {"steep": [1.0, *[0.0] * 15], "flat": [1.0] * 16}
    assert allocate(spectra, dict.fromkeys(spectra, (16, 16)), 4) == {"steep": 1, "flat": 7}


def test_energies_are_relative_to_their_layer() -> None:
    """An update that is a thousand times larger than another does not get more ranks for that."""
    spectra = {"small": [3e-3, 2e-3, 1e-3, 0.0], "large": [3.0, 2.0, 1.0, 0.0]}
    assert allocate(spectra, dict.fromkeys(spectra, (4, 4)), 2) == {"small": 2, "large": 2}


def test_without_any_energy_all_ranks_are_equal() -> None:
    spectra = {name: [0.0] * 8 for name in "abc"}
    assert allocate(spectra, dict.fromkeys(spectra, (8, 8)), 3) == {"a": 3, "b": 3, "c": 3}


class AmbiguousPaths(nn.Module):
    """Model with a path that ends like another one, and a path with a special character of regular expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.inner = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "a+b": nn.Linear(8, 8)})


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_are_injected_with_the_scaling_of_the_uniform_one(rslora: bool) -> None:
    ranks = {"blocks.0": 2, "blocks.1": 5, "inner.blocks.0": 3, "inner.a+b": 5}
    config = LowRankConfig(r=4, lora_alpha=6, rslora=rslora, target_modules=".*")
    model = AmbiguousPaths()
    inject(model, with_ranks(config, ranks))
    found = low_rank_layers(model)
    assert {name: layer.r for name, layer in found.items()} == ranks
    assert [layer.scaling for layer in found.values()] == pytest.approx([config.scaling] * 4)


def test_no_ranks_leave_the_configuration_unchanged() -> None:
    config = LowRankConfig(r=4)
    assert with_ranks(config, {}) == config
