"""A growing text is streamed as it is returned, however it is split into tokens; several are written in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.adapted import DATA, STORIES, needs_data
from transformers import AutoTokenizer

from relora.inference.growing_text import GrowingText, InOrder, possible_stop_chars

pytestmark = needs_data


@pytest.fixture(scope="module", params=["gpt2", "mistral-v1-32k", "STORIES"])
def tokenizer(request: pytest.FixtureRequest):
    return AutoTokenizer.from_pretrained(STORIES if request.param == "STORIES" else DATA / "tokenizers" / request.param)


@pytest.mark.parametrize(
    ("text", "stop", "held"),
    [
        ("a EN", ["END"], 2),
        ("a END", ["END"], 0),  # complete, so nothing is held back
        ("a", ["END"], 0),
        ("ababa", ["abac", "bab"], 3),
        ("\n", ["\n\n"], 1),
        ("x", [], 0),
    ],
)
def test_a_possible_beginning_of_a_stop_string_is_counted(text: str, stop: list[str], held: int) -> None:
    assert possible_stop_chars(text, stop) == held


@given(
    text=st.text("ab \n", max_size=30) | st.text(st.characters(codec="utf-8", exclude_characters="�"), max_size=12),
    stop=st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=2),
    stream_seconds=st.sampled_from([0.0, 60.0]),
)
def test_streamed_text_is_the_decoded_text(tokenizer, text: str, stop: list[str], stream_seconds: float) -> None:
    """The pieces join up to the text, which ends at the token that completes a stop string."""
    prompt = tokenizer("x\n", add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids

    def read(tokens: list[int]) -> str:
        before, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (prompt, prompt + tokens))
        return whole[len(before) :]

    pieces: list[str] = []
    growing = GrowingText(tokenizer, prompt, stop, pieces.append, stream_seconds=stream_seconds)
    ends = (end for end in range(1, len(ids) + 1) if growing(torch.tensor([prompt + ids[:end]]), None).item())
    taken = ids[: next(ends, len(ids))]
    starts = [at for each in stop if (at := read(taken).find(each)) >= 0]
    assert not any(each in read(taken[:-1]) for each in stop)
    assert starts or taken == ids
    assert growing.close(prompt + taken) == "".join(pieces) == read(taken)[: min(starts, default=None)]


def test_a_space_at_the_start_of_a_line_stays() -> None:
    """The streamer of transformers decodes every line by itself, so SentencePiece loses the space at its start."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "mistral-v1-32k")
    ids = tokenizer("def f():\n  return 1\n", add_special_tokens=False).input_ids
    pieces: list[str] = []
    growing = GrowingText(tokenizer, ids[:1], [], pieces.append, stream_seconds=0.0)
    for end in range(2, len(ids) + 1):
        growing(torch.tensor([ids[:end]]), None)
    growing.close(ids)
    assert growing.prompt + "".join(pieces) == "def f():\n  return 1\n"
    assert len(pieces) > 5


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
def test_texts_are_written_one_after_another(events: list[tuple[int, bool]]) -> None:
    written: list[str] = []
    order, expected, ended = InOrder(written.append), ["", "", "", ""], set()
    writes = [order.of(row) for row in range(4)]
    for number, (row, ends) in enumerate(events):
        if row in ended:
            continue
        if ends:
            ended.add(row)
            order.end(row)
        else:
            writes[row](f"<{row}:{number}>")
            expected[row] += f"<{row}:{number}>"
    unfinished = next((row for row in range(4) if row not in ended), 3)
    whole = "".join(expected[row] + "\n" * (row in ended) for row in range(unfinished + 1))
    assert "".join(written) == whole
