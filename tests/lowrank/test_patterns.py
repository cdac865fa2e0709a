"""Patterns match as in PEFT, and they decide ranks, scales, and which modules train at full rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers, merge, restart, strip
from relora.lowrank.patterns import by_pattern

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
IDS = torch.arange(24).view(2, 12)
RANKS = {"q_proj": 2, r"layers\.1\..*": 6, "up_proj": 3}
ALPHAS = {"layers.0.mlp.up_proj": 5.0, "(q|k)_proj": 7.0}


def llama(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **SPECIAL, **overrides)).eval()


def tied_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPE, **SPECIAL, num_key_value_heads=2, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **SPECIAL)
    return GPT2LMHeadModel(config).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@given(
    path=st.lists(st.sampled_from(["model", "layers", "0", "1", "q_proj", "proj"]), min_size=1, max_size=4),
    keys=st.lists(
        st.sampled_from(
            ["q_proj", "proj", "layers.0", "0.q_proj", r"layers\.\d+\..*", "a|proj", "model", "^q_proj", "1"]
        ),
        unique=True,
    ),
)
def test_a_pattern_matches_as_in_peft(path: list[str], keys: list[str]) -> None:
    name, values = ".".join(path), {key: i for i, key in enumerate(keys)}
    assert by_pattern(values, name, -1, "x") == values.get(get_pattern_key(keys, name), -1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_equal_pefts(rslora: bool) -> None:
    ours = llama()
    inject(ours, LowRankConfig(r=4, lora_alpha=8.0, rank_pattern=RANKS, alpha_pattern=ALPHAS, rslora=rslora))
    peft = LoraConfig(
        r=4,
        lora_alpha=8.0,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        use_rslora=rslora,
        target_modules=[name.rpartition(".")[2] for name in low_rank_layers(ours)],
    )
    theirs = get_peft_model(llama(), peft).base_model.model
    for name, layer in low_rank_layers(ours).items():
        twin = theirs.get_submodule(name)
        assert layer.r == twin.r["default"] == len(layer.lora_A)
        assert layer.scaling == twin.scaling["default"]
    assert {layer.r for layer in low_rank_layers(ours).values()} == {2, 3, 4, 6}
    assert len({layer.scaling for layer in low_rank_layers(ours).values()}) > 4


def test_the_report_counts_the_ranks_of_the_patterns() -> None:
    report = inject(llama(), LowRankConfig(r=4, rank_pattern={"up_proj": 8}))
    ranks = {name: 8 if name.endswith("up_proj") else 4 for name in report.targets}
    assert report.low_rank == sum(
        ranks[name] * (out_features + in_features) for name, (out_features, in_features) in report.targets.items()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"query": 2}}, r"lowrank\.rank_pattern: 'query' matches no target; the targets are .*q_proj"),
        ({"alpha_pattern": {"q_proj": 2, "lm_head": 1}}, r"lowrank\.alpha_pattern: 'lm_head' matches no target"),
        ({"rank_pattern": {"proj": 2}}, "'proj' matches no target"),
        ({"rank_pattern": {"q_proj)(": 2}}, r"lowrank\.rank_pattern: .* is not a regular expression"),
        ({"rank_pattern": {"v_proj": 33}}, r"lowrank\.rank_pattern \(33\) exceeds .*v_proj \(32 x 32\).* at most 32"),
        ({"rank_pattern": {"v_proj": 0}}, r"lowrank\.rank_pattern \(0\) is too small"),
        (
            {"trained_modules": ("norms",), "rest": "frozen"},
            r"'norms' matches no module .*the model has .*lm_head.*norm",
        ),
        ({"trained_modules": ("act_fn",), "rest": "frozen"}, "'act_fn' matches no module that has parameters"),
        ({"trained_modules": ("q_proj",), "rest": "frozen"}, "q_proj is a target"),
        ({"trained_modules": ("[",), "rest": "frozen"}, r"lowrank\.trained_modules: '\[' is not a regular expression"),
        ({"trained_modules": ("lm_head",)}, r"lowrank\.trained_modules: everything trains"),
        ({"init": "gaussian"}, r"lowrank\.init: 'gaussian' is none of kaiming"),
        ({"rest": "half"}, r"lowrank\.rest: 'half' is none of trained, frozen"),
    ],
)
def test_refusals_leave_the_model_unchanged(config: dict[str, object], message: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=message):
        inject(model, LowRankConfig(r=4, **config))
    assert not low_rank_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("build", [llama, tied_qwen, gpt2])
def test_with_a_frozen_rest_only_the_factors_train(build: type) -> None:
    """The biases of targets are frozen, too."""
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = inject(model, LowRankConfig(r=4, rest="frozen"))
    assert trained(model) == {f"{name}.{kind}" for name in report.targets for kind in ("lora_A", "lora_B")}
    assert (report.full_rank, report.frozen) == (0, parameters)
    assert (
        report.trainable
        == report.low_rank
        == sum(4 * (out_features + in_features) for out_features, in_features in report.targets.values())
    )


def test_named_modules_train_at_full_rank() -> None:
    """They are named by an ending or a regular expression; everything in them trains except targets."""
    model = llama(attention_bias=True)
    config = LowRankConfig(r=4, rest="frozen", trained_modules=("lm_head", r"layers\.0\..*norm", "layers.1.self_attn"))
    report = inject(model, config)
    full_rank = {name for name in trained(model) if "lora_" not in name}
    norms = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    biases = {f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkvo"}
    assert full_rank == {"lm_head.weight"} | norms | biases
    assert report.full_rank == sum(model.get_parameter(name).numel() for name in full_rank)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_trains_and_stays_tied(name: str) -> None:
    model = tied_qwen()
    report = inject(model, LowRankConfig(r=4, rest="frozen", trained_modules=(name,)))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert report.full_rank == model.lm_head.weight.numel()
    strip(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("leave", [merge, strip])
def test_merge_and_strip_restore_what_trains(leave: type) -> None:
    """A parameter that was frozen before injection is frozen again, even if it trained in between."""
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = trained(model)
    inject(model, LowRankConfig(r=4, rest="frozen", trained_modules=("lm_head",)))
    assert model.lm_head.weight.requires_grad and not model.model.norm.weight.requires_grad
    leave(model)
    assert trained(model) == before


def test_a_restart_leaves_the_rest_frozen() -> None:
    model = llama()
    inject(model, LowRankConfig(r=4, rest="frozen"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    names, before = trained(model), model(IDS).logits
    restart(model, optimizer, cycle=1)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert trained(model) == names and not any(layer.lora_B.any() for layer in low_rank_layers(model).values())
    assert model.model.norm.weight.grad is None
