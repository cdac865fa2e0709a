"""The sides of the comparisons of speed train the same model, and their formulas count what is computed."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RANK, TOKENS = 4, 512

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`sides.<name>`, importable as the scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.set_num_threads(1)
    return lambda name: importlib.import_module(f"sides.{name}")


@pytest.fixture
def shape(sides: Any) -> Any:
    return sides("shape").Shape(hidden=128, inner=320, layers=2, vocabulary=96)


def test_all_sides_begin_with_one_loss_and_those_of_low_rank_go_on_alike(sides: Any, shape: Any) -> None:
    llama, draws = sides("llama"), sides("draws")
    losses = {}
    for name in ("full", "peft", "plain", "ours"):
        side = getattr(llama, name)(shape, RANK)
        losses[name] = [side.step(draws.sequences(TOKENS, shape.vocabulary)) for _ in range(4)]
    assert {round(values[0], 5) for values in losses.values()} == {round(losses["full"][0], 5)}
    for name in ("peft", "ours"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["full"][3] != pytest.approx(losses["plain"][3], rel=1e-3)  # so another training would show


@pytest.mark.parametrize("name", ["peft", "plain", "ours"])
def test_low_rank_sides_train_the_same_parameters(sides: Any, shape: Any, name: str) -> None:
    side = getattr(sides("llama"), name)(shape, RANK)
    trained = sum(p.numel() for group in side.optimizer.param_groups for p in group["params"])
    factors = shape.layers * sum(RANK * (o + i) for o, i in shape.linears.values())
    assert trained == shape.parameters - shape.in_blocks + factors


@pytest.mark.parametrize("name", ["full", "peft", "plain"])
def test_the_formula_counts_the_products_of_a_step(sides: Any, shape: Any, name: str) -> None:
    side = getattr(sides("llama"), name)(shape, RANK)
    with FlopCounterMode(display=False) as counter:
        side.step(sides("draws").sequences(TOKENS, shape.vocabulary))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if "mm" in str(operator))
    assert products == shape.flops(name, RANK, TOKENS)


@pytest.mark.parametrize(
    ("operator", "shapes", "kind"),
    [
        ("aten::mm", [[8, 4], [4, 96]], "products of the head"),
        ("aten::_int_mm", [[8, 4], [4, 4]], "products in the blocks"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", [], "attention"),
        ("aten::_log_softmax_backward_data", [], "loss"),
        ("aten::_fused_adamw_", [], "optimizer and clipping"),
        ("aten::copy_", [], "copies and allocation"),
        ("aten::silu", [], "elementwise"),
        ("autograd::engine::evaluate_function: MmBackward0", [], "outside of operators"),
    ],
)
def test_kinds_of_operators(sides: Any, operator: str, shapes: list[list[int]], kind: str) -> None:
    assert sides("profiling").kind_of(operator, shapes, vocabulary=96) == kind
