"""Tensors that the files hold as rows of larger ones, which transformers deals out when it opens the model."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.zoo.tiny_models import make_tiny_model

from relora.adapters.merge import merge_adapter, unmerge_adapter
from relora.adapters.save_load import save_adapter
from relora.adapters.stored_model import StoredModel
from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.model.load import open_model

FUSED = ("mlp.gate_proj", "mlp.up_proj", "self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj")
IDS = torch.arange(2, 34)[None]


def test_parts_of_a_stored_tensor_are_read_by_their_rows(tmp_path: Path) -> None:
    """HRM's files hold gate and up projection as one tensor, and four of attention as another."""
    folder = make_tiny_model("hrm_text", tmp_path / "base")
    stored, opened = StoredModel(folder), dict(open_model(folder).named_parameters())
    parts = [name for name in opened if name.endswith(tuple(f"{one}.weight" for one in FUSED))]
    assert len(parts) >= len(FUSED)
    for name in parts:
        assert torch.equal(stored.find(name).read(), opened[name]), name
        assert stored.find(name).first_row is not None


def test_an_adapter_is_merged_into_rows_of_stored_tensors_and_taken_out_again(tmp_path: Path) -> None:
    folder = make_tiny_model("hrm_text", tmp_path / "base")
    model = open_model(folder).eval()
    inject(model, LowRankConfig(r=2, target_modules=("gate_proj", "k_proj", "o_proj"), rest="frozen"))
    torch.manual_seed(0)
    for layer in low_rank_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        found = open_model(tmp_path / "merged").eval()(input_ids=IDS, use_cache=False).logits
        assert not torch.allclose(open_model(folder).eval()(input_ids=IDS, use_cache=False).logits, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    shutil.move(folder, tmp_path / "gone")  # so that the update is subtracted
    report = unmerge_adapter(tmp_path / "merged", tmp_path / "back")
    assert not report.exact
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("gone", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=0)
