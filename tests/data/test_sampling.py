"""Samples of held-out items: evenly spread, bounded, and nearer to the whole than samples drawn at random."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.sampling import keyed_sample, permute, spread


@settings(max_examples=200)
@given(size=st.integers(1, 300), data=st.data(), key=st.integers(0, 2**63 - 1))
def test_each_equal_stretch_has_one_element_of_a_sample(size: int, data: st.DataObject, key: int) -> None:
    count = data.draw(st.integers(1, size))
    drawn = spread(count, size, key)
    assert drawn.min() >= 0 and drawn.max() < size and len(set(drawn.tolist())) == count
    assert set(np.diff(drawn).tolist()) <= {size // count, -(-size // count)}
    if count == size:
        assert drawn.tolist() == list(range(size))


def test_every_element_is_drawn_equally_often() -> None:
    drawn = np.concatenate([spread(7, 30, key) for key in range(30)])
    assert np.bincount(drawn, minlength=30).tolist() == [7] * 30


@settings(max_examples=200)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=60), most=st.integers(1, 400), key=st.integers(0, 9))
def test_sizes_of_a_sample_are_bounded(sizes: list[int], most: int, key: int) -> None:
    given_sizes = np.array(sizes, dtype=np.int64)
    drawn = keyed_sample(given_sizes, most, key)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    total = given_sizes[drawn].sum()
    if given_sizes.sum() <= most:
        assert len(drawn) == len(sizes)
    else:
        assert total > 0 and (total <= most or len(drawn) == 1)


def test_neighbours_that_resemble_each_other_are_no_bias() -> None:
    """Chapters of different difficulty: the error of a sample's mean is a fraction of that of one drawn at random."""
    losses = np.repeat(np.random.default_rng(0).normal(4.6, 0.5, size=30), 12)
    even = [losses[spread(80, 360, key)].mean() - losses.mean() for key in range(0, 360, 5)]
    at_random = [losses[permute(np.arange(80), 360, key)].mean() - losses.mean() for key in range(72)]
    assert np.square(even).mean() < 0.25 * np.square(at_random).mean()
