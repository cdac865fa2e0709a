"""A trained model is pretrained further with a tokenizer that has more tokens than it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo.tiny_models import make_tiny_model

from relora.config import RunConfig, parse_config
from relora.data.pretraining.prepare import prepare
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.export.checkpoint import export
from relora.model import open_model
from relora.planning.timetable import timetable_of
from relora.recipes.pretrain import pretrain

ROWS, ADDED = 320, 25


@pytest.fixture(params=["llama", "gpt2"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A run on text with tokens that the model does not have; GPT-2 ties its embeddings."""
    folder = make_tiny_model(request.param, tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<new{n}>" for n in range(ROWS + ADDED - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "".join(f"An old house <new{n % 40}> beside a garden wall <new{39 - n % 40}>.\n" for n in range(400))
    (tmp_path / "text").mkdir()
    for part in range(5):
        (tmp_path / "text" / f"{part}.txt").write_text(text[part * 3000 : (part + 1) * 3000])
    out = tmp_path / "data"
    prepare([str(tmp_path / "text")], out, tokenizer=str(tmp_path / "tokenizer"), validation=0.2, workers=1)
    return {
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(folder), "resize_vocabulary": "auto"},
        "data": {"train": str(out / "train"), "validation": str(out / "validation"), "sequence_length": 32},
        "lowrank": {"r": 4},
        "warm_start": {"steps": 1},
        "restart": {"every_steps": 2},
        "schedule": {"total_steps": 5, "warmup_steps": 0},
        "batch": {"sequences": 4, "micro_sequences": 4},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["An <new3>"], "max_new_tokens": 3},
    }


def parsed(tree: dict[str, Any], **model: Any) -> RunConfig:
    return parse_config({**tree, "model": {**tree["model"], **model}})


def test_added_tokens_get_rows_that_train_and_are_written_exported_and_planned(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parsed(tree)
    line = f"vocabulary: {ADDED} rows were added to the model's {ROWS}, each the mean of those"
    assert line in timetable_of(config).notes
    folder = pretrain(config).folder
    assert line in capsys.readouterr().out
    start, trained = open_model(config.model.path or ""), open_model(folder / "model")
    rows = trained.get_input_embeddings().weight
    assert len(rows) == ROWS + ADDED == trained.config.vocab_size
    assert trained.get_output_embeddings().weight.shape == rows.shape
    mean = start.get_input_embeddings().weight.mean(0)
    moved = [n for n in range(ROWS, ROWS + ADDED) if not torch.allclose(rows[n], mean, atol=1e-5)]
    assert len(moved) >= 10
    exported = open_model(export(folder, out=tmp_path / "exported"))
    ids = torch.tensor([[3, ROWS, 40, ROWS + 1]])
    assert torch.equal(exported(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_data_of_another_tokenizer_than_the_models_is_said(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "the data's tokenizer is another than the model's"
    assert not any(other in note for note in timetable_of(parsed(tree)).notes)  # it has the same tokens, and more
    prepare([str(tmp_path / "text")], tmp_path / "other", train_tokenizer=ROWS, validation=0.2, workers=1)
    parts = {part: str(tmp_path / "other" / part) for part in ("train", "validation")}
    config = parsed({**tree, "data": {**tree["data"], **parts}})
    (note,) = [note for note in timetable_of(config).notes if other in note]
    assert re.search(r": \d+ of the model's 300 tokens have another id in it or none, so", note)
    pretrain(config)
    assert note in capsys.readouterr().out
    new = parsed({**tree, "data": {**tree["data"], **parts}}, from_scratch=True, resize_vocabulary="never")
    assert not any(other in note for note in timetable_of(new).notes)


def test_unless_it_is_allowed_no_row_is_added(tree: dict[str, Any]) -> None:
    line = "model: has 320 ids, the tokenizer 345; set `model.resize_vocabulary: auto` to add rows for the others, or"
    with pytest.raises(UserError, match=line):
        pretrain(parsed(tree, resize_vocabulary="never"))
    assert not Path(tree["output_dir"]).exists()


@pytest.mark.parametrize("changes", [{"from_scratch": True}, {"preset": "llama-9m", "path": None}])
def test_a_new_model_gets_its_rows_by_its_shape(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="`resize_vocabulary` is for a trained model; a new one gets its rows by"):
        parsed(tree, **changes)
