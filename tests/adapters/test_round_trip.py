"""An adapter of ours that PEFT reads and saves again is the same adapter: relora, PEFT, relora."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.adapters.test_save_load import moved
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from relora.adapters.llama_adapter import add_prompts, load_prompts, save_prompts
from relora.adapters.merge import merge_adapter
from relora.adapters.peft_format import CONFIG, read_adapter
from relora.adapters.save_load import load_adapter, save_adapter
from relora.lowrank import LowRankConfig, inject

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT warns of a head without a copy of the base's weight
]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}, "rslora": True},
    "head": {"target_modules": ("q_proj", "lm_head")},
    "in full": {"trained_modules": ("norm", "lm_head"), "target_modules": ("q_proj", "up_proj")},
}
IDS = torch.arange(64).view(2, 32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("base") / "model"
    AutoModelForCausalLM.from_config(config).double().save_pretrained(folder)
    return folder


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank(kind: str, base: Path, tmp_path: Path) -> None:
    model = opened(base)
    inject(model, LowRankConfig(**{"r": 4, "lora_alpha": 8, "rest": "frozen", "lora_dropout": 0.1, **KINDS[kind]}))
    moved(model)
    model.eval()
    expected = logits(model)
    assert not torch.allclose(expected, logits(opened(base)), atol=1e-3)
    save_adapter(model, tmp_path / "ours", base=str(base))
    in_peft = peft.PeftModel.from_pretrained(opened(base), tmp_path / "ours")
    same(logits(in_peft), expected)
    in_peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    assert theirs["task_type"] == ours["task_type"] == "CAUSAL_LM"
    assert theirs["base_model_name_or_path"] == ours["base_model_name_or_path"] == str(base)
    assert theirs["inference_mode"] is ours["inference_mode"] is True
    assert set(theirs["target_modules"]) == set(ours["target_modules"])
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias"):
        assert theirs[key] == ours[key], key
    again = opened(base)
    load_adapter(again, tmp_path / "theirs")
    same(logits(again.eval()), expected)
    merge_adapter(tmp_path / "theirs", tmp_path / "merged")
    same(logits(opened(tmp_path / "merged")), expected)
    first, second = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert first.layers.keys() == second.layers.keys() and first.others.keys() == second.others.keys()
    for path, factors in first.layers.items():
        assert factors.scaling == pytest.approx(second.layers[path].scaling, rel=1e-12)
        assert all(map(torch.equal, factors.tensors, second.layers[path].tensors))


def test_prompts(base: Path, tmp_path: Path) -> None:
    """LLaMA-Adapter, PEFT's ADAPTION_PROMPT."""
    model = opened(base)
    add_prompts(model, length=4, layers=2, seed=0)
    moved(model)
    expected = logits(model.eval())
    assert not torch.allclose(expected, logits(opened(base)), atol=1e-4)
    save_prompts(model, tmp_path / "ours", base=str(base))
    in_peft = peft.PeftModel.from_pretrained(opened(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(in_peft), expected, rtol=0, atol=1e-6)  # its softmax is in fp32
    in_peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    for key in ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "adapter_len", "adapter_layers"):
        assert theirs[key] == ours[key], key
    again = opened(base)
    load_prompts(again, tmp_path / "theirs")
    same(logits(again.eval()), expected)
