"""The takeover: factors begin with the leading directions of what the warm start has changed."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.takeover import take_over_


def warmed(kind: type[nn.Module] = nn.Linear) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a network whose weights have moved, most in few directions, and return its initial weights."""
    torch.manual_seed(0)
    sizes = ((24, 16), (16, 20))
    shapes = [(i, o) if kind is nn.Linear else (o, i) for i, o in sizes]
    model = nn.Sequential(*(kind(*shape) for shape in shapes))
    initial = {str(index): layer.weight.detach().clone() for index, layer in enumerate(model)}
    for layer in model:
        rows, columns = layer.weight.shape
        u, _, vt = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
        values = torch.logspace(0, -3, min(rows, columns))
        layer.weight.data += u @ (values[:, None] * vt)
    return model, initial


def of_rank(matrix: torch.Tensor, r: int) -> torch.Tensor:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :r] * values[:r]) @ vt[:r]


@pytest.mark.parametrize("alpha", [4, 12])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_factors_hold_the_leading_directions(base: str, kind: type[nn.Module], alpha: int) -> None:
    model, initial = warmed(kind)
    moved = {name: model.get_submodule(name).weight.detach().clone() for name in initial}
    inject(model, LowRankConfig(r=4, lora_alpha=alpha, target_modules=("0", "1"), base=base))
    share = take_over_(model, initial)
    lost = whole = 0.0
    for name, layer in low_rank_layers(model).items():
        update = moved[name] - initial[name]
        leading = of_rank(update, 4)
        torch.testing.assert_close(layer.delta().detach(), leading, rtol=0, atol=2e-3)  # randomized, 2 power iterations
        torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.base.exact, moved[name] - layer.delta(), rtol=0, atol=1e-6)
        lost += (update - leading).square().sum().item()
        whole += update.square().sum().item()
    assert share == pytest.approx(1 - lost / whole, abs=1e-3) and share < 1


def test_the_function_stays() -> None:
    model, initial = warmed()
    x = torch.randn(5, 24)
    before = model(x)
    inject(model, LowRankConfig(r=4, target_modules=("0", "1")))
    take_over_(model, initial)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_weight_that_has_not_moved_keeps_its_factors() -> None:
    model, initial = warmed()
    initial["1"] = model[1].weight.detach().clone()
    inject(model, LowRankConfig(r=4, target_modules=("0", "1")))
    drawn = model[1].lora_A.detach().clone()
    take_over_(model, initial)
    assert torch.equal(model[1].lora_A, drawn) and not model[1].lora_B.any() and model[0].lora_B.any()


def test_refused() -> None:
    model, initial = warmed()
    model[1].weight.data[0, 0] = torch.nan
    inject(model, LowRankConfig(r=4, target_modules=("0", "1")))
    with pytest.raises(NonFinite, match=r"1\.weight is not finite at the switch"):
        take_over_(model, initial)
    model, initial = warmed()
    inject(model, LowRankConfig(r=4, target_modules=("0", "1"), dora=True))
    with pytest.raises(UserError, match="dora"):
        take_over_(model, initial)
