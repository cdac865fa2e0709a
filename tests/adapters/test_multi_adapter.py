"""Several adapters on one model: each row of a mixed batch has the result that its adapter gives alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.test_save_load import KINDS, built, in_peft, logits, moved, trained
from tests.lowrank.test_inject import FAMILIES, IDS
from torch import Tensor

from relora.adapters.multi_adapter import Adapters
from relora.adapters.peft_format import read_adapter
from relora.adapters.save_load import load_adapter, save_adapter
from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it

ROWS = ["a", None, "b", "a", "b"]
BATCH = (torch.arange(5 * 9) * 7 % 64).view(5, 9)


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def folder_of(family: str, place: Path, **settings: Any) -> Path:
    return save_adapter(trained(built(family), **settings), place)


def of_batch(model: torch.nn.Module, rows: Tensor = BATCH) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(rows).logits
    return found


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_what_it_is_as_layers(family: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / "a", **KINDS[kind])
    alone = built(family)
    load_adapter(alone, folder)
    model = built(family)
    adapters = Adapters(model)
    adapters.load("a", folder)
    assert torch.equal(logits(model), logits(built(family)))  # loaded, but not in use
    adapters.use("a")
    close(logits(model), logits(alone))


def test_every_row_is_its_own_adapters(family: str, tmp_path: Path) -> None:
    """One LoRA and one DoRA adapter, of other ranks and other layers, and rows with none."""
    model = built(family)
    adapters = Adapters(model)
    adapters.load("a", folder_of(family, tmp_path / "a", r=2, dora=True))
    some = {"neox": "dense", "gpt2": "c_proj"}.get(family, "o_proj")
    adapters.load("b", folder_of(family, tmp_path / "b", r=4, target_modules=(some,)))
    expected = []
    for row, name in enumerate(ROWS):
        adapters.use(name)
        expected.append(of_batch(model, BATCH[row : row + 1]))
    adapters.use(ROWS)
    found = of_batch(model)
    close(found, torch.cat(expected))
    assert not torch.allclose(found, of_batch(built(family)), atol=1e-3)
    with pytest.raises(UserError, match="named for 5 rows, but the batch has 2"):
        of_batch(model, BATCH[:2])


def test_what_is_left_is_the_plain_model(family: str, tmp_path: Path) -> None:
    model = built(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = Adapters(model)
    for name in "ab":
        adapters.load(name, folder_of(family, tmp_path / name, dora=name == "b"))
    adapters.use(["a", "b"])
    assert not torch.equal(logits(model), logits(built(family)))
    adapters.remove("b")  # in use, so none is from now on
    assert torch.equal(logits(model), logits(built(family)))
    adapters.use("a")
    adapters.remove("a")
    assert adapters.names == [] and adapters.sizes == {}
    assert torch.equal(logits(model), logits(built(family)))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    adapters = Adapters(built("llama"))
    adapters.load("a", folder_of("llama", tmp_path / "a"))
    adapters.load("b", folder_of("llama", tmp_path / "b", dora=True))
    parameters = {name: read_adapter(tmp_path / name).parameters for name in "ab"}
    assert adapters.sizes == {name: 8 * count for name, count in parameters.items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_on_a_half_precision_base(kind: str, tmp_path: Path) -> None:
    """Factors stay in fp32: the update is not rounded before it is added."""
    folder = folder_of("llama", tmp_path / "a", **KINDS[kind])
    model, alone = built("llama").bfloat16(), built("llama").bfloat16().float()
    load_adapter(alone, folder)
    adapters = Adapters(model)
    adapters.load("a", folder)
    adapters.use("a")
    torch.testing.assert_close(logits(model).float(), logits(alone), rtol=0.05, atol=0.05)
    assert adapters.sizes["a"] == 4 * read_adapter(folder).parameters


def test_on_low_rank_layers_with_a_coarse_base(tmp_path: Path) -> None:
    """Low-rank layers with int8 weights and untrained factors serve as the base."""
    folder = folder_of("llama", tmp_path / "a", dora=True)
    model = built("llama")
    inject(model, LowRankConfig(r=2, base="int8", master=False, rest="frozen"))
    adapters = Adapters(model)
    adapters.load("a", folder)
    adapters.use("a")
    exact = built("llama")
    load_adapter(exact, folder)
    torch.testing.assert_close(logits(model), logits(exact), rtol=0.1, atol=0.1)


def test_what_was_trained_in_full_is_switched_too(tmp_path: Path) -> None:
    """A tied weight may be replaced for one of its modules alone, as in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights in general
        theirs = in_peft("tied_qwen", modules_to_save=["embed_tokens"])
        theirs.save_pretrained(tmp_path / "a")
    folder_of("tied_qwen", tmp_path / "b")
    model = built("tied_qwen")
    adapters = Adapters(model)
    for name in "ab":
        adapters.load(name, tmp_path / name)
    adapters.use("a")
    close(logits(model), logits(theirs))
    adapters.use("b")
    alone = of_batch(model, BATCH[2:3])
    adapters.use(ROWS)
    close(of_batch(model)[2:3], alone)
    with torch.no_grad():
        close(of_batch(model)[[0, 3]], theirs(BATCH[[0, 3]]).logits)


@pytest.mark.parametrize("family", ["gpt2"])
def test_biases_are_switched_too(family: str, tmp_path: Path) -> None:
    theirs = in_peft(family, bias="lora_only", use_dora=True)
    theirs.save_pretrained(tmp_path / "a")
    model = built(family)
    adapters = Adapters(model)
    adapters.load("a", tmp_path / "a")
    adapters.use("a")
    close(logits(model), logits(theirs))
    adapters.use(None)
    assert torch.equal(logits(model), logits(built(family)))


def test_generation_with_an_adapter_for_each_row(tmp_path: Path) -> None:
    model = built("llama")
    adapters = Adapters(model)
    for seed, name in enumerate("ab"):
        adapted = trained(built("llama"))
        for _ in range(seed):
            moved(adapted)
        adapters.load(name, save_adapter(adapted, tmp_path / name))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = []
    for row, name in enumerate("ab"):
        adapters.use(name)
        alone.append(model.generate(IDS[row : row + 1], attention_mask=torch.ones(1, 12), **settings))
    adapters.use(["a", "b"])
    together = model.generate(IDS, attention_mask=torch.ones(2, 12), **settings)
    assert torch.equal(together, torch.cat(alone))


def test_refusals_change_nothing(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "a")
    model = built("llama")
    adapters = Adapters(model)
    adapters.load("a", folder)
    adapters.use("a")
    expected = logits(model)
    for attempt, message in (
        (lambda: adapters.load("a", folder), "a: an adapter of this name"),
        (lambda: adapters.load("b", tmp_path / "gone"), "no such folder"),
        (lambda: adapters.use("b"), "b: no such adapter is loaded; loaded are a"),
        (lambda: adapters.use(["a", "b"]), "b: no such adapter"),
        (lambda: adapters.use([]), "for each row"),
        (lambda: adapters.remove("b"), "b: no such adapter"),
        (lambda: adapters.load("b", folder_of("gpt2", tmp_path / "b")), "another base model"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
        assert adapters.names == ["a"] and torch.equal(logits(model), expected)
    with pytest.raises(UserError, match="inference alone"):
        logits(model.train())
