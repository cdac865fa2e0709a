"""Launchers of several processes, such as torchrun, whose variables are incomplete: what trains is refused, what only
reads works.
"""

import json
from pathlib import Path

import pytest
from tests.cli.terminal import assert_refused, contents, done
from tests.command import call


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "compare"])
def test_a_launcher_that_names_no_rank_is_refused(
    config: Path, finetuning_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Each process would take itself for the only one, and write the same run folder."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    before = contents(tmp_path)
    assert_refused(call(verb, finetuning_config if verb == "finetune" else config), "WORLD_SIZE", "torchrun")
    assert contents(tmp_path) == before


def test_several_processes_may_read(
    config: Path, finetuning_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They print what one process prints, and write nothing."""
    reading = [
        ["config", config],
        ["pretrain", config, "--dry-run"],
        ["plan", config, "--json"],
        ["finetune", finetuning_config, "--show", "1"],
    ]
    before = contents(tmp_path)
    alone = [done(*arguments) for arguments in reading]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [done(*arguments) for arguments in reading] == alone
    assert json.loads(alone[2])["phases"] and "Say" in alone[3]
    assert contents(tmp_path) == before
