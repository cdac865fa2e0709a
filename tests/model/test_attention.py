"""It is seen before training how a model attends: by which code, and to which tokens."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from tests.model.small import logits
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from relora.errors import UserError
from relora.model import open_model
from relora.model.attention import attention_note, check_causal

SMALL = {"vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_SDPA = {
    "gemma2": transformers.Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=8),
    "gpt_oss": transformers.GptOssConfig(
        **SHAPE, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        **SMALL, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "gptj": transformers.GPTJConfig(**SMALL, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2),
    "mpt": transformers.MptConfig(vocab_size=96, d_model=16, n_layers=2, n_heads=2, max_seq_len=64),
    "codegen": transformers.CodeGenConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "rwkv": transformers.RwkvConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, context_length=64),
    "mamba": transformers.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, state_size=4),
}
BERT = transformers.BertConfig(
    vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """A random model of a configuration, with every parameter away from zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", NO_SDPA)
def test_a_class_without_sdpa_opens_with_its_own_attention_and_says_so(family: str, tmp_path: Path) -> None:
    folder = saved(NO_SDPA[family], tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model = open_model(folder)
    assert torch.equal(logits(model), expected)
    note = attention_note(model)
    assert note is not None
    assert f"no SDPA for {type(model).__name__}" in note
    check_causal(model, folder)


def test_a_class_with_sdpa_has_nothing_to_say(tmp_path: Path) -> None:
    folder = saved(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"), tmp_path)
    model = open_model(folder)
    assert model.config._attn_implementation == "sdpa"
    assert attention_note(model) is None


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    model = open_model(saved(transformers.LlamaConfig(**SHAPE, attention_dropout=0.5), tmp_path)).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    check_causal(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (BERT, "set `is_decoder: true` in its config.json, or give a causal LM"),
        (
            transformers.Gemma3TextConfig(
                **SHAPE, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True, sliding_window=8
            ),
            "set `use_bidirectional_attention: false` in its config.json",
        ),
        (transformers.XLMConfig(vocab_size=96, emb_dim=16, n_layers=2, n_heads=2), "set `causal: true`"),
        (transformers.XLNetConfig(vocab_size=96, d_model=16, n_layer=2, n_head=2, d_inner=24), "give a causal LM"),
    ],
    ids=["bert", "gemma3", "xlm", "xlnet"],
)
def test_a_model_whose_tokens_see_those_after_them_is_refused(
    config: PreTrainedConfig, remedy: str, tmp_path: Path
) -> None:
    folder = saved(config, tmp_path)
    with pytest.raises(UserError, match="its attention is not causal") as caught:
        check_causal(open_model(folder), folder)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_set_to_be_causal_is_taken(tmp_path: Path) -> None:
    config = copy.deepcopy(BERT)
    config.is_decoder = True
    check_causal(open_model(saved(config, tmp_path)), tmp_path)


@pytest.mark.parametrize("place", [0, -1])
def test_a_leak_of_one_token_in_one_layer_is_seen(place: int, tmp_path: Path) -> None:
    """As code that came with a model might have it: one of the layers adds what the next token has."""

    class Leaks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(hidden + 1e-2 * hidden.roll(-1, dims=1))
            return found

    model = open_model(saved(transformers.LlamaConfig(**SHAPE), tmp_path))
    check_causal(model, tmp_path)
    model.model.layers[place].mlp = Leaks(model.model.layers[place].mlp)
    with pytest.raises(UserError, match="not causal"):
        check_causal(model, tmp_path)


def test_a_model_that_needs_more_than_tokens_is_refused_in_one_line(tmp_path: Path) -> None:
    model = open_model(saved(transformers.LlamaConfig(**SHAPE), tmp_path))

    class Wants(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise ValueError("You have to specify pixel_values\nand more")

    model.model.layers[0].mlp = Wants()
    with pytest.raises(
        UserError, match=r"a llama model cannot be run on tokens alone: You have to specify pixel_values$"
    ):
        check_causal(model, tmp_path)
