"""Models of LLaMA's form get the tokens that transformers gives them; all others are left to transformers."""

from typing import Any

import pytest
import torch
from tests.zoo.tiny_models import tiny_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from relora.inference.decoder import Decoder, KeyValues, decoder_of
from relora.lowrank.config import LowRankConfig
from relora.lowrank.inject import inject
from relora.model.load import quiet_transformers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FORMS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "grouped heads, tied, biases": LlamaConfig(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "other size of a head": LlamaConfig(**SMALL, head_dim=16),
    "llama3's rotation": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, head_dim=8, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
}


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(5)
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig()  # no end tokens
    for module in model.modules():  # else all norms and biases are ones and zeros
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
        elif "Norm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return model


def continued(decoder: Decoder, ids: list[int], tokens: int, read: int | None = None) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens after a prompt, of which `read` tokens are read at first, and the logits before each."""
    cache = KeyValues(decoder, 1, len(ids) + tokens)
    found, logits = [], []
    with torch.inference_mode():
        last = decoder.read(ids[:read], cache)
        if read is not None:
            last = decoder.read(ids[read:], cache)
        for _ in range(tokens):
            logits.append(last)
            found.append(int(last.argmax()))
            last = decoder.step(torch.tensor(found[-1:]), cache)
    return found, torch.cat(logits)


def generated(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    prompt = torch.tensor([ids])
    with quiet_transformers():
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_the_tokens_are_those_of_transformers(form: str) -> None:
    model = model_of(FORMS[form])
    decoder = decoder_of(model)
    assert decoder is not None
    ids = [3, 14, 15, 92, 65, 35, 89]
    found, logits = continued(decoder, ids, 24)
    assert found == generated(model, ids, 24)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids + found[:-1]])).logits[0, len(ids) - 1 :]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("read", [1, 4, 6])
def test_a_prompt_may_be_read_in_two_parts(read: int) -> None:
    decoder = decoder_of(model_of(FORMS["qwen2"]))
    assert decoder is not None
    ids = [3, 14, 15, 92, 65, 35, 89]
    (whole, logits), (parts, of_parts) = (continued(decoder, ids, 12, at) for at in (None, read))
    assert whole == parts
    torch.testing.assert_close(of_parts, logits, rtol=1e-4, atol=1e-4)


def test_in_bf16_the_logits_are_those_of_the_model() -> None:
    model = model_of(FORMS["llama"], torch.bfloat16)
    decoder = decoder_of(model)
    assert decoder is not None
    ids = [3, 14, 15, 92]
    _, logits = continued(decoder, ids, 1)
    expected = model(input_ids=torch.tensor([ids])).logits[:, -1]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


def test_low_rank_factors_take_part() -> None:
    model = model_of(FORMS["llama"])
    plain = generated(model, [3, 14, 15], 16)
    inject(model, LowRankConfig(r=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.2)
    model.eval()
    decoder = decoder_of(model)
    assert decoder is not None
    found, _ = continued(decoder, [3, 14, 15], 16)
    assert found == generated(model, [3, 14, 15], 16) != plain


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "phi", "cohere", "olmo2", "mixtral"])
def test_other_forms_are_left_to_transformers(family: str) -> None:
    with quiet_transformers():
        assert decoder_of(AutoModelForCausalLM.from_config(tiny_config(family)).eval()) is None


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=8),
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        LlamaConfig(**SMALL, attn_implementation="eager"),
    ],
)
def test_what_only_long_texts_show_is_left_to_transformers(config: Any) -> None:
    assert decoder_of(model_of(config)) is None


def hook_the_model(model: Any) -> None:
    model.register_forward_hook(lambda module, given, made: None)


def hook_a_layer(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, given: None)


def replace_a_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward


def add_a_part(model: Any) -> None:
    model.model.layers[0].self_attn.extra = nn.Identity()


@pytest.mark.parametrize("change", [hook_the_model, hook_a_layer, replace_a_forward, add_a_part])
def test_a_model_that_somebody_has_changed_is_left_to_transformers(change: Any) -> None:
    model = model_of(FORMS["llama"])
    assert decoder_of(model) is not None
    change(model)
    assert decoder_of(model) is None


def test_a_class_of_somebody_else_is_left_to_transformers() -> None:
    class Own(LlamaForCausalLM):
        pass

    assert decoder_of(Own(FORMS["llama"]).eval()) is None


def test_hooks_of_what_is_called_are_called() -> None:
    model = model_of(FORMS["llama"])
    seen: list[str] = []
    parts = {"q": model.model.layers[0].self_attn.q_proj, "norm": model.model.norm, "embed": model.model.embed_tokens}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, given, made, name=name: seen.append(name))
    decoder = decoder_of(model)
    assert decoder is not None
    seen.clear()
    continued(decoder, [1, 2, 3], 2)
    assert sorted(seen) == sorted([*parts] * 3)


def test_a_part_whose_arithmetic_differs_is_noticed() -> None:
    """Only the numbers can tell that a class of the same parts computes something else."""
    same, other = (model_of(GraniteConfig(**SMALL, residual_multiplier=number)) for number in (1.0, 0.5))
    assert decoder_of(same) is not None
    assert decoder_of(other) is None
