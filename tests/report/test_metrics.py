import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.errors import RunStopped, UserError
from relora.report.metrics import JsonLines, mean_effective_rank, mean_relative_update, number, read_json_lines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def without_non_finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    return [without_non_finite(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.dictionaries(st.text(), json_values), max_size=5))
def test_what_is_written_is_strict_json_and_reads_back(
    records: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = JsonLines(path)
    for record in records:
        file.append(record)
    assert file.size == path.stat().st_size  # on disk, not in a buffer
    file.close()
    assert len(path.read_bytes().split(b"\n")) == len(records) + 1
    assert b"NaN" not in path.read_bytes() or "NaN" in json.dumps(without_non_finite(records))
    assert read_json_lines(path) == without_non_finite(records)


def test_truncate_brings_the_file_back_to_a_checkpoint(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    at_checkpoint = file.size
    file.append({"step": 2})
    file.close()
    resumed = JsonLines(tmp_path / "metrics.jsonl")
    resumed.truncate(at_checkpoint)
    assert resumed.size == at_checkpoint
    resumed.append({"step": 2, "again": True})
    assert read_json_lines(resumed.path) == [{"step": 1}, {"step": 2, "again": True}]
    resumed.close()


def test_truncate_says_that_a_file_is_shorter_and_leaves_it(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 7})
    assert file.truncate(file.size)
    assert not file.truncate(10_000)
    file.append({"step": 8})
    assert read_json_lines(file.path) == [{"step": 7}, {"step": 8}]
    file.close()


def test_truncate_within_a_line_drops_the_line(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.append({"step": step})
    assert file.truncate(file.size - 4)
    file.append({"step": 9})
    assert read_json_lines(file.path) == [{"step": 0}, {"step": 1}, {"step": 9}]
    file.close()


@pytest.mark.parametrize("length", [10, 65_535, 65_536, 65_537, 200_000])
def test_a_torn_line_of_any_length_is_dropped_without_reading_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + length * b"x")
    JsonLines(path).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(length * b"x")
    JsonLines(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"st', b'{"step": 2', b"\xff\xfe", b"\0\0\0"])
def test_a_torn_last_line_is_ignored_and_dropped_on_opening(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert read_json_lines(path) == [{"step": 1}]
    file = JsonLines(path)
    file.append({"step": 2})
    file.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("broken", [b'{"st', b"[1]", b"7", b"", b"\xff", 100_000 * b"["])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_json_lines(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_json_lines(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        JsonLines(tmp_path / "absent" / "metrics.jsonl")


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "diary").write_text("dear")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "diary")
    with pytest.raises(UserError, match="a link that leads out of its folder"):
        JsonLines(tmp_path / "run" / "metrics.jsonl")
    assert (tmp_path / "diary").read_text() == "dear"


def test_a_disk_that_takes_no_more_stops_the_run_in_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = JsonLines(tmp_path / "metrics.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(RunStopped, match="cannot be written: File too large; free some space and resume"):
            file.append({"step": 1})
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_figure_is_a_finite_number() -> None:
    record = {"loss": 3.5, "step": 7, "null": None, "text": "3", "nan": math.nan, "inf": -math.inf, "huge": 10**400}
    figures = [number(record, key) for key in (*record, "absent")]
    assert figures == [3.5, 7, None, None, None, None, None, None]


def test_means_over_the_layers_of_a_restart() -> None:
    layers = [
        {"update_norm": 1.0, "weight_norm": 10.0, "effective_rank": 3.0},
        {"update_norm": 3.0, "weight_norm": 10.0, "effective_rank": 5.0},
        {"update_norm": 3.0, "weight_norm": 0.0, "effective_rank": None},
    ]
    assert mean_relative_update({"layers": layers}) == pytest.approx(0.2)
    assert mean_effective_rank({"layers": layers}) == pytest.approx(4.0)
    assert math.isnan(mean_relative_update({"layers": []}))
    assert math.isnan(mean_effective_rank({}))
