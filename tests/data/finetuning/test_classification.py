"""Records become examples as their columns, labels and lengths say, and batches as seed and number say."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.paths import DATA
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from relora.data.finetuning.class_encoder import longest_first
from relora.data.finetuning.classification import (
    ClassBatches,
    ClassExamples,
    HeldOutClasses,
    encode_classes,
    settle_padding,
)
from relora.data.finetuning.records import Record, Records
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError

needs_data = pytest.mark.skipif(not (DATA / "evals").is_dir(), reason="the shared test data is not here")

CATS = [
    {"sentence": "the cat sat", "label": 1},
    {"sentence": "the dog sat on the log", "label": 0},
    {"sentence": "mat", "label": 1},
]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level, without a template."""
    opened = load_tokenizer(str(tokenizer_folder))
    settle_padding(opened)
    return opened


@pytest.fixture
def templated(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same with a template that marks both ends of both texts."""
    end = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A {end}", pair=f"{end} $A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def examples_of(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> ClassExamples:
    records = [Record(f"train.csv, line {number}", row) for number, row in enumerate(rows, start=2)]
    return encode_classes(records, tokenizer, **{"sequence_length": 64, **options})


def labelled(labels: Sequence[object]) -> list[dict[str, object]]:
    return [{"text": "cat", "label": label} for label in labels]


def ids_of(examples: ClassExamples) -> list[list[int]]:
    return [part.tolist() for part in np.split(examples.ids, examples.bounds[1:-1])]


# Columns


@pytest.mark.parametrize(
    "names",
    [
        ("sentence",),
        ("text",),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("question1", "question2"),
    ],
)
def test_columns_are_known_by_their_usual_names(names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"idx": 7, "label": label, **{name: f"the {name}" for name in names}} for label in (0, 1)]
    examples = examples_of(rows, tokenizer)
    assert examples.columns.texts == names
    assert tokenizer.decode(ids_of(examples)[0]) == "\n".join(f"the {name}" for name in names)


def test_columns_can_be_named(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"title": "cat", "text": "dog", "class": label, "label": 1} for label in "ab"]
    examples = examples_of(rows, tokenizer, text_columns=["title"], label_column="class")
    assert tokenizer.decode(ids_of(examples)[0]) == "cat"
    assert examples.names == ("a", "b")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"review": "cat", "label": 1}, {}, r"line 2: no column with a usual name; .*`review`, `label`.*text_columns"),
        ({"text": "cat", "stars": 1}, {}, r"line 2: no column with a usual name; .*`text`, `stars`.*label_column"),
        ({"text": "cat", "label": 1}, {"label_column": "stars"}, r"line 2: no column `stars`; .*`text`, `label`"),
        ({"text": "cat", "label": 1}, {"text_columns": ["text", "b"]}, r"line 2: no column `b`; .*`text`, `label`"),
        ({"text": 7, "label": 1}, {}, r"line 2: column `text` is not text but int"),
        ({"text": "\ud800", "label": 1}, {}, r"line 2: half of a surrogate pair in column `text`"),
        ({"text": "cat", "label": [1]}, {}, r"line 2: column `label` is \[1\], which is neither"),
    ],
)
def test_what_cannot_be_read_is_refused(
    row: Mapping[str, Any], options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        examples_of([row], tokenizer, **options)


def test_a_column_that_is_missing_later_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"line 5: no column `sentence`; there are `text`"):
        examples_of([*CATS, {"text": "cat", "label": 1}], tokenizer)


def test_no_records_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no record"):
        examples_of([], tokenizer)


# Labels


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([10, 9, 10, -2], ("-2", "9", "10"), [2, 1, 2, 0]),
        (["10", "9", " 10", "-2"], ("-2", "9", "10"), [2, 1, 2, 0]),  # of a CSV
        (["yes", "no", "yes"], ("no", "yes"), [1, 0, 1]),
        (["10", "9", "many"], ("10", "9", "many"), [0, 1, 2]),
        (["01", "+1", "1_0"], ("+1", "01", "1_0"), [1, 0, 2]),
        ([True, False], ("False", "True"), [1, 0]),
    ],
)
def test_classes_are_numbered_in_sorted_order(
    labels: list[object], names: tuple[str, ...], numbers: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = examples_of(labelled(labels), tokenizer)
    assert (examples.names, examples.labels.tolist()) == (names, numbers)
    assert examples.labels.dtype == np.int64


@pytest.mark.parametrize("labels", [[0.5, 4.0, 2], ["0.5", "4.0", "2"], ["5e-1", ".4e1", "2"]])
def test_numbers_with_a_fraction_are_predicted_as_numbers(
    labels: list[object], tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = examples_of(labelled(labels), tokenizer)
    assert examples.names == ()
    assert examples.labels.dtype == np.float32
    assert examples.labels.tolist() == [0.5, 4.0, 2.0]


def test_no_number_is_taken_for_the_mark_of_no_label(tokenizer: PreTrainedTokenizerBase) -> None:
    value = examples_of(labelled([-100.0, 1.5]), tokenizer).labels[0]
    assert value != -100
    assert value == pytest.approx(-100, rel=1e-7)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, "much", 1.5], r"line 3: the label is a word, that of .* line 4 a number with a fraction"),
        ([3, 3], r"line 2: every label is '3'; give examples of another class"),
        ([0.5, 10**60], r"line 3: the label .* is no number"),
    ],
)
def test_labels_that_make_no_task_are_refused(
    labels: list[object], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        examples_of(labelled(labels), tokenizer)


def test_validation_takes_columns_and_classes_of_training(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "cat", "other": "dog", "label": label} for label in ("b", "a", "c")]
    train = examples_of(rows, tokenizer, text_columns=["other"])
    validation = examples_of(rows[2:], tokenizer, like=train)
    assert (validation.names, validation.labels.tolist()) == (("a", "b", "c"), [2])
    assert tokenizer.decode(ids_of(validation)[0]) == "dog"


def test_a_label_that_is_not_the_training_datas_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    classes, numbers = (examples_of(labelled(labels), tokenizer) for labels in ((0, 1), (0.5, 1.5)))
    assert examples_of(labelled([1.0, "0"]), tokenizer, like=classes).labels.tolist() == [1, 0]
    assert examples_of(labelled([1, "2"]), tokenizer, like=numbers).labels.tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match=r"line 3: the label -2 is none of the training data's: `0`, `1`"):
        examples_of(labelled([1, -2]), tokenizer, like=classes)
    with pytest.raises(UserError, match=r"line 2: the label 'good' is no number"):
        examples_of(labelled(["good"]), tokenizer, like=numbers)


# Ids


def test_a_text_has_the_ids_that_its_tokenizer_gives(templated: PreTrainedTokenizerBase) -> None:
    examples = examples_of(CATS, templated)
    assert ids_of(examples) == [templated(row["sentence"])["input_ids"] for row in CATS]
    assert examples.cut == 0


@given(first=st.integers(0, 60), second=st.integers(0, 60), room=st.integers(2, 60))
def test_the_longer_text_is_cut_first(first: int, second: int, room: int) -> None:
    if first + second <= room:
        return
    kept = longest_first(first, second, room)
    assert sum(kept) == room
    assert kept[0] <= first and kept[1] <= second
    whole = [number for number, text in zip(kept, (first, second), strict=True) if number == text]
    assert abs(kept[0] - kept[1]) <= 1 or whole == [min(kept)]


@pytest.mark.parametrize("length", [5, 8, 9, 12, 16, 40])
def test_a_pair_is_cut_as_transformers_cuts_it(length: int, templated: PreTrainedTokenizerBase) -> None:
    texts = ["cat", "the dog sat on the log, and the cat", "the cat sat on the mat, xyz and on the log zyx", ""]
    rows = [{"text1": one, "text2": other, "label": len(one) % 2} for one in texts for other in texts if other]
    wanted = [
        templated(row["text1"], row["text2"], truncation="longest_first", max_length=length)["input_ids"]
        for row in rows
    ]
    examples = examples_of(rows, templated, sequence_length=length)
    assert ids_of(examples) == wanted
    whole = [templated(row["text1"], row["text2"])["input_ids"] for row in rows]
    assert examples.cut == sum(len(ids) > length for ids in whole)


def test_one_text_is_cut_at_its_end(templated: PreTrainedTokenizerBase) -> None:
    examples = examples_of(CATS, templated, sequence_length=6)
    wanted = [templated(row["sentence"], truncation=True, max_length=6)["input_ids"] for row in CATS]
    assert ids_of(examples) == wanted
    assert examples.cut == 1


def test_without_a_template_a_newline_joins_a_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    one, other = "the cat sat on the mat", "the dog sat"
    rows = [{"premise": one, "hypothesis": other, "label": label} for label in (0, 1)]
    whole = tokenizer(f"{one}\n{other}")["input_ids"]
    assert ids_of(examples_of(rows, tokenizer)) == [whole, whole]
    of_one, of_other = (len(tokenizer(text)["input_ids"]) for text in (one, f"\n{other}"))
    assert of_one + of_other == len(whole)
    examples = examples_of(rows, tokenizer, sequence_length=len(whole) - 1)
    assert tokenizer.decode(ids_of(examples)[0]).endswith(f"\n{other}")  # the longer lost its last token
    assert ids_of(examples)[0] == whole[: of_one - 1] + whole[of_one:]


def test_padding_at_the_end_of_a_text_is_left_off(templated: PreTrainedTokenizerBase) -> None:
    templated.pad_token = templated.eos_token
    rows = [*CATS, {"sentence": "", "label": 0}, {"sentence": "cat<|endoftext|><|endoftext|>", "label": 0}]
    end = templated.eos_token_id
    texts = [templated(row["sentence"], add_special_tokens=False)["input_ids"] for row in [*CATS, {"sentence": "cat"}]]
    assert ids_of(examples_of(rows, templated)) == [*([end, *text] for text in texts[:3]), [end], [end, *texts[3]]]


def test_an_empty_text_is_one_token_of_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    input_ids, _, lengths = examples_of([*CATS, {"sentence": "", "label": 0}], tokenizer).take(np.array([3]))
    assert (input_ids.tolist(), lengths.tolist()) == ([[tokenizer.pad_token_id]], [1])


def test_a_length_without_room_is_refused(templated: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length \(2\) leaves no room"):
        examples_of(CATS, templated, sequence_length=2)


def test_a_tokenizer_without_padding_takes_its_end(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    assert settle_padding(tokenizer) == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(str(tmp_path))
    assert (saved.pad_token, saved.padding_side) == (saved.eos_token, "right")


# Batches


@pytest.fixture
def many(tokenizer: PreTrainedTokenizerBase) -> ClassExamples:
    """Ten examples that all differ in their length, number i being i + 1 cats."""
    return examples_of([{"text": " ".join(["cat"] * n), "label": n % 2} for n in range(1, 11)], tokenizer)


def test_a_batch_is_padded_on_the_right(many: ClassExamples, tokenizer: PreTrainedTokenizerBase) -> None:
    input_ids, labels, lengths = many.take(np.array([4, 0]))
    long, short = (ids_of(many)[number] for number in (4, 0))
    assert input_ids.tolist() == [long, short + [tokenizer.pad_token_id] * (len(long) - len(short))]
    assert lengths.tolist() == [len(long), len(short)]
    assert labels.tolist() == [1, 1]
    assert input_ids.dtype == labels.dtype == lengths.dtype == torch.int64


def lengths_of(batches: ClassBatches, steps: Sequence[int]) -> list[int]:
    return torch.cat([batches.batch(step)[2] for step in steps]).tolist()


def test_every_example_is_there_once_an_epoch(many: ClassExamples) -> None:
    batches = ClassBatches(many, sequences=4, seed=0)
    assert batches.steps_per_epoch == 3
    met = lengths_of(batches, range(5))  # two epochs
    everything = sorted(len(ids) for ids in ids_of(many))
    assert sorted(met[:10]) == sorted(met[10:]) == everything
    assert met[:10] != met[10:]


def test_a_batch_depends_on_seed_and_number_alone(many: ClassExamples) -> None:
    batches = ClassBatches(many, sequences=4, seed=0)
    later_first = lengths_of(batches, [7]) + lengths_of(batches, [1])
    assert later_first == lengths_of(ClassBatches(many, sequences=4, seed=0), [7, 1])
    assert later_first != lengths_of(ClassBatches(many, sequences=4, seed=1), [7, 1])
    assert lengths_of(ClassBatches(many, sequences=2, seed=0), [0, 1]) == lengths_of(batches, [0])


def test_a_place_names_the_records(many: ClassExamples) -> None:
    batches = ClassBatches(many, sequences=6, seed=0)
    at = {len(ids): place for ids, place in zip(ids_of(many), many.places, strict=True)}
    places = [at[length] for length in lengths_of(batches, [2])]
    assert batches.place(2, range(1, 3)) == f"batch 2: {places[1]}, {places[2]}"
    assert batches.place(2, range(6)).endswith(f"{places[3]}, and 2 more")


def test_less_than_a_batch_is_refused(many: ClassExamples) -> None:
    with pytest.raises(UserError, match=r"10 examples, one batch needs 11; .*batch\.sequences"):
        ClassBatches(many, sequences=11, seed=0)


def test_held_out_examples_come_in_order(many: ClassExamples) -> None:
    held_out = HeldOutClasses(many, sequences=4)
    batches = list(held_out)
    assert [len(labels) for _, labels, _ in batches] == [4, 4, 2]
    assert len(held_out) == 3
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == many.labels.tolist()
    rows = [row[:length].tolist() for ids, _, lengths in batches for row, length in zip(ids, lengths, strict=True)]
    assert rows == ids_of(many)


def test_a_held_out_sample_is_keyed_and_bounded(many: ClassExamples) -> None:
    def lengths(tokens: int | None, seed: int = 0, sequences: int = 4) -> list[int]:
        held_out = HeldOutClasses(many, sequences=sequences, tokens=tokens, seed=seed)
        found = [length for _, _, lengths in held_out for length in lengths.tolist()]
        assert held_out.targets == len(found) and held_out.whole_targets == 10
        assert len(held_out) == -(-len(found) // sequences)
        return found

    everything = lengths(None)
    assert lengths(sum(everything)) == everything
    drawn = lengths(sum(everything) // 2)
    assert 0 < sum(drawn) <= sum(everything) // 2 and drawn == lengths(sum(everything) // 2, sequences=1)
    assert len({tuple(lengths(sum(everything) // 2, seed)) for seed in range(5)}) > 1
    assert any(lengths(sum(everything) // 2, seed)[-1] == everything[-1] for seed in range(20))  # not the first alone
    assert len(lengths(1)) == 1


def test_a_held_out_sample_has_each_class_in_its_share(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = examples_of(labelled(["rare" if number % 10 == 0 else "often" for number in range(200)]), tokenizer)
    per_example = len(examples.ids) / len(examples)
    for seed in range(8):
        held_out = HeldOutClasses(examples, sequences=7, tokens=int(40 * per_example), seed=seed)
        found = Counter(examples.names[int(label)] for _, labels, _ in held_out for label in labels)
        assert found["rare"] in (3, 4) and 30 <= found["often"] <= 37


def test_content_changes_with_what_a_model_sees(tokenizer: PreTrainedTokenizerBase) -> None:
    variants = [
        CATS,
        CATS[:2],
        [CATS[1], CATS[0], CATS[2]],
        [{**CATS[0], "label": 0}, *CATS[1:]],
        [{**CATS[0], "sentence": "the cat"}, *CATS[1:]],
        [{**row, "label": f"class {row['label']}"} for row in CATS],
        [{**row, "label": row["label"] + 0.5} for row in CATS],
    ]
    contents = [ClassBatches(examples_of(rows, tokenizer), sequences=2, seed=0).content for rows in variants]
    assert len(set(contents)) == len(variants)
    assert examples_of(CATS, tokenizer).content == contents[0]
    tokenizer.pad_token = tokenizer.eos_token
    assert examples_of(CATS, tokenizer).content != contents[0]


# Files


def test_every_format_gives_the_same_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in CATS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(CATS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, CATS[0])
        writer.writeheader()
        writer.writerows(CATS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CATS), tmp_path / "a.parquet")
    contents = {
        file.name: encode_classes(Records([str(file)]), tokenizer, sequence_length=32).content
        for file in tmp_path.iterdir()
    }
    assert len(contents) == 5
    assert set(contents.values()) == {examples_of(CATS, tokenizer, sequence_length=32).content}


@needs_data
@pytest.mark.parametrize(
    ("name", "texts", "counts"),
    [
        ("glue_sst2_val", ("sentence",), [428, 444]),
        ("cola_in_domain_dev", ("sentence",), [162, 365]),
        ("cola_out_of_domain_dev", ("sentence",), [162, 354]),
        ("glue_rte_val", ("sentence1", "sentence2"), [146, 131]),
        ("glue_mrpc_val", ("sentence1", "sentence2"), [129, 279]),
    ],
)
def test_real_sets_are_read_right(name: str, texts: tuple[str, ...], counts: list[int]) -> None:
    tokenizer = load_tokenizer(str(DATA / "tokenizers" / "corpus-bpe-4k"))
    settle_padding(tokenizer)
    file = DATA / "evals" / f"{name}.jsonl.gz"
    examples = encode_classes(Records([str(file)]), tokenizer, sequence_length=256)
    assert (examples.names, examples.columns.texts) == (("0", "1"), texts)
    assert np.bincount(examples.labels).tolist() == counts
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert examples.labels.tolist() == [row["label"] for row in rows]
    decoded = [tokenizer.decode(ids) for ids in ids_of(examples)]
    whole = ["\n".join(row[column] for column in texts) for row in rows]
    assert sum(one != other for one, other in zip(decoded, whole, strict=True)) == examples.cut < 10


def test_records_without_a_label_are_left_out_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    labels = [0, -1, 1, None, -1, 1, 0]
    rows = [
        Record(f"c.jsonl, line {number}", {"text": "it is", "label": label, "id": number, "more": None})
        for number, label in enumerate(labels, start=1)
    ]
    examples = encode_classes(rows, tokenizer, sequence_length=32)
    assert examples.names == ("0", "1")
    assert examples.labels.tolist() == [0, 1, 1, 0]
    assert examples.places == tuple(f"c.jsonl, line {number}" for number in (1, 3, 6, 7))
    assert examples.notes == (
        "not used: column `id` (7 records)",
        "records left out, without a label (-1, which is no class beside labels from 0 on; "
        "`data.unlabelled: []` keeps it): 2, first in c.jsonl, line 2",
        "records left out, without a label (null, NaN or empty): 1, first in c.jsonl, line 4",
    )
    held_out = encode_classes(rows[:2], tokenizer, sequence_length=32, like=examples)
    assert held_out.labels.tolist() == [0]
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: no record has a label in the column `label`"):
        encode_classes(rows[1:2], tokenizer, sequence_length=32, like=examples)


def test_whole_numbers_of_pandas_are_classes_and_that_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Record("line", {"text": "it is", "label": label}) for label in (0.0, 1.0, None)]
    examples = encode_classes(rows, tokenizer, sequence_length=32)
    assert (examples.names, examples.labels.tolist()) == (("0", "1"), [0, 1])
    assert "label column of whole numbers, some written as 1.0, taken as classes" in examples.notes
