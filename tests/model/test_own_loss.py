"""What a model's own loss holds beside the cross-entropy: trained as transformers trains it, or said."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BartConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from relora.measure import evaluating, token_loss
from relora.model.blocks import Checkpointing, training_blocks
from relora.model.own_loss import own_loss_note

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
MIXTRAL = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
IDS = torch.arange(64).view(2, 32)
LABELS = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))  # a test changes it


BALANCED = {
    "mixtral": MixtralConfig(**MIXTRAL, output_router_logits=True, router_aux_loss_coef=0.5),
    "jetmoe": JetMoeConfig(
        **{**SHAPE, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 48, "num_local_experts": 4},
        output_router_logits=True,
        aux_loss_coef=0.5,
    ),
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("family", BALANCED)
def test_loss_and_gradients_are_those_of_the_models_own_loss(family: str, checkpointing: Checkpointing) -> None:
    model = build(BALANCED[family]).train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    own = model(input_ids=IDS, labels=IDS, use_cache=False).loss.detach()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with training_blocks(model, checkpointing=checkpointing):
        loss, tokens = token_loss(model, IDS, LABELS)
        (loss / tokens).backward()
    torch.testing.assert_close((loss / tokens).detach(), own)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_held_out_losses_are_the_cross_entropy_alone() -> None:
    model = build(BALANCED["mixtral"])
    with evaluating(model):
        with_auxiliary, _ = token_loss(model, IDS, LABELS)
        model.config.output_router_logits = False
        without, _ = token_loss(model, IDS, LABELS)
    assert with_auxiliary == without


@pytest.mark.parametrize(
    ("config", "experts_train", "note"),
    [
        (LlamaConfig(**SHAPE, intermediate_size=48), True, None),
        (BartConfig(vocab_size=96, d_model=32, decoder_layers=1, is_decoder=True), True, None),
        (BALANCED["mixtral"], False, "the loss: with router_aux_loss_coef (0.5) times"),
        (MixtralConfig(**MIXTRAL), True, "the loss: without the auxiliary loss that balances the experts"),
        (MixtralConfig(**MIXTRAL), False, None),
        (
            BambaConfig(
                **{**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "attn_layer_indices": [1]},
                mamba_n_heads=4,
                mamba_d_head=16,
                mamba_d_state=8,
                z_loss_coefficient=0.1,
            ),
            True,
            "BambaForCausalLM itself computes another one",
        ),
    ],
    ids=["llama", "bart: unshifted labels", "balanced", "unbalanced", "frozen experts", "bamba: z-loss"],
)
def test_what_is_said_of_the_loss(config: PreTrainedConfig, experts_train: bool, note: str | None) -> None:
    model = build(config).train()
    stream = torch.get_rng_state()
    said = own_loss_note(model, experts_train=experts_train)
    assert torch.equal(torch.get_rng_state(), stream) and all(module.training for module in model.modules())
    assert said is None if note is None else said is not None and note in said
