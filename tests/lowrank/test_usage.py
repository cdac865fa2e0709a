"""What a model uses of its layers and parameters, as a pass without memory finds it: that of a real backward pass."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    FalconMambaConfig,
    Gemma3nTextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    ReformerConfig,
)

from relora.lowrank import LowRankConfig, inject
from relora.lowrank.inject import strip
from relora.lowrank.usage import is_handed_over, usage_of, with_siblings

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
LLAMA = LlamaConfig(**SHAPE, intermediate_size=48)
MIXTURE = Qwen3MoeConfig(
    **{**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16},
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
GEMMA3N = Gemma3nTextConfig(
    **{**SHAPE, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": [48, 48], "laurel_rank": 4},
    vocab_size_per_layer_input=96,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    activation_sparsity_pattern=[0.5, 0.0],
    layer_types=["sliding_attention", "full_attention"],
)
BART = BartConfig(
    vocab_size=96,
    d_model=32,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=48,
    **{"is_decoder": True, **ENDS},
)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model in which no parameter is zero, so that no path through it is dead."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def really_trained(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that have a gradient after a real backward pass."""
    model.train()(input_ids=torch.arange(32).view(2, 16), use_cache=False).logits.square().sum().backward()
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.grad is not None}


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, GEMMA3N, BART], ids=lambda config: config.model_type)
def test_the_parameters_with_a_gradient_are_those_of_a_real_backward_pass(config: PreTrainedConfig) -> None:
    model = build(config)
    usage = usage_of(model)
    assert usage is not None and usage.trained == really_trained(model)


@pytest.mark.parametrize("config", [LLAMA, MIXTURE, GEMMA3N, BART], ids=lambda config: config.model_type)
def test_a_model_on_the_meta_device_gives_the_same_answer(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    assert usage_of(shapes) == usage_of(build(config)) is not None


def test_neither_the_model_nor_the_random_stream_changes() -> None:
    model = build(GEMMA3N).eval()
    model.model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    usage = usage_of(model)
    assert usage is not None and "model.norm.weight" in usage.trained
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_layers_whose_weight_is_used_directly_are_not_called() -> None:
    usage = usage_of(build(GEMMA3N))
    assert usage is not None
    assert "model.layers.0.altup.correction_coefs" not in usage.called
    assert "model.layers.0.altup.correction_coefs.weight" in usage.trained
    assert "model.layers.0.altup.prediction_coefs" in usage.called


def test_attention_to_an_encoder_that_is_not_there_is_not_used() -> None:
    usage = usage_of(build(BART))
    assert usage is not None
    unused = "model.decoder.layers.0.encoder_attn.q_proj"
    assert unused not in usage.called and f"{unused}.weight" not in usage.trained


def reformer() -> PreTrainedModel:
    """A model whose blocks run inside an autograd function of its own, which computes their gradients."""
    sizes = {"hidden_size": 32, "attention_head_size": 16, "num_attention_heads": 2, "feed_forward_size": 48}
    config = ReformerConfig(
        **{"vocab_size": 96, "axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local"], **sizes},
        **{"max_position_embeddings": 64, "local_attn_chunk_length": 16, **ENDS},
    )
    return build(config)


def test_reversible_layers_compute_gradients_of_parameters_that_the_graph_does_not_show() -> None:
    """The bias of Reformer's head is in no graph at all: its forward pass does not add it."""
    model = reformer()
    usage = usage_of(model)
    assert usage is not None and usage.trained == really_trained(model) and "lm_head.bias" not in usage.trained
    block = "reformer.encoder.layers.0.attention.self_attention.query"
    assert block in usage.inside_functions and "lm_head" not in usage.inside_functions


def test_factors_inside_an_autograd_function_train_while_the_rest_is_frozen() -> None:
    model = reformer()
    inject(model, LowRankConfig(r=2, rest="frozen"))
    ids = torch.arange(32).view(2, 16)
    model.train()(input_ids=ids, use_cache=False).logits.square().sum().backward()
    factors = {name: one for name, one in model.named_parameters() if name.endswith("lora_B")}
    assert factors and all(one.grad.any() for one in factors.values())
    with torch.inference_mode():
        model.eval()(input_ids=ids, use_cache=False)
    strip(model)
    assert not any(module._forward_hooks for module in model.modules())


class Selecting(nn.Module):
    """A model whose scores only select, and one layer of which is for more than 20 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.scores, self.long, self.head = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 8)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        hidden = self.embedding(input_ids)
        best = self.scores(hidden).argmax(1, keepdim=True).expand(-1, -1, 4)
        hidden = hidden + hidden.gather(1, best)
        return (self.head(self.long(hidden) if input_ids.shape[1] > 20 else hidden),)


def test_the_length_of_a_sequence_counts_and_scores_that_select_have_no_gradient() -> None:
    model = Selecting()
    assert usage_of(model, 20).trained == {"embedding.weight", "head.weight", "head.bias"}  # type: ignore[union-attr]
    usage = usage_of(model, 40)
    assert usage is not None and "scores" in usage.called
    assert usage.trained == {name for name, _ in model.named_parameters()} - {"scores.weight", "scores.bias"}
    assert usage_of(model) is usage  # the length of the earlier call


def test_a_model_that_takes_no_ids_is_not_judged() -> None:
    assert usage_of(nn.Linear(2, 2)) is None


def test_a_model_that_looks_at_numbers_is_run_with_its_weights() -> None:
    class Counting(Selecting):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            sizes = torch.full((2,), input_ids.shape[1] // 2).tolist()
            return super().forward(torch.cat(input_ids.split(sizes, 1), 1))

    usage = usage_of(Counting(), 16)
    assert usage is not None and "embedding.weight" in usage.trained


def test_what_is_true_of_one_expert_counts_for_its_siblings() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(2, 2), "experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    found = with_siblings(nn.Sequential(model), ["0.layers.0.experts.1.weight"])
    assert found == {f"0.layers.0.experts.{number}.weight" for number in range(3)}


@pytest.mark.parametrize("config", [MambaConfig, FalconMambaConfig])
def test_weights_that_mamba_hands_to_fused_kernels(config: type[PreTrainedConfig]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    mixer = model.backbone.layers[0].mixer
    assert [name for name in ("in_proj", "x_proj", "dt_proj", "out_proj") if is_handed_over(mixer, name)] == [
        *("x_proj", "dt_proj", "out_proj")
    ]


class Looking(nn.Module):
    """Looks at weights of its layers, and uses a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.used = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x.to(self.one.weight.dtype), self.other.weight[:, :2])
        return self.one(x) if isinstance(self.one.weight, Tensor) else x @ self.used.weight


def test_a_look_at_a_weight_and_a_part_of_one_do_not_hand_it_over() -> None:
    model = Looking()
    assert [name for name, _ in model.named_children() if is_handed_over(model, name)] == ["used"]
