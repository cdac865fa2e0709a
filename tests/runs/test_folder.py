"""A run folder belongs to one configuration and one process at a time; nothing in it is ever lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.config import RunConfig, load_config, parse_config
from relora.errors import UserError
from relora.runs.environment import describe_environment
from relora.runs.folder import check_space, claim, describe_run, open_run

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Build configurations whose `output_dir` is `tmp_path / "run"`; their data need not exist."""

    def build(**overrides: object) -> RunConfig:
        tree: dict[str, object] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"preset": "llama-9m"},
            "data": {"train": "t", "validation": "v"},
            "schedule": {"total_steps": 9000},
        }
        return parse_config(tree | overrides)

    return build


def claimed(config: RunConfig, fresh: bool) -> Path:
    """Claim a folder, write the files that make it a run folder, and release it."""
    with claim(config, fresh) as folder:
        describe_run(folder, config, 0)
        return folder


def test_a_new_folder_holds_the_resolved_configuration(configure: Configure, tmp_path: Path) -> None:
    config = configure(output_dir=str(tmp_path / "a" / "b" / "run"))
    folder = claimed(config, fresh=False)
    assert folder == tmp_path / "a" / "b" / "run" and load_config(folder / "config.yaml") == config
    assert open_run(folder) == (folder, config)


def test_the_same_run_is_claimed_again(configure: Configure) -> None:
    """The same holds if only keys that change no number differ; the newest configuration is kept."""
    folder = claimed(configure(), fresh=False)
    (folder / "metrics.jsonl").write_text("a line\n")
    changed = configure(log={"every_steps": 77}, checkpoint={"keep_last": 5}, samples={"max_new_tokens": 3})
    assert claimed(changed, fresh=False) == folder
    assert load_config(folder / "config.yaml") == changed and (folder / "metrics.jsonl").read_text() == "a line\n"


def test_a_moved_folder_is_still_the_same_run(configure: Configure, tmp_path: Path) -> None:
    claimed(configure(), fresh=False).rename(tmp_path / "moved")
    assert claimed(configure(output_dir=str(tmp_path / "moved")), fresh=False) == tmp_path / "moved"


def test_a_folder_of_something_else_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert claimed(configure(), fresh=False).is_dir()  # an empty folder is taken
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        claimed(configure(), fresh=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_fresh_moves_aside_to_the_first_free_name(configure: Configure, tmp_path: Path) -> None:
    assert claimed(configure(), fresh=True) == tmp_path / "run"  # nothing there to move
    for number in (1, 2, 3):
        (tmp_path / "run" / "mark").write_text(str(number))
        claimed(configure(seed=number), fresh=True)
        assert (tmp_path / f"run.{number}" / "mark").read_text() == str(number)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "environment.json"}


def test_fresh_moves_nothing_when_the_new_folder_cannot_be_had(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"output_dir: .*file/run cannot be written"):
        claimed(configure(output_dir=str(tmp_path / "file" / "run")), fresh=True)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    "left",
    [
        [],
        [".config.yaml.partial"],
        ["config.yaml.partial"],  # of an earlier version
        ["config.yaml"],
        ["config.yaml", ".environment.json.partial"],
    ],
)
def test_what_a_kill_leaves_of_a_beginning_is_taken_up(configure: Configure, tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("seed: ")
    assert open_run(claimed(configure(), fresh=False))[1] == configure()


def test_open_run_wants_a_run_folder(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run folder"):
            open_run(place)


@given(st.integers(0, 1 << 20))
def test_space_is_asked_of_the_disk_that_will_hold_the_folder(small: int) -> None:
    check_space(Path("/no/such/folder/yet"), small)
    with pytest.raises(UserError, match=r"output_dir: .* free"):
        check_space(Path("/no/such/folder/yet"), 1 << 60)


def test_environment(configure: Configure) -> None:
    folder = claimed(configure(), fresh=False)
    describe_run(folder, configure(), 1234)
    written = json.loads((folder / "environment.json").read_text())
    assert written == {"parameters": 1234, **describe_environment()}
    assert {"relora", "torch", "transformers", "python", "platform", "threads", "gpu"} <= written.keys()


def test_one_process_at_a_time(configure: Configure, tmp_path: Path) -> None:
    with claim(configure(), fresh=False) as folder:
        for fresh in (False, True):
            with pytest.raises(UserError, match="another process is writing"):
                claimed(configure(), fresh)
        assert folder.is_dir() and not (tmp_path / "run.1").exists()
        assert claimed(configure(output_dir=str(tmp_path / "other")), fresh=False).is_dir()
    assert claimed(configure(), fresh=False) == folder  # it was released, so it can be claimed again
