"""`relora adapters`: every verb as a table and as JSON, and its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.adapters.shelf import fill_shelf
from tests.adapters.test_extract import tuned_folder
from tests.adapters.test_merge import base_folder

from relora.cli.adapters import app
from relora.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return fill_shelf(tmp_path)


def run(*arguments: object) -> None:
    typer.main.get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_every_verb_prints_json_and_a_table(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    base = base_folder("llama", tmp_path / "base")
    tuned = tuned_folder("llama", tmp_path / "tuned", 2)
    assert [one["name"] for one in printed(capsys, "list", shelf)][:2] == ["french", "more/law"]
    assert printed(capsys, "show", shelf / "french")["layers"][0]["r"] == 2
    merged = printed(capsys, "merge", shelf / "french", "--base", base, "--out", tmp_path / "merged")
    assert merged["largest_logit_difference"] < 1e-4
    assert printed(capsys, "unmerge", tmp_path / "merged", "--out", tmp_path / "again")["exact"]
    onto = ["--base", base, "--out"]
    two = [shelf / "french", shelf / "french"]
    combined = printed(capsys, "combine", *two, "--weights", "0.5,0.5", "--out", tmp_path / "both")
    assert combined["r"] == [2, 4]
    extracted = printed(capsys, "extract", base, tuned, "--r", 2, "--out", tmp_path / "extracted")
    assert extracted["energy_kept"] > 0.999

    for arguments, words in (
        (["list", shelf], ["french", "2 ... 4", "DoRA", "damaged", "ADAPTION_PROMPT"]),
        (["show", shelf / "french"], ["model.layers.0.self_attn.q_proj", "32 x 32"]),
        (
            ["merge", shelf / "french", *onto, tmp_path / "m2"],
            ["largest logit difference", "14 layers"],
        ),
        (["unmerge", tmp_path / "m2", "--out", tmp_path / "a2"], ["bit for bit"]),
        (["combine", *two, "--method", "ties", "--density", "0.5", "--out", tmp_path / "b2"], ["b2", "LoRA"]),
        (["extract", base, tuned, "--r", 2, "--out", tmp_path / "e2"], ["energy kept", "100.0%", "all 14 layers"]),
    ):
        run(*arguments)
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "gone"], "no such folder"),
        (["list", "{empty}"], "holds no adapter"),
        (["combine", "{french}", "--weights", "a,b", "--out", "x"], "--weights a,b"),
        (["combine", "{french}", "--method", "mean", "--out", "x"], "none of linear, cat, svd"),
        (["merge", "{french}", "--out", "x"], "give it by --base"),
        (["unmerge", "{french}", "--out", "x"], "has no relora_merge.json"),
    ],
)
def test_mistakes(shelf: Path, arguments: list[str], message: str) -> None:
    (shelf / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        run(*(argument.format(empty=shelf / "empty", french=shelf / "french") for argument in arguments))
    assert not Path("x").exists()
