"""Adapter folders that are listed, and one that is shown layer by layer."""

from pathlib import Path

import pytest
from tests.adapters.shelf import fill_shelf

from relora.adapters.contents import list_adapters
from relora.adapters.peft_format import TENSORS, read_adapter
from relora.adapters.show import show_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return fill_shelf(tmp_path)


def test_list(shelf: Path) -> None:
    found = {one.name: one for one in list_adapters(shelf)}
    assert list(found) == ["french", "more/law", "more/stable", "theirs", "zz"]
    assert found["french"].kind == "LoRA" and found["french"].r == [2, 4]
    assert found["more/law"].kind == "DoRA" and found["more/law"].targets == ["q_proj", "v_proj"]
    assert found["theirs"].kind == "ADAPTION_PROMPT" and found["more/stable"].kind == "rsLoRA"
    assert found["zz"].problem is not None and "damaged" in found["zz"].problem
    for name in ("french", "more/law", "more/stable"):
        assert found[name].parameters == read_adapter(shelf / name).parameters
        assert found[name].bytes == (shelf / name / TENSORS).stat().st_size and found[name].problem is None


def test_show(shelf: Path) -> None:
    contents = show_adapter(shelf / "french")
    adapter = read_adapter(shelf / "french")
    assert len(contents.layers) == 14 and contents.full_tensors == {}
    for layer in contents.layers:
        factors = adapter.layers[layer.path]
        assert (layer.out, layer.inn, layer.r, layer.scaling) == (*factors.shape, factors.r, factors.scaling)
        assert layer.lora_alpha == pytest.approx(8)
        assert layer.update_norm == pytest.approx(factors.delta().norm().item(), rel=1e-5)
