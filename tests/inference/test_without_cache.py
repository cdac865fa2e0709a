"""Text is generated also by classes for which transformers fails to make a cache of keys and values."""

from typing import Any

import pytest
import torch
from tests.zoo.tiny_models import tiny_config
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.bart.modeling_bart import BartForCausalLM

from relora.errors import UserError
from relora.inference.decoding import generate_ids
from relora.model.load import quiet_transformers

PROMPT = torch.tensor([[5, 6, 7]])
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def settings() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)


def bart(encoder_layers: int) -> PreTrainedModel:
    """A decoder of two layers, whose cache transformers makes for as many layers as the encoder has."""
    torch.manual_seed(0)
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=encoder_layers, decoder_layers=2, max_position_embeddings=32, **sizes
    )
    model: PreTrainedModel = BartForCausalLM(config).eval()
    model.generation_config = GenerationConfig()  # as within `without_generation_settings`
    return model


@torch.no_grad()
def by_hand(model: Any) -> torch.Tensor:
    ids = PROMPT
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("encoder_layers", [1, 2])
def test_a_cache_of_the_wrong_size_is_done_without(encoder_layers: int) -> None:
    model = bart(encoder_layers)
    if encoder_layers == 1:
        with pytest.raises(IndexError):
            model.generate(PROMPT, generation_config=settings())
    assert torch.equal(generate_ids(model, PROMPT, torch.ones_like(PROMPT), settings()), by_hand(model))


def test_a_class_that_cannot_generate_says_so_in_one_line() -> None:
    class Silent(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
            raise NotImplementedError("no text\nfrom this one")

    model = Silent(LlamaConfig(**SMALL)).eval()
    with pytest.raises(UserError, match=r"^a llama model cannot generate text: no text$"):
        generate_ids(model, PROMPT, torch.ones_like(PROMPT), settings())


def test_an_error_in_the_middle_of_a_text_is_not_taken_for_a_missing_cache() -> None:
    class Stumbles(LlamaForCausalLM):
        def forward(self, input_ids: Any, **others: Any) -> Any:
            if int(input_ids[0, -1]) == 7:
                raise ValueError("seven")
            return super().forward(input_ids, **others)

    model = Stumbles(LlamaConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="seven"):
        generate_ids(model, PROMPT, torch.ones_like(PROMPT), settings())


@pytest.mark.parametrize("family", ["xlstm", "prophetnet", "blt"])
def test_classes_whose_cache_fails_generate_what_they_generate_without_it(family: str) -> None:
    """xLSTM fails with an error of another kind for each length of a prompt."""
    torch.manual_seed(1)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
        for length in (3, 20):
            ids = torch.arange(2, 2 + length)[None]
            alone = settings()
            alone.use_cache = False
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=alone)
            assert torch.equal(generate_ids(model, ids, torch.ones_like(ids), settings()), expected)
