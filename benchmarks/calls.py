"""What one call of a layer costs the host: microseconds, forward alone and with the way back.

    OMP_NUM_THREADS=1 python benchmarks/calls.py

The tensors are so small that the arithmetic hardly counts; what is left is Python, autograd and the operators' way to
their kernels, which small models wait for, above all on a GPU. The best of several rounds, since other work can only
slow a call down.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sides.machine import machine
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, LowRankLinear
from relora.lowrank.costs import NOMINAL_RATES

TOKENS, INN, OUT, RANK = 20, 16, 24, 4
CALLS, ROUNDS = 300, 7


class PlainLora(nn.Module):
    """W x + s B (A x), as one writes it down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(OUT, INN)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(RANK, INN)), nn.Parameter(torch.randn(OUT, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A) * 0.5, self.lora_B)


def ours(**options: str) -> LowRankLinear:
    return LowRankLinear(
        nn.Linear(INN, OUT, bias=False), LowRankConfig(r=RANK, rates=NOMINAL_RATES, **options), name="x"
    )


def microseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - began) / CALLS)
    return 1e6 * best


def main() -> None:
    print(machine(torch.get_num_threads()))
    print("| layer | forward | and backward |\n|---|---|---|")
    x = torch.randn(TOKENS, INN, requires_grad=True)
    layers = {
        "nn.Linear": nn.Linear(INN, OUT, bias=False),
        "LoRA, plain": PlainLora(),
        "ours": ours(),
        "ours, int8": ours(frozen="int8"),
    }
    for name, layer in layers.items():

        def forward(layer: nn.Module = layer) -> Tensor:
            y: Tensor = layer(x)
            return y

        def both(forward: Callable[[], Tensor] = forward) -> None:
            y = forward()
            y.backward(torch.ones_like(y))

        print(f"| {name} | {microseconds(forward):.0f} | {microseconds(both):.0f} |", flush=True)


if __name__ == "__main__":
    main()
