"""Projection of the optimizer state onto new factors: exact where the old factors contain the gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relora.lowrank import LowRankConfig, RestartConfig, inject, low_rank_layers, restart
from relora.lowrank.moments import PartnerChange, reset_moments


def optimizer_with(factor: nn.Parameter, first: torch.Tensor, second: torch.Tensor) -> torch.optim.AdamW:
    """Build AdamW with these moments of one factor, after seven steps."""
    optimizer = torch.optim.AdamW([factor], lr=0.1)
    optimizer.state[factor] = {"step": torch.tensor(7.0), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    return optimizer


def projected(
    first: torch.Tensor, second: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the moments of a lora_B [out, r] after its lora_A changed from `before` to `after`."""
    factor = nn.Parameter(torch.zeros_like(first))
    optimizer = optimizer_with(factor, first, second)
    change = PartnerChange(before, after, slice(0, first.shape[1]), rank_dim=1)
    assert reset_moments(optimizer, factor, "project", change, 0.1, (0, 1, "B")) == 0
    assert optimizer.state[factor]["step"] == 7
    return optimizer.state[factor]["exp_avg"], optimizer.state[factor]["exp_avg_sq"]


def test_the_first_moment_is_exact_for_a_gradient_inside_the_old_row_space() -> None:
    """If dW's rows are in A's row space, m = dW Aᵀ must become exactly dW A'ᵀ for any A'."""
    torch.manual_seed(0)
    before, after = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    gradient = torch.randn(6, 4).double() @ before
    first, _ = projected(gradient @ before.T, torch.rand(6, 4).double(), before, after)
    torch.testing.assert_close(first, gradient @ after.T)


def test_an_unchanged_or_permuted_partner_keeps_the_moments() -> None:
    torch.manual_seed(0)
    before = torch.randn(4, 9).double()
    m, v = torch.randn(6, 4).double(), torch.rand(6, 4).double()
    first, second = projected(m, v, before, before)
    torch.testing.assert_close(first, m)
    torch.testing.assert_close(second, v)
    swapped = [1, 0, 3, 2]
    first, second = projected(m, v, before, before[swapped])
    torch.testing.assert_close((first, second), (m[:, swapped], v[:, swapped]))


def test_rows_outside_the_old_row_space_get_no_momentum_and_the_mean_second_moment() -> None:
    before, after = torch.eye(9)[:4].double(), torch.eye(9)[4:8].double()
    v = torch.rand(6, 4).double()
    first, second = projected(torch.randn(6, 4).double(), v, before, after)
    assert not first.any()
    torch.testing.assert_close(second, v.mean(1, keepdim=True).expand(6, 4))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_second_moment_stays_positive(seed: int, r: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after, m = (torch.randn(n, 7, generator=generator).double() for n in (r, r, 6))
    v = m[:, :r].square() + 1e-3
    _, second = projected(m[:, :r], v, before, after)
    assert (second > 0).all() and second.isfinite().all()


def test_the_moments_beside_a_zero_factor_are_cleared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, LowRankConfig(r=2))
    layer = low_rank_layers(model)["0"]
    optimizer = torch.optim.AdamW(layer.factors.values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    report = restart(model, optimizer, RestartConfig(init="orthogonal", optimizer="project"), cycle=1)
    assert layer.lora_A not in optimizer.state and optimizer.state[layer.lora_B]["step"] == 3
    assert report.moments_cleared == 2 * layer.lora_A.numel()
