"""Weights in a model's files that the opened class does not take are named; the head of another task is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.small import SMALL, logits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from relora.errors import UserError
from relora.model import build_model, open_model

Warned = pytest.LogCaptureFixture


def add(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write further weights into the file of a model."""
    weights = {**load_file(folder / "model.safetensors"), **weights}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    """Change values in the config.json of a model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def opened(folder: Path, caplog: Warned) -> tuple[PreTrainedModel, list[str]]:
    """Open a model, and return it with the warnings, without the folder's name."""
    with caplog.at_level(logging.WARNING, "relora"):
        model = open_model(folder)
    start = f"warning: {folder}: "
    return model, [line.removeprefix(start) for line in caplog.messages if line.startswith(start)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_is_no_language_model(
    auto: type[AutoModelForSequenceClassification], tied: bool, tmp_path: Path
) -> None:
    auto.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a LlamaFor.*Classification, whose head \(`score\..*the model that it was"):
        open_model(tmp_path)


def test_layers_beyond_the_configuration_are_counted(tmp_path: Path, caplog: Warned) -> None:
    whole = build_model("llama-9m", SMALL, seed=0)
    whole.save_pretrained(tmp_path)
    set_config(tmp_path, num_hidden_layers=1)
    model, warned = opened(tmp_path, caplog)
    extra = [tensor for name, tensor in whole.named_parameters() if name.startswith("model.layers.1.")]
    percent = 100 * sum(tensor.numel() for tensor in extra) / whole.num_parameters()
    assert warned == [
        f"not used, and not saved with the model, since LlamaForCausalLM has no place for them: {len(extra)} tensors "
        f"of its files ({percent:.2g}% of their numbers), model.layers.1.input_layernorm.weight first"
    ]
    assert len(model.model.layers) == 1


def test_a_head_beside_that_of_the_language_model_is_named(tmp_path: Path, caplog: Warned) -> None:
    GPT2DoubleHeadsModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    _, (warned,) = opened(tmp_path, caplog)
    assert "2 tensors of its files" in warned
    assert warned.endswith("multiple_choice_head.summary.bias first")


def test_a_head_that_the_class_ignores_in_silence_is_named(tmp_path: Path, caplog: Warned) -> None:
    config = Qwen3NextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert opened(tmp_path, caplog)[1] == []
    add(tmp_path, {"mtp.fc.weight": torch.ones(16, 32), "mtp.norm.weight": torch.ones(16)})
    _, (warned,) = opened(tmp_path, caplog)
    assert "has no place for them: 2 tensors of its files" in warned
    assert warned.endswith("mtp.fc.weight first")


def test_layers_with_merged_experts_are_counted_too(tmp_path: Path, caplog: Warned) -> None:
    AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2)).save_pretrained(tmp_path)
    set_config(tmp_path, num_hidden_layers=1)
    _, (warned,) = opened(tmp_path, caplog)
    assert "(at least " in warned  # the experts have other names in the files


def test_masks_in_old_files_are_no_weights(tmp_path: Path, caplog: Warned) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    add(
        tmp_path, {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "lm_head.weight": model.lm_head.weight.detach()}
    )
    assert opened(tmp_path, caplog)[1] == []
    # as on the hub: without the prefix of the body, so that the mask's pattern fits biases of another name
    weights = {
        name.removeprefix("transformer."): one for name, one in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, warned = opened(tmp_path, caplog)
    assert warned == []
    assert torch.equal(logits(again), logits(model))


def test_weights_in_several_files_are_counted_over_all(tmp_path: Path, caplog: Warned) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path, max_shard_size="4KB")
    set_config(tmp_path, num_hidden_layers=1)
    _, (warned,) = opened(tmp_path, caplog)
    assert "9 tensors of its files" in warned
