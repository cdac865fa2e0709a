"""Parameters on which no logit depends are left out of training and named."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from relora.model.unused import leave_out_unused

BART = transformers.BartConfig(
    vocab_size=96,
    d_model=16,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=64,
)


def test_the_cross_attention_of_half_a_model_is_left_out_of_training() -> None:
    model = AutoModelForCausalLM.from_config(BART)
    line = leave_out_unused(model, 16)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".encoder_attn" in name}
    number = sum(model.get_parameter(name).numel() for name in frozen)
    assert line is not None
    assert line.startswith(f"left out of training: {number:,} parameters to which no gradient comes back")
    assert "model.decoder.layers.*.encoder_attn.k_proj.weight" in line
    ids = torch.arange(12)[None] % 7 + 3
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_uses_all_of_itself_has_nothing_to_say() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=96, **shape))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    assert leave_out_unused(model, 16) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
