from pathlib import Path

import numpy as np
import pytest

from relora.data.pretraining import journal
from relora.data.pretraining.encode import SplitTokens
from relora.data.pretraining.journal import Header, Journal, Request, SplitState, SplitWriter
from relora.errors import UserError

HEADER = Header(Request((), {"seed": 0}), 1 << 63)


def _split(*tokens: int) -> SplitTokens:
    return SplitTokens(np.array(tokens, dtype="<u2"), documents=1, text_bytes=len(tokens))


def test_a_journal_reads_back_its_last_line(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    assert first.header is None
    first.begin(HEADER)
    for documents in (3, 5):
        first.state.train.documents = documents
        first.note()
    first.close()
    again = Journal(tmp_path)
    assert (again.header, again.state) == (HEADER, first.state)
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept_lines", [0, 1, 2])
def test_a_torn_line_is_as_if_never_written(tmp_path: Path, kept_lines: int) -> None:
    first = Journal(tmp_path)
    first.begin(HEADER)
    first.state.train.documents = 3
    first.note()
    first.note()
    first.close()
    file = tmp_path / journal.JOURNAL_NAME
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept_lines]) + lines[kept_lines][:7])
    again = Journal(tmp_path)
    assert again.header == (HEADER if kept_lines else None)
    assert again.state.train.documents == (3 if kept_lines == 2 else 0)
    again.begin(HEADER)
    again.note()
    again.close()
    Journal(tmp_path).close()  # what was appended after the torn line can be read


def test_a_writer_continues_where_its_state_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SHARD_TOKENS", 4)
    writer = SplitWriter(tmp_path, state := SplitState(), itemsize=2)
    writer.append(_split(1, 2, 3))
    writer.append(_split(4, 5))
    writer.sync()
    noted = SplitState(list(state.shards), state.documents, state.text_bytes)
    writer.append(_split(6))
    writer.append(_split(7, 8, 9))
    writer.append(_split(10))
    writer.close()
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(whole) == [shard.file for shard in state.shards] == [f"shard-0000{number}.bin" for number in range(3)]
    again = SplitWriter(tmp_path, noted, itemsize=2)
    for split in (_split(6), _split(7, 8, 9), _split(10)):
        again.append(split)
    again.close()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole
    assert noted == state
    assert state.tokens == 10
    assert state.documents == 5


def test_a_shard_shorter_than_its_journal_is_refused(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, state := SplitState(), itemsize=2)
    writer.append(_split(1, 2, 3))
    writer.close()
    (tmp_path / "shard-00000.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"shard-00000\.bin: cut short since; .* run the command again"):
        SplitWriter(tmp_path, state, itemsize=2)
