"""Hashes see every bit; slow ranks are named once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from relora.distributed.agree import _first_difference, tensor_hashes
from relora.distributed.pace import LOGS, Pace


@given(st.integers(1, 5000), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]))
def test_every_bit_counts(size: int, data: st.DataObject, dtype: torch.dtype) -> None:
    """One bit anywhere, and two entries exchanged, change the hash of their tensor and of no other."""
    tensor = torch.arange(size * dtype.itemsize, dtype=torch.int64).remainder(251).to(torch.uint8).view(dtype)
    before = tensor_hashes({"first": torch.ones(3), "second": tensor})
    raw = tensor.clone().view(torch.uint8)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    after = tensor_hashes({"first": torch.ones(3), "second": raw.view(dtype)})
    assert before[0] == after[0] and before[1] != after[1]


def test_order_counts() -> None:
    tensor = torch.randn(4096)
    exchanged = torch.cat([tensor[2048:], tensor[:2048]])
    assert tensor_hashes({"one": tensor})[0] != tensor_hashes({"one": exchanged})[0]
    assert tensor_hashes({"one": torch.tensor([1.0, 2.0])})[0] != tensor_hashes({"one": torch.tensor([2.0, 1.0])})[0]


def test_the_first_tensor_and_the_odd_rank_are_named() -> None:
    names = ["a", "b", "c"]
    found = [(names, [1, 2, 3]), (names, [1, 2, 3]), (names, [1, 5, 4])]
    assert _first_difference(found) == "rank 2 has another b than the rest"
    assert "rank 1" in _first_difference([(names, [1, 2, 3]), (["a", "d", "c"], [1, 2, 3]), (names, [1, 2, 3])])


def test_a_slow_rank_is_named_once_after_some_logs() -> None:
    pace = Pace()
    found = [pace.slow_ranks([1.0, 1.1, 2.4, 0.9]) for _ in range(LOGS + 2)]
    assert found == [{}] * (LOGS - 1) + [{2: 2.4}] + [{}] * 2
    assert all(not Pace().slow_ranks(seconds) for seconds in ([1.0], [], [0.0, 0.0]))
