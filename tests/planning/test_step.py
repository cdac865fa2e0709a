"""What a simulated step labels as activations and as loss, in a model whose longest list is not its blocks."""

import pytest
import torch
from tests.model.with_experts import with_experts
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, inject
from relora.lowrank.costs import Rates
from relora.measure import token_loss
from relora.model.blocks import Checkpointing, training_blocks
from relora.planning import StepFigures, StepShape, simulate

RATES = Rates(fp32=((1, 1e9), (64, 1e11)), bf16=2e11, int8=4e11, bandwidth=1e10)
SHAPE = StepShape(micro_sequences=2, sequence_length=24, micro_batches=1, device=torch.device("cpu"), rates=RATES)


def simulated(checkpointing: Checkpointing, *, low_rank: bool, experts_in_list: bool) -> StepFigures:
    def run(model: nn.Module, ids: Tensor) -> None:
        with training_blocks(model, checkpointing=checkpointing):
            loss, tokens = token_loss(model, ids, ids)
            torch.autograd.backward(loss / tokens)

    def prepare(model: nn.Module) -> None:
        if low_rank:
            inject(model, LowRankConfig(r=4, rates=RATES))

    with torch.device("meta"):
        model = with_experts(in_list=experts_in_list)
    return simulate(
        model, SHAPE, run, prepare=prepare, moments=lambda parameter: [torch.zeros_like(parameter.data)] * 2
    )


@pytest.mark.parametrize("low_rank", [False, True], ids=["full rank", "low rank"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_experts_in_a_list_are_no_blocks(checkpointing: Checkpointing, low_rank: bool) -> None:
    """The plan is that of the same model whose experts are kept in something other than a list."""
    in_list = simulated(checkpointing, low_rank=low_rank, experts_in_list=True)
    named = simulated(checkpointing, low_rank=low_rank, experts_in_list=False)
    assert in_list == named


def test_activations_of_all_blocks_are_called_activations() -> None:
    """Each of the 8 experts of each of the 3 blocks keeps at least its two products, of width 48."""
    memory = simulated("none", low_rank=False, experts_in_list=True).memory
    assert memory["activations"] > 3 * 8 * 2 * (4 * 2 * 24 * 48)
