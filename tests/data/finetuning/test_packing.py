import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from relora.data.finetuning.examples import Example, ExampleBatches
from relora.data.finetuning.packing import check_packing, pack
from relora.errors import UserError
from relora.measure import token_loss
from relora.seeding import keyed_generator

SHAPE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SEPARATE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "qwen2": Qwen2Config(**SHAPE, intermediate_size=48, num_key_value_heads=2),
    "mistral": MistralConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2, sliding_window=4),
}
MIXING: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SHAPE, alibi=True),
    "opt": OPTConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "mamba": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def model_of(config: PreTrainedConfig, attention: str | None = None, *, fresh: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if not fresh:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def examples(count: int = 24, longest: int = 32) -> list[Example]:
    draw = keyed_generator(0, "examples")
    found = []
    for number in range(count):
        size = int(torch.randint(2, longest + 1, (1,), generator=draw))
        ids = torch.randint(40, (size,), generator=draw).to(torch.int32).numpy()
        found.append(Example(ids, np.arange(size) >= size // 3, f"record {number}"))
    return found


@given(lengths=st.lists(st.integers(0, 50), max_size=80), spare=st.integers(0, 30), seed=st.integers(0, 3))
def test_every_example_is_in_one_row_that_holds_it(lengths: list[int], spare: int, seed: int) -> None:
    capacity = max(lengths, default=0) + spare
    rows = pack(lengths, capacity, seed)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert all(room <= capacity for room in filled)
    # no two rows could have been one
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_rows_are_full() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    lengths = np.clip(draw.lognormal(5, 0.8, 5000), 8, 1024).astype(int).tolist()  # about those of instruction sets
    rows = pack(lengths, 1024, 0)
    assert sum(lengths) / (1024 * len(rows)) > 0.98
    assert rows != pack(lengths, 1024, 1)
    assert rows == pack(lengths, 1024, 0)


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-11), ("eager", 1e-6)])  # softmax in fp32
@pytest.mark.parametrize("family", SEPARATE)
def test_packed_examples_lose_what_each_loses_alone(family: str, attention: str, tolerance: float) -> None:
    model = model_of(SEPARATE[family], attention)
    several = examples()
    alone, targets = 0.0, 0
    for example in several:
        ids = torch.from_numpy(example.input_ids).long()[None]
        labels = torch.where(torch.from_numpy(example.scored)[None], ids, -100)[:, 1:]
        alone += token_loss(model, ids[:, :-1], labels)[0].item()
        targets += example.targets
    rows = pack([example.positions for example in several], 32, 0)
    assert max(map(len, rows)) > 2
    batches = ExampleBatches(several, sequences=len(rows), sequence_length=32, pad_id=0, packing=True, seed=0)
    losses = [token_loss(model, *parts) for parts in zip(*(part.split(3) for part in batches.batch(0)), strict=True)]
    assert sum(int(number) for _, number in losses) == targets > 100
    assert math.isclose(sum(loss.item() for loss, _ in losses), alone, rel_tol=tolerance)


@pytest.mark.parametrize("family", SEPARATE)
def test_a_model_that_keeps_examples_apart_may_pack(family: str) -> None:
    model = model_of(SEPARATE[family]).float()
    model.train()
    model.get_input_embeddings().eval()
    state = torch.random.get_rng_state()
    check_packing(model, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not model.get_input_embeddings().training


@pytest.mark.parametrize("family", MIXING)
def test_a_model_that_mixes_examples_may_not(family: str) -> None:
    with pytest.raises(UserError, match="packing: the model lets an example see the one before it"):
        check_packing(model_of(MIXING[family], fresh=True), 1)  # where a leak makes the least difference


def test_a_model_without_positions_may_not() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.embed(input_ids)

    with pytest.raises(UserError, match="packing: the model takes no position numbers"):
        check_packing(Plain(), 1)
