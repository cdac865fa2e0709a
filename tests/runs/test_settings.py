"""The part of config.yaml that matters for a result is read and checked; the rest may be of any version."""

from pathlib import Path

import pytest

from relora.config import load_any_config, to_yaml
from relora.errors import UserError
from relora.runs.settings import is_run, read_run_settings, run_folder

FINETUNE = """
output_dir: x
task: {task}
model: {{path: models/base}}
data: {{train: a.jsonl, sequence_length: 96, layout: {layout}, template: plain}}
"""
PRETRAIN = """
output_dir: x
model: {preset: llama-9m}
data: {train: a, validation: b, sequence_length: 64}
schedule: {total_steps: 10000}
"""


def run(folder: Path, text: str) -> Path:
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINETUNE.format(task="instruct", layout="auto"), ("instruct", "models/base", 96, "plain")),
        (FINETUNE.format(task="instruct", layout="completion"), ("instruct", "models/base", 96, None)),
        (FINETUNE.format(task="classification", layout="auto"), ("classification", "models/base", 96, None)),
        (PRETRAIN, (None, None, 64, None)),
    ],
)
def test_as_the_run_itself_reads_it(tmp_path: Path, text: str, expected: tuple[object, ...]) -> None:
    for written in (text, to_yaml(load_any_config(run(tmp_path, text) / "config.yaml"))):
        settings = read_run_settings(run(tmp_path, written))
        assert (settings.task, settings.model.path, settings.data.sequence_length, settings.template) == expected


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    settings = read_run_settings(run(tmp_path, "task: instruct\nnew_key: 1\ndata: {novel: [1]}\n"))
    assert (settings.data.sequence_length, settings.model.path, settings.template) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sequence_length: many}", "`data.sequence_length` is 'many'"),
        ("data: {sequence_length: 0}", "`data.sequence_length` is 0"),
        ("data: {template: jinja}", "`data.template` is 'jinja'"),
        ("model: [1]", "`model` is"),
        ("- 1", "must be a YAML mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        read_run_settings(run(tmp_path, text))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_is_told_by_its_configuration(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        assert not is_run(place)
        for opened in (run_folder, read_run_settings):
            with pytest.raises(UserError, match=r"not a run folder \(no config.yaml in it\)"):
                opened(place)
    run(tmp_path, PRETRAIN)
    assert is_run(tmp_path) and is_run(str(tmp_path)) and run_folder(str(tmp_path)) == tmp_path
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="leads out of its folder"):
        run_folder(tmp_path)
