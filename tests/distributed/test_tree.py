"""The fixed tree: whatever part of the micro-batches a rank has, its nodes are of the one tree."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relora.distributed.reduce import Reduction, Share
from relora.distributed.tree import Node, Tree, _total


@given(st.integers(1, 70), st.integers(1, 9))
def test_the_ranks_nodes_add_up_to_the_root(parts: int, ranks: int) -> None:
    """Each part of the micro-batches is covered once, by few nodes, and all nodes of the tree are below the root."""
    root = Node(0, parts)
    bounds = [rank * parts // ranks for rank in range(ranks + 1)]
    below = set(root.all_below())
    places: dict[Node, int] = {}
    for start, stop in pairwise(bounds):
        nodes = root.largest_within(range(start, stop))
        assert [number for node in nodes for number in range(node.first, node.stop)] == list(range(start, stop))
        assert below >= set(nodes) and len(nodes) <= 2 * parts.bit_length()
        places |= {node: len(places) + row for row, node in enumerate(nodes)}
    everything = torch.tensor([[float(sum(range(node.first, node.stop)))] for node in places])
    assert _total(root, everything, places).item() == sum(range(parts))


def gradients_of(reduction: Reduction, losses: list[torch.Tensor], weight: nn.Parameter) -> torch.Tensor:
    """Gradient of a sum of losses, each a micro-batch of its own."""
    shares = [Share(0, range(number, number + 1)) for number in range(len(losses))]
    with reduction.step([weight], shares):
        for loss in losses:
            reduction.backward(loss, last=loss is losses[-1])
        summed = reduction.finish([loss.detach() for loss in losses])
    assert summed.shape == (len(losses),)
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    return gradient


def test_one_process_adds_in_the_order_of_the_tree() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(1000))
    factors = torch.randn(6, 1000) * 10 ** torch.randn(6, 1)
    expected = ((factors[0] + factors[1]) + (factors[2] + factors[3])) + (factors[4] + factors[5])
    losses = [(weight * factor).sum() for factor in factors]
    assert torch.equal(gradients_of(Tree(), losses, weight), expected)
    losses = [(weight * factor).sum() for factor in factors]
    in_turn = gradients_of(Reduction(), losses, weight)
    assert not torch.equal(in_turn, expected)  # else this test could not fail
    assert torch.allclose(in_turn, expected, atol=1e-4)


def test_a_tensor_without_a_gradient_keeps_none() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    tree, shares = Tree(), [Share(0, range(1)), Share(0, range(1, 2))]
    with tree.step([used, unused], shares):
        for last in (False, True):
            tree.backward(used.sum(), last=last)
        tree.finish([torch.zeros(()), torch.zeros(())])
    assert torch.equal(used.grad, torch.full((3,), 2.0)) and unused.grad is None
