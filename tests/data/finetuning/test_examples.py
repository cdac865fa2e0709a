from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.finetuning.examples import POOL, Example, ExampleBatches, HeldOutExamples, fingerprint
from relora.errors import UserError
from relora.model.head import IGNORED

PAD = 9_999


def example(number: int, size: int) -> Example:
    """Tokens that say whose they are, the first third of them not scored."""
    ids = np.arange(size, dtype=np.int32) + 100 * number
    return Example(ids, np.arange(size) >= size // 3, f"record {number}")


def of_sizes(sizes: list[int]) -> list[Example]:
    return [example(number, size) for number, size in enumerate(sizes)]


def labels_of(one: Example) -> list[int]:
    return one.input_ids[1:][one.scored[1:]].tolist()


def rows_of(batches: ExampleBatches, steps: int) -> list[tuple[torch.Tensor, ...]]:
    """(input_ids, labels, ...) of each row, in order."""
    return [row for number in range(steps) for row in zip(*batches.batch(number), strict=True)]


SIZES = st.lists(st.integers(2, 30), min_size=1, max_size=40)


@settings(max_examples=60)
@given(sizes=SIZES, sequences=st.integers(1, 8), packing=st.booleans(), grouped=st.booleans(), seed=st.integers(0, 3))
def test_every_scored_token_is_a_target_once_an_epoch(
    sizes: list[int], sequences: int, packing: bool, grouped: bool, seed: int
) -> None:
    examples = of_sizes(sizes)
    options = {"packing": packing, "group_by_length": grouped, "seed": seed}
    once = ExampleBatches(examples, sequences=1, sequence_length=40, pad_id=PAD, **options)
    size = len(once.rows)
    if size < sequences:
        return
    batches = ExampleBatches(examples, sequences=sequences, sequence_length=40, pad_id=PAD, **options)
    assert batches.steps_per_epoch == -(-size // sequences)
    wanted = Counter(label for one in examples for label in labels_of(one))
    rows = rows_of(batches, 2 * batches.steps_per_epoch)
    for epoch in range(2):
        labels = torch.cat([row[1] for row in rows[epoch * size : (epoch + 1) * size]])
        assert Counter(labels[labels != IGNORED].tolist()) == wanted


@settings(max_examples=60)
@given(sizes=SIZES, packing=st.booleans(), length=st.integers(29, 45))
def test_rows_hold_their_examples_and_nothing_else(sizes: list[int], packing: bool, length: int) -> None:
    examples = of_sizes(sizes)
    batches = ExampleBatches(examples, sequences=1, sequence_length=length, pad_id=PAD, packing=packing)
    seen = []
    for input_ids, labels, *others in rows_of(batches, len(batches.rows)):
        width = len(input_ids)
        assert len(others) == packing
        starts = [at for at in range(width) if input_ids[at] != PAD and input_ids[at] % 100 == 0]
        numbers = [int(input_ids[at]) // 100 for at in starts]
        seen += numbers
        end = starts[0]
        assert end == 0
        for number in numbers:
            one = examples[number]
            begin, end = end, end + one.positions
            assert input_ids[begin:end].tolist() == one.input_ids[:-1].tolist()
            assert labels[begin:end].tolist() == np.where(one.scored, one.input_ids, IGNORED)[1:].tolist()
            if packing:
                assert others[0][begin:end].tolist() == list(range(one.positions))
        assert set(input_ids[end:].tolist()) <= {PAD}
        assert set(labels[end:].tolist()) <= {IGNORED}
        if packing:
            assert others[0][end:].tolist() == list(range(width - end))
        assert width <= length
        assert width == end or (width - end < 8 and (width % 8 == 0 or width == length))
    assert sorted(seen) == list(range(len(examples)))


def test_a_batch_is_as_wide_as_its_longest_row() -> None:
    batches = ExampleBatches(of_sizes([3, 12, 5, 18]), sequences=4, sequence_length=100, pad_id=PAD)
    input_ids, labels = batches.batch(0)
    assert input_ids.shape == labels.shape == (4, 24)
    assert input_ids.dtype == labels.dtype == torch.int64
    narrow = ExampleBatches(of_sizes([3, 12, 5, 18]), sequences=4, sequence_length=19, pad_id=PAD)
    assert narrow.batch(0)[0].shape == (4, 19)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_batch_depends_on_seed_and_number_alone(packing: bool, grouped: bool) -> None:
    examples = of_sizes([2 + number * 7 % 19 for number in range(50)])

    def batches(seed: int = 0) -> ExampleBatches:
        return ExampleBatches(
            examples, sequences=4, sequence_length=32, pad_id=0, packing=packing, group_by_length=grouped, seed=seed
        )

    numbers = [90, 3, 41, 0, 89]
    later_first = batches()
    found = [later_first.batch(number)[0] for number in numbers]
    assert all(torch.equal(ids, batches().batch(number)[0]) for ids, number in zip(found, numbers, strict=True))
    assert not torch.equal(batches(0).batch(3)[0], batches(1).batch(3)[0])


@pytest.mark.parametrize(
    ("grouped", "order"),
    [
        (False, [[9, 5, 2, 4], [0, 3, 7, 1], [6, 8, 2, 1], [0, 9, 4, 8], [6, 5, 7, 3]]),
        (True, [[0, 3, 9, 1], [4, 7, 2, 5], [6, 8, 2, 1], [4, 7, 5, 8], [0, 3, 6, 9]]),
    ],
)
def test_the_order_is_pinned(grouped: bool, order: list[list[int]]) -> None:
    """A run continues under a later release only while this order stays."""
    batches = ExampleBatches(
        of_sizes([2 + number * 7 % 19 for number in range(10)]),
        sequences=4,
        sequence_length=32,
        pad_id=0,
        group_by_length=grouped,
    )
    assert [(batches.batch(number)[0][:, 0] // 100).tolist() for number in range(5)] == order


def test_the_packed_order_is_pinned() -> None:
    batches = ExampleBatches(
        of_sizes([2 + number * 7 % 19 for number in range(10)]), sequences=2, sequence_length=32, pad_id=0, packing=True
    )
    assert batches.rows == [[8, 7, 0], [5, 2], [4, 1, 9, 6], [3]]


def test_grouped_batches_hold_rows_of_about_one_length() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    examples = [example(0, int(size)) for size in draw.integers(2, 500, 4 * POOL * 8 + 3)]

    def padding(grouped: bool) -> list[float]:
        batches = ExampleBatches(
            examples, sequences=8, sequence_length=512, pad_id=PAD, group_by_length=grouped, seed=1
        )
        shares = []
        for epoch in range(2):  # the second begins within a batch
            inputs = [batches.batch(number)[0] for number in range(epoch * 201, epoch * 201 + 200)]
            shares.append(sum(int((ids == PAD).sum()) for ids in inputs) / sum(ids.numel() for ids in inputs))
        return shares

    assert max(padding(True)) < 0.04
    assert min(padding(False)) > 0.3


def test_grouped_batches_come_in_a_random_order() -> None:
    examples = of_sizes([2 + number % 97 for number in range(8 * 60)])
    batches = ExampleBatches(examples, sequences=8, sequence_length=128, pad_id=PAD, group_by_length=True)
    widths = [batches.batch(number)[0].shape[1] for number in range(60)]
    assert abs(np.corrcoef(widths, np.arange(60))[0, 1]) < 0.4
    assert len({tuple(sorted((batches.batch(number)[0][:, 0] // 100).tolist())) for number in range(120)}) > 100


def test_a_place_names_the_records() -> None:
    batches = ExampleBatches(of_sizes([5] * 12), sequences=6, sequence_length=8, pad_id=0)
    numbers = (batches.batch(1)[0][:, 0] // 100).tolist()
    assert batches.place(1, range(2, 4)) == f"batch 1: record {numbers[2]}, record {numbers[3]}"
    assert batches.place(1, range(6)).endswith(f"record {numbers[3]}, and 2 more")
    packed = ExampleBatches(of_sizes([5] * 12), sequences=2, sequence_length=8, pad_id=0, packing=True)
    first = [int(token) // 100 for token in packed.batch(0)[0][0] if token % 100 == 0]
    assert packed.place(0, range(1)) == f"batch 0: record {first[0]}, record {first[1]}"


def test_content_tells_examples_apart() -> None:
    one, other = example(1, 5), example(2, 5)
    longer, unscored = example(1, 6), Example(one.input_ids, np.zeros(5, dtype=np.bool_))
    sets = [[one], [other], [longer], [unscored], [one, other], [other, one], []]
    assert len({fingerprint(examples) for examples in sets}) == len(sets)
    assert fingerprint([one]) == fingerprint([Example(one.input_ids.copy(), one.scored.copy(), "elsewhere")])
    assert ExampleBatches([one], sequences=1, sequence_length=8, pad_id=0).content == fingerprint([one])
    assert fingerprint([one]) == "950518679b23e39efa44bd33c7ba487b"  # a run continues only while this stays


def test_too_few_or_too_long_examples_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 examples, one batch needs 4; give more or lower batch\.sequences"):
        ExampleBatches(of_sizes([3] * 3), sequences=4, sequence_length=8, pad_id=0)
    with pytest.raises(UserError, match="9 examples in 3 packed rows, one batch needs 4"):
        ExampleBatches(of_sizes([3] * 9), sequences=4, sequence_length=6, pad_id=0, packing=True)
    with pytest.raises(UserError, match="examples of up to 10 tokens do not fit sequences of 8"):
        ExampleBatches(of_sizes([9, 10]), sequences=1, sequence_length=8, pad_id=0)
    with pytest.raises(UserError, match="0 examples in 0 packed rows, one batch needs 1"):
        ExampleBatches([], sequences=1, sequence_length=8, pad_id=0, packing=True, group_by_length=True)


@settings(max_examples=60)
@given(sizes=SIZES, tokens=st.integers(1, 300), sequences=st.integers(1, 5))
def test_held_out_scores_the_same_sample_again_and_again(sizes: list[int], tokens: int, sequences: int) -> None:
    examples = of_sizes(sizes)
    held_out = HeldOutExamples(examples, micro_sequences=sequences, pad_id=PAD, tokens=tokens)
    passes = [list(held_out), list(held_out)]
    assert len(passes[0]) == len(held_out)
    assert all(torch.equal(one, other) for pair in zip(*passes, strict=True) for one, other in zip(*pair, strict=True))
    assert all(len(ids) <= sequences and ids.shape == labels.shape for ids, labels in passes[0])
    found = Counter(label for _, labels in passes[0] for label in labels[labels != IGNORED].tolist())
    assert found == Counter(label for one in held_out.examples for label in labels_of(one))
    assert found.total() == held_out.targets
    assert held_out.whole_targets == sum(len(labels_of(one)) for one in examples)
    assert found.total() <= tokens or len([one for one in held_out.examples if one.targets]) == 1
    if held_out.whole_targets <= tokens:
        assert len(held_out.examples) == len(examples)
    widths = [ids.shape[1] for ids, _ in passes[0]]
    assert widths == sorted(widths, reverse=True)
    other = HeldOutExamples(examples, micro_sequences=9, pad_id=0, tokens=tokens)
    assert [one.where for one in other.examples] == [one.where for one in held_out.examples]
    assert held_out.content == HeldOutExamples(examples, micro_sequences=9, pad_id=0).content  # of all of them


def test_a_held_out_sample_is_drawn_from_all_examples_by_the_seed() -> None:
    examples = of_sizes([10 + number % 7 for number in range(300)])

    def numbers(seed: int) -> set[int]:
        held_out = HeldOutExamples(examples, micro_sequences=4, pad_id=PAD, tokens=500, seed=seed)
        return {int(one.input_ids[0]) // 100 for one in held_out.examples}

    assert numbers(0) == numbers(0) != numbers(1)
    assert min(numbers(0)) < 60 and max(numbers(0)) > 240  # the first ones alone would end before 60


def test_held_out_needs_an_example() -> None:
    with pytest.raises(UserError, match="evaluation needs at least one example, here is none"):
        HeldOutExamples([], micro_sequences=1, pad_id=0, tokens=10)
