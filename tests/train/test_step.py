"""One step: every token weighs the same, nothing moves if a figure is not finite, dead tensors are named."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from relora.errors import RunStopped
from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.usage import usage_of
from relora.train.optim import named_state
from relora.train.step import clear_nonfinite_flag, dead_tensors, train_step


class Sequences(NamedTuple):
    input_ids: Tensor
    labels: Tensor


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids).flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"), (labels != -100).sum()


def batch() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 16, (6, 5), generator=generator)
    labels = torch.randint(0, 16, (6, 5), generator=generator)
    labels[0, :4] = -100  # micro-batches with unequal numbers of valid tokens
    labels[3] = -100
    return Sequences(ids, labels)


def one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    micro: int = 6,
    take=None,
    **changes: object,
):
    settings = {
        "seed": 0,
        "step": 0,
        "micro_sequences": micro,
        "clip_grad_norm": 0.0,
        "autocast": None,
        "check_gradients": True,
    }
    return (take or partial(train_step, loss=loss))(model, optimizer, sequences, **(settings | changes))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_one_large_batch(micro: int) -> None:
    outcomes, weights = [], []
    for size in (6, micro):
        model = Bigram().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outcomes.append(one_step(model, optimizer, batch(), size))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert outcomes[0].tokens == outcomes[1].tokens == 21
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-6)  # the logged sum is fp32
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


def test_clipping() -> None:
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    outcome = one_step(model, optimizer, batch(), clip_grad_norm=0.01)
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert outcome.grad_norm > 0.01 and moved.item() == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_moves() -> None:
    model = Bigram()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RunStopped, match=r"step 3: loss nan"):
        one_step(model, optimizer, batch(), step=3)
    assert not optimizer.state
    assert all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(model.parameters(), before, strict=True))


def test_a_step_without_synchronisation_is_the_same_step() -> None:
    weights = []
    for sync in (True, False):
        model = Bigram()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        outcomes = [one_step(model, optimizer, batch(), step=step, sync=sync, clip_grad_norm=0.1) for step in range(3)]
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert [outcome.tokens for outcome in outcomes] == [21] * 3
        assert all(outcome.nonfinite_flag is None if sync else not outcome.nonfinite_flag for outcome in outcomes)
    assert torch.equal(*weights)


@pytest.mark.parametrize("good_steps", [0, 2])
def test_nothing_moves_after_a_non_finite_step_until_the_flag_is_cleared(good_steps: int) -> None:
    model = Bigram()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def tensors() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in (dict(model.named_parameters()) | named_state(model, optimizer)).items()}

    for step in range(good_steps):
        one_step(model, optimizer, batch(), step=step, sync=False)
    before = tensors()
    bad = partial(train_step, loss=lambda *args: (loss(*args)[0] * torch.nan, torch.tensor(0)))
    assert one_step(model, optimizer, batch(), sync=False, take=bad).nonfinite_flag == 1
    assert one_step(model, optimizer, batch(), sync=False).nonfinite_flag == 1  # finite, but after one that was not
    clear_nonfinite_flag(optimizer)
    after = tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert one_step(model, optimizer, batch()).nonfinite_flag is None
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_dead_tensor_is_named() -> None:
    model = Bigram()
    model.forgotten = nn.Parameter(torch.ones(3))
    with pytest.raises(RunStopped, match="forgotten gets no gradient"):
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch())


class Mixture(Bigram):
    """A bigram model with experts in a list inside its block, of which a batch asks the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.blocks[0]["experts"][0](self.inner(self.embed(ids)))))


def test_an_expert_without_tokens_is_not_dead_while_another_one_trains() -> None:
    model = Mixture()
    loss(model, *batch())[0].backward()
    assert model.blocks[0]["experts"][1].weight.grad is None and dead_tensors(model) == []
    for parameter in model.blocks[0]["experts"][0].parameters():
        parameter.grad.zero_()
    assert len(dead_tensors(model)) == 6


def test_a_pair_of_zero_factors_is_found_out() -> None:
    """The published code wraps with A = B = 0, which never gets a gradient. B = 0 alone is right, and A is excused."""
    model = Bigram()
    inject(model, LowRankConfig(r=2, target_modules=("inner",)))
    layer = low_rank_layers(model)["inner"]
    loss(model, *batch())[0].backward()
    assert dead_tensors(model) == [] and not layer.lora_A.grad.any()
    with torch.no_grad():
        layer.lora_A.zero_()
    model.zero_grad()
    loss(model, *batch())[0].backward()
    assert dead_tensors(model) == ["inner.lora_B"]


class Scaled(Bigram):
    """A bigram model in which a scale that begins at zero hides a layer, as in Gemma 3n, xLSTM and Zaya."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scale = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(torch.tanh(self.inner(hidden)) + self.scale * self.hidden(hidden))


def test_a_gradient_that_is_zero_until_its_partner_moves_stops_nothing() -> None:
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert one_step(model, optimizer, batch()).without_gradient == {"hidden.weight", "hidden.bias"}
    before = model.hidden.weight.clone()
    assert one_step(model, optimizer, batch(), step=1).without_gradient == frozenset()
    assert not torch.equal(model.hidden.weight, before)


def test_a_model_in_which_nothing_has_a_gradient_stops_the_run() -> None:
    model = Scaled()
    for parameter in (*model.embed.parameters(), *model.inner.parameters(), *model.head.parameters(), model.scale):
        parameter.requires_grad_(False)
    with pytest.raises(RunStopped, match=r"hidden\.weight \(and 1 more tensors\) gets no gradient"):
        one_step(model, torch.optim.SGD(model.hidden.parameters(), lr=0.1), batch())


class ForLongSequences(Bigram):
    """A model one layer of which runs on more than 8 tokens alone, as the compressors of DeepSeek-V4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        hidden = self.inner(self.embed(input_ids))
        return (self.head(self.long(hidden) if input_ids.shape[1] > 8 else hidden),)


def test_a_layer_that_a_short_batch_does_not_reach_stops_nothing() -> None:
    def loss_of(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids)[0].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"), (labels != -100).sum()

    model = ForLongSequences()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert one_step(model, optimizer, batch(), loss=loss_of).without_gradient == {"long.weight", "long.bias"}
    usage_of(model, 8)  # the run's sequences are all as short, so nothing of it would ever train
    with pytest.raises(RunStopped, match=r"long\.weight \(and 1 more tensors\) gets no gradient"):
        one_step(model, optimizer, batch(), loss=loss_of)


def test_a_loss_that_no_trained_tensor_moves_stops_the_run_in_one_line() -> None:
    """Reversible blocks, as Reformer's, hand no graph on to a frozen rest: autograd alone would raise RuntimeError."""
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(False)
    with pytest.raises(RunStopped, match="step 3: the loss depends on no tensor that trains"):
        one_step(model, optimizer, batch(), step=3)


def test_dropout_is_keyed_by_seed_and_step() -> None:
    def outcome(seed: int, step: int) -> float:
        model = nn.Sequential(Bigram(), nn.Dropout(0.5))
        torch.rand(5)
        return one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch(), seed=seed, step=step).loss

    assert outcome(0, 1) == outcome(0, 1)
    assert len({outcome(0, 1), outcome(0, 2), outcome(1, 1)}) == 3
