"""The layers that get factors in real architectures, and what is said of those that get none."""

import pytest
import torch
from tests.lowrank.test_usage import BART, GEMMA3N, MIXTURE, SHAPE, build
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconH1Config,
    Glm4MoeConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers, merge
from relora.lowrank.targets import choose_targets

LLAMA4 = Llama4TextConfig(
    **{**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "intermediate_size_mlp": 48},
    num_local_experts=4,
    num_experts_per_tok=1,
    moe_layers=[1],
)
QWEN2_MOE = Qwen2MoeConfig(
    **{**SHAPE, "num_key_value_heads": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
)
FALCON_H1 = FalconH1Config(
    **{**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48, "mamba_d_ssm": 32, "mamba_n_heads": 2},
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_d_state=8,
)
GLM4_MOE = Glm4MoeConfig(
    **{**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16},
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
IDS = torch.arange(32).view(2, 16)
LEFT_OUT = {
    "llama4": (LLAMA4, "feed_forward.router", "a Llama4Router has a forward pass of its own"),
    "gemma3n": (GEMMA3N, "altup.correction_coefs", "the model uses its weight without calling it"),
    "bart": (BART, "encoder_attn.q_proj", "the model does not use it"),
    "falcon_h1": (FALCON_H1, "mamba.out_proj", "fused kernels take its weight and would pass its factors by"),
}
"""Family -> its configuration, the end of the path of a layer that is left out, and the reason."""


@pytest.mark.parametrize("family", LEFT_OUT)
def test_all_linear_passes_over_layers_that_cannot_have_factors_and_every_factor_trains(family: str) -> None:
    config, ending, reason = LEFT_OUT[family]
    model = build(config)
    report = inject(model, LowRankConfig(r=4, rest="frozen"))
    assert not any(path.endswith(ending) for path in report.targets)
    assert any(ending in note and note.endswith(reason) for note in report.notes)
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in low_rank_layers(model).values())  # type: ignore[union-attr]
    assert report.low_rank == report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", LEFT_OUT)
def test_a_pattern_that_names_only_such_layers_is_refused(family: str) -> None:
    config, ending, reason = LEFT_OUT[family]
    with pytest.raises(UserError, match=rf"lowrank.target_modules: .*{ending} cannot have factors: {reason}"):
        choose_targets(build(config), LowRankConfig(r=4, target_modules=(ending,)))


def test_a_pattern_that_names_other_layers_too_leaves_them_out_and_says_so() -> None:
    found = choose_targets(build(BART), LowRankConfig(r=4, target_modules=("q_proj",)))
    assert found.paths == ["model.decoder.layers.0.self_attn.q_proj"]
    assert found.left_out == {"model.decoder.layers.0.encoder_attn.q_proj": "the model does not use it"}


def test_an_adapter_that_is_read_has_factors_beside_layers_that_the_model_does_not_use() -> None:
    config = LowRankConfig(r=4, target_modules=("encoder_attn.q_proj",))
    assert choose_targets(build(BART), config, named_exactly=True).paths == [
        "model.decoder.layers.0.encoder_attn.q_proj"
    ]


def test_a_gate_narrower_than_r_is_left_out_unless_a_pattern_names_it() -> None:
    model = build(QWEN2_MOE)
    found = choose_targets(model, LowRankConfig(r=4))
    gates = [f"model.layers.{number}.mlp.shared_expert_gate" for number in range(2)]
    assert found.left_out == dict.fromkeys(gates, "r (4) exceeds its smaller side (1)")
    assert "no factors beside 2 layers (model.layers.*.mlp.shared_expert_gate)" in found.notes("frozen")[1]
    with pytest.raises(UserError, match=r"shared_expert_gate \(1 x 32\); r may be at most 1 here, or leave it out"):
        choose_targets(model, LowRankConfig(r=4, target_modules=("q_proj", "shared_expert_gate")))
    with pytest.raises(UserError, match="rank_pattern"):
        choose_targets(model, LowRankConfig(r=1, rank_pattern={"shared_expert_gate": 2}))


def test_falcons_own_linear_class_computes_a_linear_layer_and_gets_factors() -> None:
    model = build(FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True)).eval()
    before = model(IDS).logits
    assert len(inject(model, LowRankConfig(r=4)).targets) == 8
    torch.testing.assert_close(model(IDS).logits, before)
    merge(model)
    torch.testing.assert_close(model(IDS).logits, before)


class Rounding(nn.Linear):
    """A linear layer that rounds its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


def test_a_class_that_computes_something_else_is_left_out_and_the_random_stream_stays() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), Rounding(4, 4)])})
    stream = torch.get_rng_state()
    found = choose_targets(model, LowRankConfig(r=2))
    assert torch.equal(torch.get_rng_state(), stream)
    assert found.paths == ["blocks.0"] and found.left_out == {"blocks.1": "a Rounding has a forward pass of its own"}


def test_layers_that_share_a_weight_are_left_out_of_all_linear() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    twice = nn.Linear(4, 4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([one, other, twice, nn.Linear(4, 4)]), "again": twice})
    found = choose_targets(model, LowRankConfig(r=2))
    assert found.paths == ["blocks.3"]
    assert found.left_out == dict.fromkeys(("blocks.0", "blocks.1", "blocks.2"), "another module has the same weight")


@pytest.mark.parametrize(("rest", "end"), [("trained", "they train at full rank"), ("frozen", "they stay frozen")])
def test_fused_experts_are_named_with_their_share(rest: str, end: str) -> None:
    model = build(MIXTURE)
    [note] = inject(model, LowRankConfig(r=4, rest=rest)).notes  # type: ignore[arg-type]
    inside = {name: p.numel() for name, p in model.model.layers.named_parameters() if "lora" not in name}
    share = sum(size for name, size in inside.items() if ".experts." in name) / sum(inside.values())
    assert note == f"experts of 2 layers ({share:.0%} of the blocks' parameters) get no factors: {end}"


@pytest.mark.parametrize("pattern", ["gate_up_proj", "experts", "mlp.experts.down_proj", ".*experts.*"])
def test_a_pattern_that_names_fused_experts_is_refused_with_the_reason(pattern: str) -> None:
    targets = pattern if pattern.startswith(".*") else (pattern,)
    with pytest.raises(UserError, match=r"names fused experts \(model.layers.0.mlp.experts"):
        choose_targets(build(MIXTURE), LowRankConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("pattern", ["experts.w1", "experts.0.w1", "w3", r".*\.experts\.\d+\.gate_proj"])
def test_a_name_that_experts_have_elsewhere_is_refused_with_how_they_are_here(pattern: str) -> None:
    """Other libraries, and the files of Mixtral, hold each expert's layers apart; transformers fuses them."""
    targets = pattern if pattern.startswith(".*") else ("q_proj", pattern)
    line = r"matches no linear layer; .*q_proj.*; its experts are fused into tensors \(model\.layers\.0\.mlp"
    with pytest.raises(UserError, match=line):
        choose_targets(build(MIXTURE), LowRankConfig(r=4, target_modules=targets))


def test_a_name_of_dense_layers_and_of_experts_takes_the_dense_ones_and_says_what_it_does_not() -> None:
    found = choose_targets(build(GLM4_MOE), LowRankConfig(r=4, target_modules=("down_proj",)))
    assert found.paths == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"]
    assert found.notes("frozen")[0].startswith("experts of 1 layer (")


def test_trained_modules_without_a_gradient_are_refused() -> None:
    config = LowRankConfig(r=4, rest="frozen", trained_modules=("encoder_attn_layer_norm",))
    with pytest.raises(UserError, match="encoder_attn_layer_norm never gets a gradient"):
        inject(build(BART), config)


@pytest.mark.parametrize("config", [LLAMA4, GEMMA3N, BART, QWEN2_MOE], ids=lambda config: config.model_type)
def test_targets_on_the_meta_device_are_those_of_the_model_with_weights(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    assert choose_targets(shapes, LowRankConfig(r=4)) == choose_targets(build(config), LowRankConfig(r=4))
