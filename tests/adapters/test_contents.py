"""Adapter folders listed, shown, combined and extracted, in Python and by `relora adapters`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tests.adapters.test_merge import adapter_folder, base_folder, built, logits, moved, tensors
from tests.adapters.test_save_load import in_peft
from tests.lowrank.test_inject import FAMILIES
from transformers import PreTrainedModel

from relora.adapters.combine import combine_adapters
from relora.adapters.contents import list_adapters, show_adapter
from relora.adapters.extract import extract_adapter
from relora.adapters.peft_format import TENSORS, read_adapter
from relora.adapters.save_load import load_adapter
from relora.cli.adapters import app
from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, merge

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Three adapters, one of another kind, one that is broken, and one that is not there yet."""
    adapter_folder("llama", tmp_path / "french", rank_pattern={r".*\.0\..*": 2})
    adapter_folder("llama", tmp_path / "more" / "law", dora=True, target_modules=("q_proj", "v_proj"))
    adapter_folder("gpt2", tmp_path / "more" / "stable", rslora=True)
    in_peft("llama").save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "ADAPTION_PROMPT"}))
    broken = adapter_folder("llama", tmp_path / "zz")
    (broken / TENSORS).write_bytes((broken / TENSORS).read_bytes()[:-3])
    adapter_folder("llama", tmp_path / ".hidden.partial")
    return tmp_path


def test_list(shelf: Path) -> None:
    found = {one.name: one for one in list_adapters(shelf)}
    assert list(found) == ["french", "more/law", "more/stable", "theirs", "zz"]
    assert found["french"].kind == "LoRA" and found["french"].r == [2, 4]
    assert found["more/law"].kind == "DoRA" and found["more/law"].targets == ["q_proj", "v_proj"]
    assert found["theirs"].kind == "ADAPTION_PROMPT" and found["more/stable"].kind == "rsLoRA"
    assert found["zz"].problem is not None and "damaged" in found["zz"].problem
    for name in ("french", "more/law", "more/stable"):
        assert found[name].parameters == read_adapter(shelf / name).parameters
        assert found[name].bytes == (shelf / name / TENSORS).stat().st_size and found[name].problem is None


def test_show(shelf: Path) -> None:
    contents = show_adapter(shelf / "french")
    adapter = read_adapter(shelf / "french")
    assert len(contents.layers) == 14 and contents.full_tensors == {}
    for layer in contents.layers:
        factors = adapter.layers[layer.path]
        assert (layer.out, layer.inn, layer.r, layer.scaling) == (*factors.shape, factors.r, factors.scaling)
        assert layer.lora_alpha == pytest.approx(8)
        assert layer.update_norm == pytest.approx(factors.delta().norm().item(), rel=1e-5)


def test_combine(shelf: Path) -> None:
    other = adapter_folder("llama", shelf / "other")
    summary = combine_adapters([shelf / "french", other], shelf / "both", method="cat", weights=[1.0, -2.0])
    assert summary.r == [6, 8] and summary.kind == "LoRA"
    model = built("llama")
    load_adapter(model, shelf / "both")
    one, two, both = (read_adapter(shelf / name).layers for name in ("french", "other", "both"))
    for path, factors in both.items():
        torch.testing.assert_close(factors.delta(), one[path].delta() - 2 * two[path].delta())
    with pytest.raises(UserError, match="is there already"):
        combine_adapters([other], shelf / "both", method="cat")


def tuned_folder(family: str, folder: Path, rank: int, *, norms: bool = False) -> Path:
    """The base after training that changed its block linears by an update of some rank, and maybe all else."""
    model: PreTrainedModel = built(family)
    inject(model, LowRankConfig(r=rank, lora_alpha=rank, rest="trained" if norms else "frozen"))
    moved(model)
    merge(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_low_rank_is_extracted_whole(family: str, tmp_path: Path) -> None:
    base, tuned = base_folder(family, tmp_path / "base"), tuned_folder(family, tmp_path / "tuned", 3)
    report = extract_adapter(base, tuned, tmp_path / "out", r=3)
    assert report.energy_kept == pytest.approx(1, abs=1e-6) and report.left_out == [] and report.unchanged == []
    model = built(family)
    load_adapter(model, tmp_path / "out")
    with torch.no_grad():
        found = model(torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(found, logits(tuned), rtol=1e-4, atol=1e-4)


def test_what_a_smaller_rank_keeps(tmp_path: Path) -> None:
    base, tuned = base_folder("llama", tmp_path / "base"), tuned_folder("llama", tmp_path / "tuned", 6, norms=True)
    report = extract_adapter(base, tuned, tmp_path / "out", r=2, target_modules=("q_proj", "up_proj"))
    before, after = tensors(base), tensors(tuned)
    kept = total = 0.0
    for path, share in report.layers.items():
        values = torch.linalg.svdvals((after[f"{path}.weight"] - before[f"{path}.weight"]).double()).square()
        assert share == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-4)
        kept, total = kept + values[:2].sum().item(), total + values.sum().item()
    assert len(report.layers) == 4 and report.energy_kept == pytest.approx(kept / total, rel=1e-4)
    assert 0 < report.energy_kept < 1
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(report.left_out)


def test_refused_extractions(tmp_path: Path) -> None:
    base = base_folder("llama", tmp_path / "base")
    other = base_folder("neox", tmp_path / "neox")
    tuned = tuned_folder("llama", tmp_path / "tuned", 2)
    for arguments, settings, message in (
        ((base, base), {"r": 2}, "there is nothing to extract"),
        ((base, other), {"r": 2}, "of another architecture"),
        ((base, tuned), {"r": 33}, "may be at most 32"),
        ((base, tuned), {"r": 0}, "too small a rank"),
        ((base, tuned), {"r": 2, "target_modules": ("query",)}, "'query' matches no linear layer"),
        ((base, tmp_path / "gone"), {"r": 2}, "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            extract_adapter(*arguments, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is there already"):
        extract_adapter(base, tuned, other, r=2)


# The command line


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
