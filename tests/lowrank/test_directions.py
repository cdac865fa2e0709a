"""Where fresh factors point: at what leads, nearly, by keyed draws."""

import pytest
import torch
from torch import nn

from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.directions import gradient_bases, leading_basis, random_basis
from relora.seeding import keyed_generator


def matrix(out: int, inn: int, decay: float) -> torch.Tensor:
    generator = keyed_generator(0, "matrix")
    u, v = (torch.linalg.qr(torch.randn(n, min(out, inn), generator=generator).double()).Q for n in (out, inn))
    return u @ torch.diag(decay ** torch.arange(min(out, inn)).double()) @ v.T


@pytest.mark.parametrize(("out", "inn"), [(60, 40), (40, 60), (6, 50)])
def test_leading_frame_holds_what_the_decomposition_holds(out: int, inn: int) -> None:
    whole, r = matrix(out, inn, 0.8), 5
    u, v = leading_basis(whole, r, keyed_generator(1, "frame"))
    assert u.shape == (out, r) and v.shape == (inn, r)
    for side in (u, v):
        torch.testing.assert_close(side.T @ side, torch.eye(r).double())
    best = torch.linalg.svdvals(whole)[:r]
    held = torch.linalg.svdvals(u.T @ whole @ v)
    torch.testing.assert_close(held, best, rtol=1e-3, atol=0)  # two rounds over a spectrum that falls by 0.8


def test_frames_are_keyed() -> None:
    layer = next(iter(injected()[0].values()))
    same = [random_basis(layer, 2, keyed_generator(3, "redraw"))[1] for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], random_basis(layer, 2, keyed_generator(4, "redraw"))[1])


def injected() -> tuple[dict, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12))
    inject(model, LowRankConfig(r=3))
    return low_rank_layers(model), model, torch.randn(50, 10)


def test_gradient_frames_are_those_of_the_dense_gradient() -> None:
    layers, model, x = injected()
    frames = gradient_bases(model, layers, lambda model: model(x).square().mean(), cycle=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in layers.values():
        layer.weight.requires_grad_()
    twin = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12))
    for index in (0, 2):
        twin[index].load_state_dict({"weight": layers[str(index)].weight, "bias": layers[str(index)].bias})
    twin(x).square().mean().backward()
    for name, (u, v) in frames.items():
        gradient = twin[int(name)].weight.grad
        best = torch.linalg.svdvals(gradient)[:3]
        torch.testing.assert_close(torch.linalg.svdvals(u.T @ gradient @ v), best, rtol=2e-2, atol=0)
