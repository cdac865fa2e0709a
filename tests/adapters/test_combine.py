"""Combined adapters agree with PEFT's, and with the papers' examples."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.adapters.test_merge import adapter_folder
from tests.adapters.test_save_load import built, in_peft, logits, moved
from tests.lowrank.test_inject import FAMILIES
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.combine import COMBINATION_METHODS, combine, combine_adapters
from relora.adapters.peft_format import read_adapter, write_adapter
from relora.adapters.save_load import load_adapter
from relora.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it

WEIGHTS = [1.0, 0.25, -1.0]
"""Weights whose products with the scalings of `peft_adapters` have exact roots in fp32, in which PEFT keeps them."""


def peft_adapters(family: str, ranks: tuple[int, int, int] = (4, 4, 4)) -> peft.PeftModel:
    """A model with three adapters, `default`, `b` and `c`; b has one layer less in each block."""
    model = in_peft(family, lora_alpha=4 * ranks[0], r=ranks[0])
    names = sorted(model.peft_config["default"].target_modules)
    for name, r in zip("bc", ranks[1:], strict=True):
        layers = [layer for layer in names if not layer.endswith(("down_proj", "c_fc", "dense_4h_to_h"))]
        config = peft.LoraConfig(
            r=r,
            lora_alpha=4 * r,
            target_modules=layers if name == "b" else names,
            task_type="CAUSAL_LM",
            fan_in_fan_out=family == "gpt2",
        )
        model.add_adapter(name, config)
        model.set_adapter(name)
        moved(model)
    return model.eval()


def saved(model: peft.PeftModel, folder: Path) -> list[Adapter]:
    model.save_pretrained(folder, selected_adapters=["default", "b", "c"])
    return [read_adapter(place) for place in (folder, folder / "b", folder / "c")]


def deltas_of(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    """s·B A [out, in] by path."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            found[path] = module.scaling[name] * (b @ a).detach()
    return found


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"r": 3}),
        ("ties", {"density": 0.3}),
        ("ties_svd", {"density": 0.3, "r": 5}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
        ("dare_linear_svd", {"density": 1.0}),
        ("dare_ties_svd", {"density": 1.0}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
def test_the_same_as_peft(family: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = peft_adapters(family)
    adapters = saved(model, tmp_path)
    combined = combine(adapters, WEIGHTS, method, **settings)
    theirs = {"svd_rank" if key == "r" else key: value for key, value in settings.items()}
    model.add_weighted_adapter(["default", "b", "c"], WEIGHTS, "mixed", combination_type=method, **theirs)
    expected = deltas_of(model, "mixed")
    assert combined.layers.keys() == expected.keys() and not combined.dora
    for path, factors in combined.layers.items():
        torch.testing.assert_close(factors.delta(torch.float64), expected[path], rtol=1e-8, atol=1e-8)


def test_cat_is_the_weighted_sum_of_adapters_of_any_rank(tmp_path: Path) -> None:
    model = peft_adapters("llama", (2, 5, 3))
    combined = combine(saved(model, tmp_path), WEIGHTS, "cat")
    for path, factors in combined.layers.items():
        given = [deltas_of(model, name).get(path, 0 * factors.delta()) for name in ("default", "b", "c")]
        expected = sum(weight * delta for weight, delta in zip(WEIGHTS, given, strict=True))
        torch.testing.assert_close(factors.delta(torch.float64), expected, rtol=1e-9, atol=1e-9)
        assert factors.r == (5 if path.endswith("down_proj") else 10)


def test_what_is_combined_is_an_adapter_for_peft_and_for_us(tmp_path: Path) -> None:
    combined = combine(saved(peft_adapters("llama"), tmp_path), WEIGHTS, "cat")
    write_adapter(combined, tmp_path / "mixed")
    model = built("llama")
    load_adapter(model, tmp_path / "mixed")
    loaded = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "mixed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-9, atol=1e-9)


def test_svd_is_the_best_of_its_rank(tmp_path: Path) -> None:
    adapters = saved(peft_adapters("llama"), tmp_path)
    whole, best = combine(adapters, WEIGHTS, "cat"), combine(adapters, WEIGHTS, "svd", r=3)
    for path, factors in best.layers.items():
        values = torch.linalg.svdvals(whole.layers[path].delta(torch.float64))
        missed = whole.layers[path].delta(torch.float64) - factors.delta(torch.float64)
        torch.testing.assert_close(torch.linalg.svdvals(missed)[0], values[3], rtol=1e-9, atol=1e-12)
        assert factors.r == 3


def single(a: Tensor, b: Tensor | None = None, **settings: Any) -> Adapter:
    """An adapter of one layer; B A = A unless B is given."""
    return Adapter(layers={"q": Factors(a, torch.eye(len(a)) if b is None else b, 1.0)}, **settings)


def test_ties_by_hand() -> None:
    """Trimming, election of signs and means, as in figure 1 of Yadav et al."""
    one = torch.tensor([[4.0, -1.0, 0.1], [3.0, 2.0, -0.2], [0.3, -5.0, 6.0]])
    two = torch.tensor([[-3.0, -2.0, 0.1], [1.0, -4.0, 0.1], [0.2, -6.0, 0.1]])
    mixed = combine([single(one), single(two)], [1.0, 1.0], "ties_svd", density=5 / 9)
    expected = torch.tensor([[4.0, -2.0, 0.0], [2.0, -4.0, 0.0], [0.0, -5.5, 6.0]])
    torch.testing.assert_close(mixed.layers["q"].delta(), expected, rtol=1e-5, atol=1e-5)


def test_dare_keeps_a_share_and_the_mean() -> None:
    """A number is kept with probability `density` and divided by it; over many seeds the mean is that of all."""
    torch.manual_seed(0)
    one, two = torch.randn(40, 50), torch.randn(40, 50)
    adapters, density = [single(one), single(two)], 0.4
    combined = [
        combine(adapters, [0.5, 2.0], "dare_linear_svd", density=density, seed=seed, r=40).layers["q"].delta()
        for seed in range(150)
    ]
    exact = 0.5 * one + 2 * two
    spread = ((0.25 * one**2 + 4 * two**2) * (1 - density) / density / 150).sqrt()
    off = (torch.stack(combined).mean(0) - exact) / spread
    assert 0.9 < off.std() < 1.1 and abs(off.mean()) < 0.1
    (kept,) = combine([adapters[0]], [1.0], "dare_linear", density=density).layers.values()
    share = (kept.lora_A != 0).float().mean()
    assert abs(share - density) < 0.05
    survivors = kept.lora_A != 0
    torch.testing.assert_close(kept.lora_A[survivors], one[survivors] / density)


def test_draws_are_keyed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    adapters = [single(torch.randn(6, 8)), single(torch.randn(6, 8))]
    state = torch.get_rng_state()
    first, same, other = (combine(adapters, None, "dare_ties", density=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers["q"].lora_A, same.layers["q"].lora_A)
    assert not torch.equal(first.layers["q"].lora_A, other.layers["q"].lora_A)
    assert torch.equal(torch.get_rng_state(), state)


A = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        ([], {}, "no adapters"),
        ([single(A)], {"method": "mean"}, "'mean' is none of linear"),
        ([single(A)], {"weights": [1.0, 2.0]}, "2 for 1 adapters"),
        ([single(A)], {"weights": [float("inf")]}, "finite"),
        ([single(A)], {"method": "ties"}, "density: ties needs one"),
        ([single(A)], {"method": "cat", "density": 0.5}, "density: cat does not take one"),
        ([single(A)], {"method": "dare_linear", "density": 0.0}, "density: 0 is not above 0"),
        ([single(A)], {"method": "cat", "r": 2}, "r: 2 with cat"),
        ([single(A)], {"r": 0}, "r: 0 with svd"),
        ([single(A), single(torch.ones(2, 5))], {}, "q is of another size"),
        ([single(A), single(torch.ones(3, 4), torch.ones(2, 3))], {"method": "linear"}, "q has ranks 2 and 3"),
        ([single(A), single(A, others={"lm_head.weight": A})], {}, "adapter 2 holds what was trained in full"),
        ([Adapter(layers={"q": Factors(A, A.T, 1.0, torch.ones(4))})], {}, "adapter 1 is DoRA"),
    ],
)
def test_refusals(adapters: list[Adapter], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combine(adapters, **settings)


def test_every_method_gives_an_adapter_of_all_families(tmp_path: Path) -> None:
    for family in FAMILIES:
        adapters = saved(peft_adapters(family), tmp_path / family)
        for method in COMBINATION_METHODS:
            density = 0.5 if method.startswith(("ties", "dare")) else None
            combined = combine(adapters, None, method, density=density)
            model = built(family)
            load_adapter(model, write_adapter(combined, tmp_path / family / method))
            assert torch.isfinite(logits(model)).all()


def test_combined_folders(tmp_path: Path) -> None:
    french = adapter_folder("llama", tmp_path / "french", rank_pattern={r".*\.0\..*": 2})
    other = adapter_folder("llama", tmp_path / "other")
    summary = combine_adapters([french, other], tmp_path / "both", method="cat", weights=[1.0, -2.0])
    assert summary.r == [6, 8] and summary.kind == "LoRA"
    model = built("llama")
    load_adapter(model, tmp_path / "both")
    one, two, both = (read_adapter(tmp_path / name).layers for name in ("french", "other", "both"))
    for path, factors in both.items():
        torch.testing.assert_close(factors.delta(), one[path].delta() - 2 * two[path].delta())
    with pytest.raises(UserError, match="is there already"):
        combine_adapters([other], tmp_path / "both", method="cat")
