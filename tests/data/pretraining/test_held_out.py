import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.data.pretraining.held_out import runs, settle
from relora.data.sampling import DRAWS, SplitRule
from relora.errors import UserError

BOOK = "\n\n".join(f"Paragraph {number}. " + "It was a dark night. " * 20 for number in range(300))


def test_many_documents_are_held_out_by_the_share() -> None:
    read: list[str] = []

    def documents() -> list[str]:
        return [str(number) for number in range(100_000)]

    def counted() -> object:
        for text in documents():
            read.append(text)
            yield text

    assert settle(counted, 0.01, seed=3) == (int(0.01 * DRAWS), False)
    assert len(read) < 2000  # up to the first that is held out


def test_without_a_share_nothing_is_read() -> None:
    assert settle(lambda: pytest.fail("read"), 0.0, seed=0) == (0, False)


def test_of_few_documents_one_is_held_out() -> None:
    texts = [f"document {number}" for number in range(20)]
    threshold, within_documents = settle(lambda: texts, 0.015, seed=0)
    assert not within_documents
    assert sum(SplitRule(0, threshold).is_held_out(text) for text in texts) == 1


@pytest.mark.parametrize("texts", [[BOOK], [BOOK] * 3, [BOOK, "small"]])
def test_of_too_few_documents_parts_are_held_out(texts: list[str]) -> None:
    threshold, within_documents = settle(lambda: texts, 0.05, seed=0)
    assert within_documents
    found = list(runs(texts, SplitRule(0, threshold)))
    assert "".join(text for text, _ in found) == "".join(texts)
    held_out = [text for text, is_held_out in found if is_held_out]
    assert 0.01 < sum(map(len, held_out)) / sum(map(len, texts)) < 0.1
    assert all(text.startswith("Paragraph") and text.endswith("\n\n") for text in held_out if text != "small")
    trained = [text for text, is_held_out in found if not is_held_out]
    assert not any(text in whole for text in held_out for whole in trained)


def test_texts_that_cannot_be_parted_are_refused() -> None:
    for texts in (["the same"] * 3, ["x" * 100]):
        with pytest.raises(UserError, match=rf"{len(texts)} document\(s\), too few to hold any out; .*--validation 0"):
            settle(lambda texts=texts: texts, 0.01, seed=0)
    with pytest.raises(UserError, match="the sources hold no text"):
        settle(list, 0.01, seed=0)


@given(
    words=st.lists(st.sampled_from(["a", "b\n", "c\n\n", "dd "]), max_size=2000),
    share=st.floats(0, 1),
    seed=st.integers(0, 3),
)
def test_runs_alternate_and_lose_nothing(words: list[str], share: float, seed: int) -> None:
    text = "".join(words) or "x"
    found = list(runs([text], SplitRule(seed, int(share * DRAWS))))
    assert "".join(part for part, _ in found) == text
    assert all(first[1] != second[1] for first, second in pairwise(found))


def test_the_choice_does_not_depend_on_the_order() -> None:
    texts = [f"document {number}" for number in range(30)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert settle(lambda: texts, 0.001, seed=1) == settle(lambda: shuffled, 0.001, seed=1)
