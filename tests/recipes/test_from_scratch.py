"""Models from scratch whose new weights hold zeros: what the zeros hide at first trains as soon as they have moved."""

from pathlib import Path

import pytest
import torch
import yaml
from tests.command import call
from tests.zoo.stages import pretrain_settings
from tests.zoo.tiny_models import make_tiny_model

from relora.model.load import open_model

HIDDEN = {
    "gemma3n_text": "model.layers.0.per_layer_input_gate.weight",
    "xlstm": "backbone.blocks.0.ffn.proj_up.weight",
    "zaya": "model.layers.0.self_attn.qkv_proj.q_proj.weight",
}
"""Family -> a weight whose gradient is zero in the first step."""


@pytest.mark.parametrize(
    "family, layers", [("gemma3n_text", None), ("gemma3n_text", 3), ("xlstm", None), ("zaya", None)]
)
def test_a_model_from_scratch_trains_what_its_zeros_hide_at_first(
    tmp_path: Path, family: str, layers: int | None
) -> None:
    make_tiny_model(family, tmp_path / "model")
    settings = pretrain_settings(tmp_path / "model", tmp_path / "run")
    settings["model"] |= {"from_scratch": True} | ({} if layers is None else {"num_hidden_layers": layers})
    settings |= {"method": "full", "schedule": {"total_steps": 4, "warmup_steps": 1}, "samples": {"prompts": []}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "lowrank"}))
    ended = call("pretrain", tmp_path / "config.yaml")
    assert ended.complaint(0) is None and "no gradient so far" not in ended.out + ended.err
    new = open_model(tmp_path / "model", from_scratch=True, overrides={"num_hidden_layers": layers} if layers else {})
    trained = open_model(tmp_path / "run" / "model")
    name = HIDDEN[family]
    assert not torch.equal(trained.get_parameter(name), new.get_parameter(name))
