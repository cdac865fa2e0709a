"""AdamW for everything but the matrices of a method, which the method's own rule updates, in one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class BesideAdamW(torch.optim.AdamW):
    """AdamW over the groups whose entry `own` is False; a subclass updates the parameters of the others."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["own"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["own"]:
                for parameter in group["params"]:
                    self.update(parameter, group)
        return loss

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Update one parameter of a method; every method that has groups of its own gives its rule here."""
        raise NotImplementedError


def group_of(parameters: list[nn.Parameter], rate: float, *, own: bool) -> dict[str, Any]:
    """Build a parameter group with the entries that `relora.train.optim.set_lr` reads."""
    return {"params": parameters, "lr": rate, "initial_lr": rate, "turn": None, "own": own}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of all tensors in the optimizer's state but single numbers, projections included."""
    total = 0
    for state in optimizer.state.values():
        values = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
        total += sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and value.numel() > 1)
    return total
