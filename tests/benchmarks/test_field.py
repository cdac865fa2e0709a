"""The methods of benchmarks/field.py are what their papers define, and the loop around them is the package's."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.config import RunConfig, parse_config
from relora.recipes.pretrain import pretrain
from relora.train.muon import RMS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OUT, IN, R = 12, 20, 4

Configure = Callable[..., RunConfig]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`field.<name>`, importable as the script imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"field.{name}")


@pytest.fixture
def script(part: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script itself, whose name its folder of parts has, too."""
    spec = importlib.util.spec_from_file_location("field_script", BENCHMARKS / "field.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "field_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def configure(prepared: Path, tmp_path: Path) -> Configure:
    """A run of 12 steps at full rank, with rates of its own for the matrices."""

    def build(**optimizer: object) -> RunConfig:
        return parse_config(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {
                    "preset": "llama-9m",
                    "vocab_size": 512,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                },
                "data": {
                    "train": str(prepared / "train"),
                    "validation": str(prepared / "validation"),
                    "sequence_length": 32,
                },
                "method": "full",
                "schedule": {"total_steps": 12, "warmup_steps": 2},
                "optimizer": {"lr": 1e-2, "betas": [0.9, 0.99], **optimizer},
                "batch": {"sequences": 4, "micro_sequences": 2},
                "evaluate": {"every_steps": 12, "tokens": 300},
                "log": {"trackers": []},
                "samples": {"prompts": ["The"], "max_new_tokens": 2},
            }
        )

    return build


@pytest.fixture
def setting(script: ModuleType, configure: Configure) -> Any:
    return script.Setting(configure(), r=4, rate=4e-3, period=5, decay=0.5, full_matrices=3)


@pytest.mark.parametrize(("method", "name"), [("full", "adamw"), ("galore", "galore"), ("fira", "fira")])
def test_the_loop_gives_the_packages_own_figure(
    script: ModuleType, setting: Any, configure: Configure, method: str, name: str
) -> None:
    projection = {} if method == "full" else {"projection": {"rank": 4, "every_steps": 5}}
    package = pretrain(configure(name=name, matrix_lr=4e-3, **projection), quiet=True)
    trained, _, perplexity = script.run(script.METHODS[method], setting)
    assert perplexity == package.evaluation.perplexity
    assert trained == package.trainable_parameters


@pytest.mark.parametrize("method", ["sumo", "gum", "switchlora", "factorized", "refactored", "cola", "sltrain"])
def test_every_method_learns_and_counts_what_it_keeps(script: ModuleType, setting: Any, method: str) -> None:
    trained, state, perplexity = script.run(script.METHODS[method], setting)
    full, full_state, _ = script.run(script.METHODS["full"], setting)
    assert perplexity < 400  # an untrained model is at the vocabulary's size, 512
    assert state < full_state == 8 * full
    assert trained == full if method in ("sumo", "gum") else trained < full


def test_sltrain_is_a_product_and_sparse_values(part: Any) -> None:
    layer = part("layers").SparseAndLowRank(torch.Size([OUT, IN]), R, 0.1, generator())
    assert len(layer.values) == 24 == len(layer.places.unique())  # 10% of 240
    sparse = torch.zeros(OUT * IN).index_put((layer.places,), layer.values.detach()).view(OUT, IN)
    assert torch.equal(layer.weight(), sparse)  # B is zero at first
    nn.init.normal_(layer.B, generator=generator())
    x = torch.randn(3, IN, generator=generator(1))
    torch.testing.assert_close(layer(x), x @ (layer.B @ layer.A + sparse).T)
    dense = layer.weight().detach().requires_grad_()
    (layer(x) ** 2).sum().backward()
    (F.linear(x, dense) ** 2).sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(layer.values.grad, dense.grad.flatten()[layer.places])


def test_the_spectral_factors_are_the_best_approximation_and_balanced(part: Any) -> None:
    weight = torch.randn(OUT, IN, generator=generator())
    layer = part("layers").Factorized.spectral(weight, R, generator())
    tail = torch.linalg.svdvals(weight)[R:].norm()
    torch.testing.assert_close((weight - layer.B @ layer.A).norm(), tail)
    torch.testing.assert_close(layer.A @ layer.A.T, layer.B.T @ layer.B, atol=1e-4, rtol=1e-5)


def test_refactoring_keeps_the_product_and_balances_the_factors(part: Any) -> None:
    layer = part("layers").Factorized.drawn(torch.randn(OUT, IN, generator=generator()), R, generator(1))
    with torch.no_grad():
        layer.A.mul_(7)
    product = (layer.B @ layer.A).detach()
    layer.refactor_()
    torch.testing.assert_close(layer.B @ layer.A, product, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.A @ layer.A.T, layer.B.T @ layer.B, atol=1e-4, rtol=1e-5)


def test_cola_has_a_nonlinearity_between_two_factors(part: Any) -> None:
    layer = part("layers").Cola.drawn(torch.zeros(OUT, IN), R, generator())
    assert layer.A.shape == (R, IN) and layer.B.shape == (OUT, R)
    x = torch.randn(3, IN, generator=generator(1))
    inner = x @ layer.A.T
    torch.testing.assert_close(layer(x), (inner * inner.sigmoid()) @ layer.B.T)


def test_exchanged_vectors_leave_the_function_of_switchlora(part: Any) -> None:
    layer = part("switching").SwitchLinear(torch.randn(OUT, IN, generator=generator()) * 0.1, R, generator())
    x = torch.randn(5, IN, generator=generator(1))
    before, first = layer(x), {name: side.factor.detach().clone() for name, side in layer.sides.items()}
    for _ in range(10):
        for name, side in layer.sides.items():
            side.frozen.zero_()
            assert layer.exchange(name, 3.0)
            assert len(side.used.unique()) == R
            assert torch.equal(side.factor, side.pool[side.used])
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=1e-6)
    assert all(not torch.equal(side.factor, first[name]) for name, side in layer.sides.items())


def test_the_counterpart_of_a_new_vector_stands_still_and_forgets(part: Any) -> None:
    switching = part("switching")
    layer = switching.SwitchLinear(torch.randn(OUT, IN, generator=generator()), R, generator())
    optimizer = switching_optimizer(part, layer, interval=1e9)
    take_steps(layer, optimizer, 3)
    (index,) = layer.exchange("A", 1.0)
    for tensor in optimizer.state[layer.B].values():
        tensor[index] = 0
    still, other = layer.B[index].clone(), layer.B[(index + 1) % R].clone()
    take_steps(layer, optimizer, switching.FROZEN_STEPS)
    assert torch.equal(layer.B[index], still)
    assert not torch.equal(layer.B[(index + 1) % R], other)
    assert optimizer.state[layer.B]["steps"].flatten().tolist().count(switching.FROZEN_STEPS) == 1
    take_steps(layer, optimizer, 1)
    assert not torch.equal(layer.B[index], still)


def test_switchlora_exchanges_as_often_as_its_schedule_says(part: Any) -> None:
    layer = part("switching").SwitchLinear(torch.randn(64, 64, generator=generator()), 16, generator())
    optimizer = switching_optimizer(part, layer, interval=40, decay_steps=100)
    new = dict.fromkeys(layer.sides, 0)
    for _ in range(400):
        before = {name: side.used.clone() for name, side in layer.sides.items()}
        take_steps(layer, optimizer, 1)
        for name, side in layer.sides.items():
            new[name] += int((side.used != before[name]).sum())
    expected = 16 / 40 * sum(0.3 ** (step / 100) for step in range(1, 401))  # one draw in 49 is the vector itself
    assert new == pytest.approx(dict.fromkeys(layer.sides, expected), rel=0.3)


def test_without_an_exchange_switchlora_is_adamw(part: Any) -> None:
    layer = part("switching").SwitchLinear(torch.randn(OUT, IN, generator=generator()), R, generator())
    plain = [side.factor.detach().clone().requires_grad_() for side in layer.sides.values()]
    adamw = torch.optim.AdamW(plain, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer = switching_optimizer(part, layer, interval=1e9)
    for seed in range(4):
        for factor, copy in zip((layer.A, layer.B), plain, strict=True):
            factor.grad = torch.randn(factor.shape, generator=generator(seed))
            copy.grad = factor.grad.clone()
        optimizer.step()
        adamw.step()
    for factor, copy in zip((layer.A, layer.B), plain, strict=True):
        torch.testing.assert_close(factor, copy)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_sumo_moves_all_directions_of_its_subspace_equally(part: Any, shape: tuple[int, int]) -> None:
    change, gradient = moved(part("projected").Sumo, part, shape)
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close(values[:R], torch.full((R,), 0.01 * RMS * IN**0.5), rtol=1e-4, atol=0)
    assert values[R:].max() < 1e-5 * values[0]
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(change / values[0], -u[:, :R] @ vt[:R], atol=1e-4, rtol=1e-4)


def test_sumo_carries_the_momentum_into_the_next_subspace(part: Any) -> None:
    optimizer, parameter = projected(part("projected").Sumo, part, (OUT, IN), every_steps=1)
    parameter.grad = torch.randn(OUT, IN, generator=generator(2))
    optimizer.step()
    first = optimizer.state[parameter]["basis"] @ optimizer.state[parameter]["momentum"]
    parameter.grad = torch.randn(OUT, IN, generator=generator(3))
    optimizer.step()
    basis, momentum = optimizer.state[parameter]["basis"], optimizer.state[parameter]["momentum"]
    torch.testing.assert_close(momentum, 0.95 * basis.T @ first + basis.T @ parameter.grad, atol=1e-5, rtol=1e-5)


def test_gum_moves_the_subspace_or_its_complement(part: Any) -> None:
    options: dict[str, Any] = {"generator": generator()}
    low, gradient = moved(part("projected").Gum, part, (OUT, IN), share=0.0, **options)
    torch.testing.assert_close(low, moved(part("projected").Sumo, part, (OUT, IN))[0])
    rest, _ = moved(part("projected").Gum, part, (OUT, IN), share=1.0, **options)
    values = torch.linalg.svdvals(rest)
    torch.testing.assert_close(values[: OUT - R], values[:1].expand(OUT - R), rtol=1e-4, atol=0)
    assert values[OUT - R :].max() < 1e-5 * values[0]
    u, _, _ = torch.linalg.svd(gradient)
    assert (u[:, :R].T @ rest).abs().max() < 1e-5 * values[0]


def test_the_two_kinds_of_gums_momentum_are_without_bias_together(part: Any) -> None:
    parts, share, gradient = [], 0.3, torch.randn(OUT, IN, generator=generator(2))
    for complement in (False, True):
        optimizer, parameter = projected(part("projected").Gum, part, (OUT, IN), share=share, generator=generator())
        state = optimizer.state[parameter]
        optimizer.renew(state, gradient)
        state["complement"] = complement
        state["momentum"] = torch.zeros(OUT if complement else R, IN)
        optimizer.direction(state, gradient)
        parts.append(state["momentum"] if complement else state["basis"] @ state["momentum"])
    torch.testing.assert_close((1 - share) * parts[0] + share * parts[1], gradient, atol=1e-5, rtol=1e-5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def switching_optimizer(part: Any, layer: Any, *, interval: float, decay_steps: float = 100) -> Any:
    groups = [part("beside").group_of([layer.A, layer.B], 0.01, own=True)]
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    return part("switching").SwitchLora(groups, [layer], interval=interval, decay_steps=decay_steps, **options)


def take_steps(layer: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        optimizer.zero_grad()
        (layer(torch.randn(8, layer.weight.shape[1], generator=generator(step))) ** 2).mean().backward()
        optimizer.step()


def projected(
    kind: Any, part: Any, shape: tuple[int, int], *, every_steps: int = 200, **options: Any
) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(shape))
    groups = [part("beside").group_of([parameter], 0.01, own=True)]
    return kind(groups, r=R, every_steps=every_steps, **options), parameter


def moved(kind: Any, part: Any, shape: tuple[int, int], **options: Any) -> tuple[Tensor, Tensor]:
    """The change of a matrix by the first step, and the gradient of it."""
    optimizer, parameter = projected(kind, part, shape, **options)
    parameter.grad = torch.randn(shape, generator=generator(2))
    optimizer.step()
    return parameter.detach(), parameter.grad
