"""Adapters extracted from what a full training changed."""

import json
from pathlib import Path

import pytest
import torch
from tests.adapters.test_merge import base_folder, built, logits, moved, tensors
from tests.lowrank.test_inject import FAMILIES
from tests.model.small import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from relora.adapters.extract import extract_adapter
from relora.adapters.save_load import load_adapter
from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, merge

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def tuned_folder(family: str, folder: Path, rank: int, *, norms: bool = False) -> Path:
    """The base with an update of this rank in the linear layers of its blocks and, with `norms`, changes elsewhere."""
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


def test_a_head_that_training_untied_is_named(tmp_path: Path) -> None:
    """The base's files do not hold the head under its own name, so it must be looked for under the embedding's."""
    base, tuned = LlamaConfig(**SMALL, tie_word_embeddings=True), LlamaConfig(**SMALL, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base)
    model.save_pretrained(tmp_path / "base")
    changed = AutoModelForCausalLM.from_config(tuned)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(0.1)
    changed.save_pretrained(tmp_path / "same head")
    assert extract_adapter(tmp_path / "base", tmp_path / "same head", tmp_path / "one", r=1).left_out == []
    with torch.no_grad():
        changed.lm_head.weight.add_(0.1)
    changed.save_pretrained(tmp_path / "other head")
    report = extract_adapter(tmp_path / "base", tmp_path / "other head", tmp_path / "two", r=1)
    assert report.left_out == ["lm_head.weight"]
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tied")
    assert len(extract_adapter(tmp_path / "base", tmp_path / "tied", tmp_path / "three", r=1).left_out) == 1


def test_settings_that_training_changed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = base_folder("llama", tmp_path / "base"), tuned_folder("llama", tmp_path / "tuned", 2)
    extract_adapter(base, tuned, tmp_path / "one", r=2)
    assert not caplog.messages
    settings = json.loads((tuned / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 5e5
    (tuned / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16", "eos_token_id": 5}))
    extract_adapter(base, tuned, tmp_path / "two", r=2)
    assert caplog.messages == [
        f"warning: {tuned}: its config.json differs from that of {base} in rope_parameters, which is not in the adapter"
    ]


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
