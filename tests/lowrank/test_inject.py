"""Injection into real architectures: targets, what trains, refusals; and the removal of the layers."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from relora.errors import UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, load_exact_tensors, low_rank_layers, merge

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **SPECIAL, intermediate_size=48))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, **SPECIAL, intermediate_size=48))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **SPECIAL))


def tied_qwen() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **SPECIAL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    )


FAMILIES = {"llama": (llama, 14), "neox": (neox, 8), "gpt2": (gpt2, 8), "tied_qwen": (tied_qwen, 14)}


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, int]:
    torch.manual_seed(0)
    build, targets = FAMILIES[request.param]
    return build().eval(), targets


IDS = torch.arange(24).view(2, 12)


def test_linear_layers_of_blocks_get_factors_and_the_rest_trains_at_full_rank(
    family: tuple[PreTrainedModel, int],
) -> None:
    model, targets = family
    keys, before = list(model.state_dict()), model(IDS).logits
    report = inject(model, LowRankConfig(r=4))
    assert len(report.targets) == targets
    assert torch.equal(model(IDS).logits, before)
    assert [key for key in model.state_dict() if "lora_" not in key] == keys  # the keys of the base do not change
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{name}.weight" for name in report.targets}
    assert report.frozen + report.trainable == sum(p.numel() for p in model.parameters())
    assert report.low_rank == sum(
        4 * (out_features + in_features) for out_features, in_features in report.targets.values()
    )


def test_merge_restores_the_plain_model(family: tuple[PreTrainedModel, int]) -> None:
    model, _ = family
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    inject(model, LowRankConfig(r=4))
    for layer in low_rank_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    adapted = model(IDS).logits
    merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_embeddings_stay_tied() -> None:
    model = tied_qwen()
    inject(model, LowRankConfig(r=4))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_exact_tensors_round_trip(family: tuple[PreTrainedModel, int]) -> None:
    model, _ = family
    inject(model, LowRankConfig(r=4, base="bf16", trainable_scaling=True), seed=1)
    for layer in low_rank_layers(model).values():
        nn.init.normal_(layer.lora_B)
        layer.merge_()
        layer.redraw_(1)
    saved = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    other = type(model)(model.config).eval()
    inject(other, LowRankConfig(r=4, base="bf16", trainable_scaling=True), seed=2)
    load_exact_tensors(other, saved)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exact_tensors(other).items())


def test_loading_refuses_other_names_and_shapes_before_it_copies() -> None:
    model = llama()
    tensors = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    with pytest.raises(UserError, match="lm_head"):
        load_exact_tensors(model, {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match="lm_head"):
        load_exact_tensors(model, tensors | {"lm_head.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        (("q_proj", "v_proj"), 4),
        (("layers.0.mlp.up_proj",), 1),
        (r".*layers\.1\..*_proj", 7),
        (("lm_head",), 1),
    ],
)
def test_patterns(targets: str | tuple[str, ...], matched: int) -> None:
    assert len(inject(llama(), LowRankConfig(r=4, target_modules=targets)).targets) == matched


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (llama, {"target_modules": ("q_proj", "query")}, "'query' matches no linear layer; the model has .*q_proj"),
        (llama, {"target_modules": ("proj",)}, "'proj' matches"),
        (llama, {"target_modules": "q_proj"}, "'q_proj' matches"),
        (llama, {"target_modules": "(["}, "not a regular expression"),
        (llama, {"target_modules": ()}, "no pattern"),
        (llama, {"r": 33}, "may be at most 32"),
        (tied_qwen, {"target_modules": ("lm_head",), "r": 4}, "tied"),
        (lambda: nn.LayerNorm(3), {}, "no linear layer"),
    ],
)
def test_refusals_leave_the_model_unchanged(model: type, config: dict[str, object], message: str) -> None:
    subject = model()
    with pytest.raises(UserError, match=message):
        inject(subject, LowRankConfig(**config))
    assert not low_rank_layers(subject) and all(parameter.requires_grad for parameter in subject.parameters())


def test_a_second_injection_is_refused() -> None:
    model = llama()
    inject(model, LowRankConfig(r=4))
    with pytest.raises(UserError, match="merge"):
        inject(model, LowRankConfig(r=4))


def test_works_for_any_module() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert set(inject(model, LowRankConfig(r=2)).targets) == {"0", "2"}
