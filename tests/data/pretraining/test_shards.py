import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.data.pretraining.shards import PreparedFolder, read_index
from relora.errors import UserError


@given(data=st.data())
def test_windows_run_across_shards(tmp_path_factory: pytest.TempPathFactory, write_folder, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 120))
    shard_tokens = data.draw(st.integers(1, 50))
    folder = write_folder(tmp_path_factory.mktemp("folder"), range(tokens), shard_tokens=shard_tokens)
    start = data.draw(st.integers(0, tokens))
    length = data.draw(st.integers(0, tokens - start))
    window = folder.window(start, length)
    assert window.dtype == np.int64
    assert window.tolist() == list(range(start, start + length))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_largest_id_survives(tmp_path: Path, write_folder, dtype: str) -> None:
    largest = np.iinfo(dtype).max
    folder = write_folder(tmp_path, [0, largest], dtype=dtype, vocab_size=largest + 1)
    assert folder.window(0, 2).tolist() == [0, largest]


def test_a_window_outside_is_an_error(tmp_path: Path, write_folder) -> None:
    with pytest.raises(IndexError):
        write_folder(tmp_path, range(10)).window(5, 6)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, [*range(70), 300, 5], vocab_size=300)
    assert folder.window(0, 70).max() == 69
    with pytest.raises(UserError, match=r"token 70 has id 300, the vocabulary ends at 299"):
        folder.window(60, 12)


def test_the_index_reads_back_equal(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, range(10))
    assert read_index(tmp_path) == folder.index
    assert folder.bytes_per_token == 4.0
    assert folder.tokenizer_path == tmp_path / "tokenizer"


def test_damaged_shards_are_refused(tmp_path: Path, write_folder) -> None:
    write_folder(tmp_path, range(100))
    shard = tmp_path / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.bin: 199 bytes, the index says 200"):
        PreparedFolder.open(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin: No such file"):
        PreparedFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99, this release reads 1"),
        ({"tokens": 11}, "`shards` and `tokens` disagree"),
        ({"tokens": "many"}, "`tokens` is 'many': input should be a valid integer"),
        ({"dtype": "float16"}, "`dtype` is 'float16': input should be"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, write_folder, change: dict[str, object], message: str) -> None:
    write_folder(tmp_path, range(10))
    file = tmp_path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        PreparedFolder.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", "\ud800"])
def test_what_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"not an index written by `relora prepare`"):
        PreparedFolder.open(tmp_path)


def test_why_there_is_no_index(tmp_path: Path, write_folder) -> None:
    write_folder(tmp_path / "out" / "train", range(10))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "shard-00000.bin").touch()
    for folder, message in (
        ("absent", "no such folder"),
        ("out", r"holds splits; give .*out/train"),
        ("unfinished", "not finished; run the same"),
        (".", r"no index\.json in it"),
    ):
        with pytest.raises(UserError, match=message):
            PreparedFolder.open(tmp_path / folder)
