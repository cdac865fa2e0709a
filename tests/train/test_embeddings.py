"""The gradient of an embedding that is added row by row equals autograd's, and other layers keep autograd's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from relora.train.embeddings import rows_added_in_place


def summed(table: nn.Embedding, ids: list[Tensor], in_place: bool) -> Tensor:
    """Gradient of a nonlinear loss, summed over micro-batches."""
    table.zero_grad()
    for part in ids:
        if in_place:
            with rows_added_in_place(table):
                table(part).sin().exp().sum().backward()
        else:
            table(part).sin().exp().sum().backward()
    assert table.weight.grad is not None
    return table.weight.grad.clone()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([None, 0, 3, -1]),
)
def test_parity_with_autograd(ids: list[list[int]], padding_idx: int | None) -> None:
    """With repeated ids, ids that never occur, a padding row and several micro-batches."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 5, padding_idx=padding_idx, dtype=torch.float64)
    parts = [torch.tensor(part) for part in ids]
    torch.testing.assert_close(summed(table, parts, True), summed(table, parts, False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_models(family: str, tied: bool) -> None:
    """GPT-2 also embeds positions; with tied weights the head adds its gradient to the same tensor as the rows."""
    torch.manual_seed(0)
    if family == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **shape))
    else:
        still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, **still)
        config.tie_word_embeddings = tied
        model = GPT2LMHeadModel(config)
    model = model.double().train()
    gradients = []
    for in_place in (False, True):
        model.zero_grad()
        for start in (0, 2):
            ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))[start : start + 2]
            with rows_added_in_place(model if in_place else nn.Identity()):
                logits = model(input_ids=ids, use_cache=False).logits
                F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_no_gradient_of_the_tables_size_is_made_for_a_micro_batch() -> None:
    table = nn.Embedding(1000, 4)
    with rows_added_in_place(table):
        table(torch.tensor([1, 2])).sum().backward()
        first = table.weight.grad
        incoming = []
        table.weight.register_hook(incoming.append)  # sees what autograd hands to the leaf
        table(torch.tensor([2, 3])).sum().backward()
    assert table.weight.grad is first and incoming == [None]
    assert first is not None and first.sum(1).nonzero().flatten().tolist() == [1, 2, 3] and first[2, 0] == 2


def test_the_embedding_is_as_it_was_afterwards() -> None:
    table, seen = nn.Embedding(7, 5), []
    table.register_forward_hook(lambda *_: seen.append("hook"))
    with pytest.raises(ZeroDivisionError), rows_added_in_place(table):
        assert "forward" in vars(table)
        table(torch.tensor([1]))
        raise ZeroDivisionError
    assert seen == ["hook"] and "forward" not in vars(table)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    "table",
    [
        Scaled(7, 5),
        nn.Embedding(7, 5, max_norm=1.0),
        nn.Embedding(7, 5, scale_grad_by_freq=True),
        nn.Embedding(7, 5, sparse=True),
        nn.Embedding(7, 5).requires_grad_(False),
    ],
    ids=["subclass", "max_norm", "scale_grad_by_freq", "sparse", "frozen"],
)
def test_what_does_more_than_look_up_is_left_alone(table: nn.Embedding) -> None:
    with rows_added_in_place(table):
        assert "forward" not in vars(table)


def test_a_process_group_gets_its_gradients_from_autograd() -> None:
    table = nn.Embedding(7, 5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with rows_added_in_place(table):
            assert "forward" not in vars(table)
    finally:
        torch.distributed.destroy_process_group()
