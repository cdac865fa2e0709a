"""Models are saved as plain folders, whole or not at all, in one dtype, and open without this package."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.model.small import SMALL, is_tied, logits
from transformers import PreTrainedTokenizerBase

from relora.errors import NonFinite, RunStopped, UserError
from relora.model import build_model, open_model, save_model

LOAD_AND_GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.paths import DATA
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("relora") for name in sys.modules)
with torch.no_grad():
    print(model.eval()(input_ids=torch.arange(12).view(2, 6)).logits.double().sum().item())
model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=2, do_sample=False)
print(model.dtype, tokenizer.eos_token)
"""


def test_a_saved_model_needs_no_relora(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("llama-9m", SMALL, seed=0, eos_token_id=94)
    save_model(model, tmp_path / "model", tokenizer)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    total, dtype_and_eos = result.stdout.splitlines()
    assert float(total) == pytest.approx(logits(model).double().sum().item(), abs=1e-5)
    assert dtype_and_eos == "torch.float32 <eos>"
    assert "warn" not in result.stderr.lower()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_every_family_is_saved_whole(
    family_folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> None:
    model = open_model(family_folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    saved = save_model(model, family_folder.with_name("saved"), tokenizer, dtype)
    expected = dtype or torch.float32
    assert json.loads((saved / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    assert {weight.dtype for weight in load_file(saved / "model.safetensors").values()} == {expected}
    again = open_model(saved, dtype="auto")
    assert again.dtype == expected
    assert is_tied(again) == is_tied(model)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, before[name].to(expected))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])  # the model in memory is as it was


def test_a_mixed_model_is_saved_as_its_widest_dtype(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    model.model.embed_tokens.to(torch.bfloat16)
    save_model(model, tmp_path / "model", tokenizer)
    assert open_model(tmp_path / "model", dtype="auto").dtype == torch.float32


def test_factors_in_the_model_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    layer = model.model.layers[0].mlp.up_proj
    layer.lora_A = torch.nn.Parameter(torch.ones(2, 16))
    with pytest.raises(UserError, match=r"up_proj.lora_A.*merge"):
        save_model(model, tmp_path / "model", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_replaced_whole_and_other_folders_are_left_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "model" / "stale.safetensors").touch()
    save_model(model, tmp_path / "model", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale.safetensors").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model folder; it was left as it is"):
        save_model(model, tmp_path / "notes", tokenizer)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_failed_write_leaves_the_old_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    folder = save_model(model, tmp_path / "model", tokenizer)
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / ".model.partial").touch()  # in the way of the new one
    with pytest.raises(RunStopped, match="could not be written"):
        save_model(build_model("llama-9m", SMALL, seed=1), folder, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_kill_between_the_renames_loses_nothing_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_model("llama-9m", SMALL, seed=0)
    folder = save_model(old, tmp_path / "model", tokenizer)
    before = (folder / "model.safetensors").read_bytes()
    rename, renames = Path.rename, []

    def rename_once(self: Path, target: Path) -> Path:
        if renames:
            raise KeyboardInterrupt  # as good as a kill: nothing of ours catches it
        renames.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_once)
        save_model(build_model("llama-9m", SMALL, seed=1), folder, tokenizer)
    assert (tmp_path / ".model.replaced" / "model.safetensors").read_bytes() == before
    save_model(build_model("llama-9m", SMALL, seed=1), folder, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(build_model("llama-9m", SMALL, seed=0), tmp_path / "model", tokenizer)
    before = (folder / "model.safetensors").read_bytes()
    rename = Path.rename

    def rename_but_the_new(self: Path, target: Path) -> Path:
        if self.name == ".model.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="No space left"):
        patch.setattr(Path, "rename", rename_but_the_new)
        save_model(build_model("llama-9m", SMALL, seed=1), folder, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_file_of_a_model_is_synced_before_it_is_in_place(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", note)
    folder = save_model(build_model("llama-9m", SMALL, seed=0), tmp_path / "model", tokenizer)
    aside = tmp_path / ".model.partial"
    assert {*synced} == {aside, tmp_path, *(aside / file.name for file in folder.iterdir())}
    assert synced[-1] == tmp_path


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_beyond_fp16_is_not_written_in_it(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The message names the weight, its largest number and what to do; bf16 and fp32 hold it."""
    model = build_model("llama-9m", SMALL, seed=0, eos_token_id=94)
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = -1e5
    with pytest.raises(UserError, match=rf"{name} holds 100000, which float16 cannot hold .*65,504.*bf16"):
        save_model(model, tmp_path / "half", tokenizer, torch.float16)
    assert list(tmp_path.iterdir()) == []
    for dtype in (torch.bfloat16, torch.float32):
        saved = save_model(model, tmp_path / str(dtype), tokenizer, dtype)
        assert all(tensor.isfinite().all() for tensor in load_file(saved / "model.safetensors").values())
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = 65_504
    assert save_model(model, tmp_path / "half", tokenizer, torch.float16).is_dir()


def test_what_is_not_a_number_is_not_written(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("llama-9m", SMALL, seed=0, eos_token_id=94)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = math.nan
    for dtype in (None, torch.bfloat16):
        with pytest.raises(NonFinite, match=r"model\.norm\.weight holds 1 entries that are not numbers; nothing was"):
            save_model(model, tmp_path / "model", tokenizer, dtype)
    assert list(tmp_path.iterdir()) == []


def test_what_was_infinite_is_written_with_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """A bias of minus infinity keeps a token from being chosen."""
    model = build_model("llama-9m", SMALL, seed=0, eos_token_id=94)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3, 3] = -math.inf
    saved = save_model(model, tmp_path / "model", tokenizer, torch.float16)
    assert load_file(saved / "model.safetensors")["lm_head.weight"][3, 3] == -math.inf
    assert "lm_head.weight holds 1 infinite entries, and is written with them" in caplog.text
