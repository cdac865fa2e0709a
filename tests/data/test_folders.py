import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from relora.data.finetuning.records import Records
from relora.data.folders import LeftOut, describe, format_size
from relora.data.pretraining.corpus import Corpus
from relora.errors import UserError

DOCUMENT_KINDS = Corpus.preferred_kinds


def _left_out(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    source = Corpus([str(folder)]).sources[0]
    return {(one.why, one.kind): (one.files, one.bytes) for one in source.left_out}


def test_what_a_folder_holds_and_is_not_read_is_counted_by_kind(tmp_path: Path) -> None:
    names = (
        "a.txt",
        "sub/b.md",
        "sub/deep/c.TXT",
        "README.md",
        ".hidden.txt",
        "sub/.git/x.txt",
        "LICENSE",
        "part.0001",
    )
    for name in (*names, "t.csv", "u.CSV.gz", "x.png", "y.PNG", "z.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert _left_out(tmp_path) == {
        ("read only where a folder has none of the preferred kinds", ".csv"): (1, 5),
        ("read only where a folder has none of the preferred kinds", ".csv.gz"): (1, 5),
        ("not a kind that can be read", ""): (2, 10),
        ("not a kind that can be read", ".png"): (2, 10),
        ("not a kind that can be read", ".tar.gz"): (1, 5),
        ("broken link", ""): (1, 0),
        ("linked folder", ""): (1, 0),
        ("pipe or device", ""): (1, 0),
        ("README", ""): (1, 5),
        ("hidden", ""): (2, 10),
    }
    corpus = Corpus([str(tmp_path)])
    assert [file.name for file in corpus.sources[0].files] == ["a.txt", "b.md", "c.TXT"]
    line = corpus.notes_on_folders()[0]
    assert line.startswith(f"{tmp_path}: not read: 1 .csv (5 bytes), 1 .csv.gz (5 bytes), 2 without a suffix")
    assert line.endswith("name its .csv, .csv.gz files themselves to read them, too; name a linked folder to read it")


def test_a_folder_that_is_read_whole_has_no_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert Corpus([str(tmp_path)]).notes_on_folders() == []


def test_records_say_what_they_leave_out_of_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "LICENSE.txt").write_text("x")
    assert Records([str(tmp_path)]).notes_on_folders() == [
        f"{tmp_path}: not read: 1 .txt (1 bytes); a folder that has .json, .jsonl, .csv, .tsv, .parquet files gives "
        "only those: name its .txt files themselves to read them, too"
    ]


def test_linked_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("linked")
    (tmp_path / "folder" / "b.txt").symlink_to("../a.txt")
    assert list(Corpus([str(tmp_path / "folder")]).documents()) == ["linked"]


def test_splits_of_a_saved_dataset_that_are_not_read_are_said(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "saved"))
    corpus = Corpus([str(tmp_path / "saved")])
    assert list(corpus.documents()) == ["a", "b"]
    assert [(one.why, one.kind, one.files) for one in corpus.sources[0].left_out] == [
        ("another split of the dataset", "test", 3)
    ]
    assert corpus.notes_on_folders()[0].endswith("name the folder of a split to read it")


def test_a_damaged_list_of_splits_is_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", json.dumps({"splits": 5})):
        (tmp_path / "dataset_dict.json").write_text(content)
        with pytest.raises(UserError, match="cannot be opened as a saved dataset"):
            list(Corpus([str(tmp_path)]).documents())


def test_many_kinds_are_one_short_line() -> None:
    left_out = [LeftOut("not a kind that can be read", f".x{number}", number, 0) for number in range(1, 40)]
    assert describe(left_out, DOCUMENT_KINDS).endswith("7 .x7, 8 .x8, 744 more")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        Corpus([str(tmp_path)])


def test_sizes_are_short() -> None:
    assert [format_size(size) for size in (0, 999, 1000, 1_234_567, 5 * 10**10)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "50.0 GB")
    ]
