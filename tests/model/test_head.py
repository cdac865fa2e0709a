"""The head's input is found without computing logits, in any architecture, and the model does not change."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutput

from relora import LowRankConfig, inject
from relora.model.head import head_input, whole_logits_reason

SHAPE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SHAPE | {"intermediate_size": 32}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SEPARATE: dict[str, PreTrainedConfig] = {
    "llama, untied": LlamaConfig(**WIDE, **ENDS, attention_dropout=0.5),
    "qwen2, tied": Qwen2Config(**WIDE, **ENDS, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2, tied, dropout": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, **ENDS),
    "gpt_neox, dropout": GPTNeoXConfig(**WIDE, **ENDS, hidden_dropout=0.3, tie_word_embeddings=False),
    "phi, a head with a bias": PhiConfig(**WIDE, **ENDS, resid_pdrop=0.2),
    "opt": OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8, bos_token_id=0, eos_token_id=0, pad_token_id=1),
    "bloom": BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2, **ENDS),
    "mamba": MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, **ENDS),
}
CHANGING: dict[str, PreTrainedConfig] = {
    "gemma2, a cap": Gemma2Config(**WIDE, **ENDS, num_key_value_heads=2, head_dim=8),
    "cohere, a scale": CohereConfig(**WIDE, **ENDS, num_key_value_heads=2),
    "granite, a scale of one": GraniteConfig(**WIDE, **ENDS, num_key_value_heads=2),
}
IDS = torch.arange(18).reshape(2, 9)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build(SEPARATE["llama, untied"])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "low rank"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", SEPARATE)
def test_the_head_makes_the_models_logits_of_it(family: str, training: bool, low_rank: bool) -> None:
    model = build(SEPARATE[family])
    if low_rank:
        inject(model, LowRankConfig(r=1), seed=0)
    model.train(training)
    assert whole_logits_reason(model) is None
    torch.manual_seed(1)
    logits = model(input_ids=IDS, use_cache=False).logits
    stream = torch.get_rng_state()
    torch.manual_seed(1)
    found = head_input(model, IDS)
    assert found is not None
    hidden, head, _ = found
    assert torch.equal(F.linear(hidden, head.weight, head.bias), logits)
    assert torch.equal(torch.get_rng_state(), stream)  # the same draws, no more
    assert hooks(model) == 0


@pytest.mark.parametrize("family", CHANGING)
def test_logits_that_are_changed_after_the_head_are_seen(family: str) -> None:
    model = build(CHANGING[family])
    assert whole_logits_reason(model) == "it changes what its head returns, as by a cap or a scale"
    assert head_input(model, IDS) is None


def test_looking_leaves_modes_and_random_streams_alone() -> None:
    model = build(SEPARATE["gpt2, tied, dropout"]).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    assert whole_logits_reason(model) is None
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_is_tried_once_and_forgotten_with_it() -> None:
    model = build(SEPARATE["llama, untied"])
    passes: list[tuple[int, ...]] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for _ in range(3):
        head_input(model, IDS)
    assert passes == [(1, 1), (2, 9), (2, 9), (2, 9)]
    known = weakref.ref(model)
    handle.remove()
    del model
    gc.collect()
    assert known() is None


def test_no_hook_stays_after_an_error(llama: LlamaForCausalLM) -> None:
    assert whole_logits_reason(llama) is None
    with pytest.raises(IndexError):
        head_input(llama, torch.tensor([[64]]))
    assert hooks(llama) == 0


class Wrapped(nn.Linear):
    """A head that is more than its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 1


def with_own_forward(model: LlamaForCausalLM) -> None:
    model.lm_head = Wrapped(16, 64, bias=False)


def with_swapped_forward(model: LlamaForCausalLM) -> None:
    model.lm_head.forward = lambda hidden: F.linear(hidden, model.lm_head.weight) * 2


def with_hook(model: LlamaForCausalLM) -> None:
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 2)


def with_two_layers(model: LlamaForCausalLM) -> None:
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_own_forward, "its head is a Wrapped with a forward pass of its own"),
        (with_swapped_forward, "its head is a Linear with a forward pass of its own"),
        (with_hook, "it changes what its head returns, as by a cap or a scale"),
        (with_two_layers, "its head is a Sequential with a forward pass of its own"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_head_that_is_more_than_its_weight_is_seen(
    llama: LlamaForCausalLM, change: Callable[[LlamaForCausalLM], None], reason: str, known: bool
) -> None:
    """A head that gets a forward pass of its own after the first pass is recognised, too."""
    if known:
        assert head_input(llama, IDS) is not None
    change(llama)
    assert head_input(llama, IDS) is None
    assert whole_logits_reason(llama) == reason


class Odd(nn.Module):
    """Logits of a head that is used in a way of its own."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head, self.use = nn.Embedding(64, 8), nn.Linear(8, 64), use

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=self.use(self.head, self.embedding(input_ids)))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda head, x: F.linear(x, head.weight), "it calls its head 0 times"),
        (lambda head, x: head(x) + head(x), "it calls its head 2 times"),
        (lambda head, x: head(x).mul_(2), "it changes what its head returns, as by a cap or a scale"),
        (lambda head, x: head(torch.cat([x, x], 1)), "its head sees other positions than the tokens'"),
        (lambda head, x: head(x) if head(x)[0, -1].any() else x, "it does not run without its head: "),
    ],
)
def test_other_uses_of_a_head_are_seen(use: Callable[[nn.Linear, Tensor], Tensor], reason: str) -> None:
    model = Odd(use)
    assert (whole_logits_reason(model) or "").startswith(reason)
    assert head_input(model, IDS) is None
    assert hooks(model) == 0


def test_a_model_that_does_not_tell_its_head_keeps_its_logits() -> None:
    assert whole_logits_reason(nn.Linear(2, 2)) == "it does not tell its head"


@torch.no_grad()
def test_looking_compiles_nothing(llama: LlamaForCausalLM) -> None:
    """Compiled blocks see the batch's shape alone."""
    lengths: list[int] = []

    def backend(graph: nn.Module, examples: list[Tensor]) -> nn.Module:
        lengths.extend(example.shape[1] for example in examples if example.ndim == 3)
        return graph

    expected = llama.eval()(input_ids=IDS, use_cache=False).logits
    for layer in llama.model.layers:
        layer.compile(backend=backend, dynamic=False)
    found = head_input(llama, IDS)
    torch.compiler.reset()
    assert found is not None
    torch.testing.assert_close(F.linear(found[0], found[1].weight), expected)
    assert set(lengths) == {9}
