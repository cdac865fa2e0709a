from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.pretraining.batches import HeldOut, TrainBatches, check_same_tokenizer
from relora.data.sampling import BLOCK, permute
from relora.errors import UserError
from relora.model.head import IGNORED


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_looks_random_and_depends_on_its_key() -> None:
    size = 5000
    orders = [permute(np.arange(size), size, key) for key in range(20)]
    for order, other in pairwise(orders):
        assert np.count_nonzero(order == other) < 10  # two random orders agree in about one place
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.06
        assert np.count_nonzero(np.diff(order) == 1) < 10  # neighbours do not stay neighbours


def test_permute_does_not_need_the_whole_range() -> None:
    size = 10**12
    assert permute(np.array([5, size - 1]), size, 3).tolist() == [
        permute(np.array([position]), size, 3).item() for position in (5, size - 1)
    ]


@settings(max_examples=30)
@given(tokens=st.integers(2, 400), length=st.integers(1, 20), sequences=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_token_is_a_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, write_folder, tokens: int, length: int, sequences: int, seed: int
) -> None:
    windows = (tokens - 1) // length
    if windows < sequences:
        return
    folder = write_folder(tmp_path_factory.mktemp("folder"), range(tokens))
    batches = TrainBatches([(folder, 1.0)], length, sequences, seed)
    assert batches.epoch_sequences == windows
    steps = -(-2 * windows // sequences)
    rows = torch.cat([batches.batch(step).labels for step in range(steps)])
    for epoch in range(2):
        targets = rows[epoch * windows : (epoch + 1) * windows].flatten().tolist()
        assert sorted(targets) == list(range(1, windows * length + 1))
    assert tokens - 1 - windows * length < length  # what is left out is less than a window


def test_labels_are_the_next_tokens(tmp_path: Path, write_folder) -> None:
    batch = TrainBatches([(write_folder(tmp_path, range(1000)), 1.0)], 16, 4, 0).batch(3)
    assert batch.input_ids.shape == batch.labels.shape == (4, 16)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, batch.input_ids + 1)


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, range(1000))
    batches = TrainBatches([(folder, 1.0)], 8, 4, 0)
    later_first = [batches.batch(step).input_ids for step in (9, 2, 40)]
    fresh = TrainBatches([(folder, 1.0)], 8, 4, 0)
    assert all(map(torch.equal, later_first, (fresh.batch(step).input_ids for step in (9, 2, 40))))
    assert not torch.equal(later_first[0], TrainBatches([(folder, 1.0)], 8, 4, 1).batch(9).input_ids)


def test_the_batch_size_does_not_change_the_order(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, range(1000))
    small, large = (TrainBatches([(folder, 1.0)], 8, sequences, 0) for sequences in (4, 12))
    assert torch.equal(torch.cat([small.batch(step).labels for step in range(3)]), large.batch(0).labels)


def test_the_order_is_pinned(tmp_path: Path, write_folder) -> None:
    """A run continues under a later release only while this order stays."""
    batches = TrainBatches([(write_folder(tmp_path, range(101)), 1.0)], 10, 10, 0)
    assert [(batches.batch(step).input_ids[:, 0] // 10).tolist() for step in range(2)] == [
        [8, 1, 4, 9, 2, 3, 6, 0, 5, 7],
        [5, 8, 1, 3, 7, 2, 4, 6, 0, 9],
    ]


def test_a_mixture_keeps_its_weights_and_its_epochs(tmp_path: Path, write_folder) -> None:
    large = write_folder(tmp_path / "large", range(401))
    small = write_folder(tmp_path / "small", range(1000, 1101))
    batches = TrainBatches([(large, 3.0), (small, 1.0)], 10, 8, 0)
    assert batches.tokens_per_step == 80
    firsts = torch.cat([batches.batch(step).input_ids[:, 0] for step in range(20)]).tolist()
    from_large = [first for first in firsts if first < 1000]
    from_small = [first for first in firsts if first >= 1000]
    assert (len(from_large), len(from_small)) == (120, 40)
    assert all(count == 3 for count in Counter(from_large).values())  # 40 windows, three epochs
    assert all(count == 4 for count in Counter(from_small).values())  # 10 windows, four epochs
    # every batch holds its share: the slots of a source lie evenly
    assert all(1 <= sum(first >= 1000 for first in firsts[at : at + 8]) <= 3 for at in range(0, 160, 8))


def test_a_mixture_continues_across_blocks(tmp_path: Path, write_folder) -> None:
    folders = [write_folder(tmp_path / str(number), range(number * 1000, number * 1000 + 501)) for number in range(3)]
    batches = TrainBatches([(folder, 1.0) for folder in folders], 10, 100, 0)
    steps = range(BLOCK // 100 - 1, BLOCK // 100 + 20)  # from just before the end of the first block
    firsts = torch.cat([batches.batch(step).input_ids[:, 0] for step in steps])
    counts = [int((firsts // 1000 == number).sum()) for number in range(3)]
    assert sum(counts) == 2100
    assert max(counts) - min(counts) <= 2


def test_too_little_text_is_refused(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, range(100))
    with pytest.raises(UserError, match=r"100 tokens, one batch of 12 sequences needs 121; .*batch\.sequences"):
        TrainBatches([(folder, 1.0)], 10, 12, 0)
    with pytest.raises(UserError, match=r"100 tokens, one sequence needs 101; .*data\.sequence_length"):
        TrainBatches([(folder, 1.0)], 100, 1, 0)


def test_a_weight_that_rounds_to_nothing_is_refused(tmp_path: Path, write_folder) -> None:
    folders = [write_folder(tmp_path / str(number), range(100)) for number in range(2)]
    with pytest.raises(UserError, match=r"1: weight 1e-06 is less than 1 in 10000"):
        TrainBatches([(folders[0], 1.0), (folders[1], 1e-6)], 10, 2, 0)


def test_folders_of_two_tokenizers_are_refused(tmp_path: Path, write_folder) -> None:
    one, other = (write_folder(tmp_path / name, range(100), fingerprint=name) for name in "ab")
    check_same_tokenizer([one, one])
    with pytest.raises(UserError, match=r"b: prepared with another tokenizer than .*a; .*--tokenizer"):
        TrainBatches([(one, 1.0), (other, 1.0)], 10, 2, 0)


@settings(max_examples=40)
@given(tokens=st.integers(2, 300), asked=st.integers(2, 400), length=st.integers(1, 20), sequences=st.integers(1, 9))
def test_held_out_counts_every_token_but_the_first_once(
    tmp_path_factory: pytest.TempPathFactory, write_folder, tokens: int, asked: int, length: int, sequences: int
) -> None:
    folder = write_folder(tmp_path_factory.mktemp("folder"), range(tokens))
    held_out = HeldOut(folder, length, asked, sequences)
    batches = list(held_out)
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    inputs = torch.cat([batch.input_ids for batch in batches]).flatten()
    counted = labels != IGNORED
    assert labels[counted].tolist() == list(range(1, min(tokens, asked)))
    assert torch.equal(inputs[counted] + 1, labels[counted])
    assert held_out.targets == int(counted.sum())
    assert len(held_out) == len(batches)
    assert all(batch.input_ids.shape[1] == length and len(batch.input_ids) <= sequences for batch in batches)
    assert int((~counted).sum()) < length  # filled up to a window, no further


SAMPLES = {
    "tokens": st.integers(2, 300),
    "asked": st.integers(2, 400),
    "length": st.integers(1, 20),
    "seed": st.integers(0, 3),
}


@settings(max_examples=60)
@given(**SAMPLES)
def test_a_held_out_sample_is_of_whole_windows_and_bounded(
    tmp_path_factory: pytest.TempPathFactory, write_folder, tokens: int, asked: int, length: int, seed: int
) -> None:
    """Windows are those of the whole, none twice, and the same for every batch size; a short one only if it is last."""
    folder = write_folder(tmp_path_factory.mktemp("folder"), range(tokens))
    sample = HeldOut(folder, length, asked, 4, seed=seed)
    rows = [row[row != IGNORED].tolist() for batch in sample for row in batch.labels]
    assert rows == [
        row[row != IGNORED].tolist() for batch in HeldOut(folder, length, asked, 1, seed=seed) for row in batch.labels
    ]
    inputs = [row for batch in sample for row in batch.input_ids]
    assert all(ids[: len(row)].tolist() == [label - 1 for label in row] for ids, row in zip(inputs, rows, strict=True))
    assert sample.whole_targets == tokens - 1
    assert sample.targets == sum(map(len, rows)) <= asked
    assert len(sample) == -(-len(rows) // 4)
    assert rows == sorted(rows) and all(row[0] % length == 1 % length for row in rows)
    if tokens - 1 <= asked:
        assert [label for row in rows for label in row] == list(range(1, tokens))
    else:
        assert len(rows) == max(1, asked // length)
        assert all(len(row) == min(length, asked) for row in rows if row[-1] != tokens - 1)


def test_a_held_out_sample_is_drawn_from_the_whole_by_the_seed(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, range(10_000))

    def starts(seed: int, asked: int = 1_000) -> list[int]:
        return [int(row[0]) for batch in HeldOut(folder, 10, asked, 8, seed=seed) for row in batch.input_ids]

    assert starts(0) == starts(0) != starts(1)
    assert len(set(starts(0))) == 100
    assert [start // 100 for start in starts(0)] == list(range(100))  # one of every hundredth of the text
    assert [start // 200 for start in starts(3, 500)] == list(range(50))


def test_held_out_needs_a_target(tmp_path: Path, write_folder) -> None:
    with pytest.raises(UserError, match="at least 2 tokens, here are 1"):
        HeldOut(write_folder(tmp_path, [7]), 10, 100, 2)
