"""Directions of new factors: keyed random ones, and approximate leading singular vectors."""

import pytest
import torch
from torch import nn

from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.directions import gradient_bases, leading_basis, random_basis
from relora.seeding import keyed_generator


def matrix_with_decay(out_features: int, in_features: int, decay: float) -> torch.Tensor:
    generator = keyed_generator(0, "matrix")
    u, v = (
        torch.linalg.qr(torch.randn(n, min(out_features, in_features), generator=generator).double()).Q
        for n in (out_features, in_features)
    )
    return u @ torch.diag(decay ** torch.arange(min(out_features, in_features)).double()) @ v.T


@pytest.mark.parametrize(("out_features", "in_features"), [(60, 40), (40, 60), (6, 50)])
def test_leading_basis_captures_the_leading_singular_values(out_features: int, in_features: int) -> None:
    full, r = matrix_with_decay(out_features, in_features, 0.8), 5
    u, v = leading_basis(full, r, keyed_generator(1, "basis"))
    assert u.shape == (out_features, r) and v.shape == (in_features, r)
    for side in (u, v):
        torch.testing.assert_close(side.T @ side, torch.eye(r).double())
    best = torch.linalg.svdvals(full)[:r]
    held = torch.linalg.svdvals(u.T @ full @ v)
    torch.testing.assert_close(held, best, rtol=1e-3, atol=0)  # two power iterations, for a spectrum with ratio 0.8


def test_random_bases_are_keyed() -> None:
    layer = next(iter(injected()[0].values()))
    same = [random_basis(layer, 2, keyed_generator(3, "redraw"))[1] for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], random_basis(layer, 2, keyed_generator(4, "redraw"))[1])


def injected() -> tuple[dict, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12))
    inject(model, LowRankConfig(r=3))
    return low_rank_layers(model), model, torch.randn(50, 10)


def test_gradient_bases_are_those_of_the_dense_gradient() -> None:
    layers, model, x = injected()
    bases = gradient_bases(model, layers, lambda model: model(x).square().mean(), cycle=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in layers.values():
        layer.weight.requires_grad_()
    twin = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12))
    for index in (0, 2):
        twin[index].load_state_dict({"weight": layers[str(index)].weight, "bias": layers[str(index)].bias})
    twin(x).square().mean().backward()
    for name, (u, v) in bases.items():
        gradient = twin[int(name)].weight.grad
        best = torch.linalg.svdvals(gradient)[:3]
        torch.testing.assert_close(torch.linalg.svdvals(u.T @ gradient @ v), best, rtol=2e-2, atol=0)


def test_the_basis_of_a_layer_used_twice_is_that_of_the_summed_gradient() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"a": nn.Linear(8, 8).double()}), torch.randn(5, 8, dtype=torch.float64)

    def twice(model: nn.Module) -> torch.Tensor:
        model["a"](x)  # a use that the loss ignores
        return model["a"](torch.tanh(model["a"](x))).square().mean()

    dense = torch.autograd.grad(twice(model), model["a"].weight)[0]
    inject(model, LowRankConfig(r=2))
    u, v = gradient_bases(model, low_rank_layers(model), twice, cycle=1)["a"]
    held = torch.linalg.svdvals(u.T @ dense @ v)
    torch.testing.assert_close(held, torch.linalg.svdvals(dense)[:2], rtol=1e-3, atol=0)
