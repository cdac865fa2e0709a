"""A folder of scores is complete or absent, holds plain JSON, and replaces nothing."""

import json
import math
import os
from pathlib import Path

import pytest

from relora.errors import RunStopped, UserError
from relora.evaluation.output_folder import check_free, save_scores


def test_existing_paths_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link"):
        with pytest.raises(UserError, match=f"{name}: exists, and was left as it is; give a new folder"):
            check_free(tmp_path / name)
    with pytest.raises(UserError, match=r"file/new: cannot be made, since .*file cannot be written"):
        check_free(tmp_path / "file" / "new")
    check_free(tmp_path / "new" / "scores")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(UserError, match="shut cannot be written"):
        check_free(tmp_path / "shut" / "new")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    save_scores(tmp_path / "out", {"perplexity": math.inf, "loss": 2.0}, [{"f1": math.nan, "answer": "Ünï\n"}])
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (kept["perplexity"], kept["loss"]) == (None, 2.0)
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text()) == {"f1": None, "answer": "Ünï\n"}


def test_objects_that_json_cannot_represent_become_strings(tmp_path: Path) -> None:
    save_scores(tmp_path / "out", {}, [{"doc": {"place": Path("a/b"), "pair": (1.0, [math.inf])}}])
    kept = json.loads((tmp_path / "out" / "samples.jsonl").read_text())
    assert kept == {"doc": {"place": "a/b", "pair": [1.0, [None]]}}


def test_a_folder_that_was_created_meanwhile_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("mine")
    with pytest.raises(RunStopped, match="out: the scores could not be written"):
        save_scores(tmp_path / "out", {"loss": 1.0}, [])
    assert (tmp_path / "out" / "scores.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
