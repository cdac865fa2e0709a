"""Several adapters attached to one base: each gives the logits that it gives alone, and the base does not change."""

from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import STORIES, factors, lora, needs_data, prompts, run_with_adapter

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.attached import BASE, Attached, find_adapter
from relora.adapters.llama_adapter import load_prompts
from relora.adapters.peft_format import write_adapter
from relora.errors import UserError
from relora.model import open_model

pytestmark = needs_data
IDS = torch.tensor([[1, 403, 407, 261, 378]])


@pytest.fixture
def model():
    return open_model(STORIES).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def merged(seed: int) -> torch.Tensor:
    """Logits of the model with an update added to its weights."""
    model = open_model(STORIES).eval()
    with torch.no_grad():
        for path, update in factors(seed).items():
            model.get_submodule(path).weight += update.delta()
    return logits(model)


def test_each_adapter_acts_alone_and_the_base_is_untouched(tmp_path: Path, model) -> None:
    before = logits(model)
    attached = Attached(model)
    for seed in (1, 2):
        attached.load(find_adapter(lora(tmp_path / f"lora-{seed}", seed=seed)))
    attached.load(find_adapter(prompts(tmp_path / "prompts")))
    assert attached.names == ("lora-1", "lora-2", "prompts")
    assert torch.equal(logits(model), before)
    alone = open_model(STORIES).eval()
    load_prompts(alone, tmp_path / "prompts")
    for name in ("lora-1", "prompts", "lora-2", BASE, "prompts", BASE, "lora-1"):
        attached.use(name)
        assert attached.in_use == name
        if name == BASE:
            assert torch.equal(logits(model), before)
        elif name == "prompts":
            assert torch.equal(logits(model), logits(alone))
        else:
            torch.testing.assert_close(logits(model), merged(int(name[-1])), atol=1e-4, rtol=1e-4)
        assert name == BASE or not torch.allclose(logits(model), before, atol=1e-2)
    assert str(attached) == "base, lora-1 (in use), lora-2, prompts"


def test_loading_leaves_in_use_what_was(tmp_path: Path, model) -> None:
    attached = Attached(model)
    attached.use(attached.load(find_adapter(prompts(tmp_path / "first"))))
    with_first = logits(model)
    attached.load(find_adapter(prompts(tmp_path / "second", seed=2)))
    attached.load(find_adapter(lora(tmp_path / "third", seed=1)))
    assert attached.in_use == "first"
    assert torch.equal(logits(model), with_first)


def test_names_are_those_of_folders_or_else_paths(tmp_path: Path, model) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        lora(tmp_path / parent / "same", seed=1)
    lora(tmp_path / "base", seed=1)
    attached = Attached(model)
    names = [attached.load(find_adapter(tmp_path / place)) for place in ("a/same", "b/same", "base")]
    assert names == ["same", str(tmp_path / "b" / "same"), str(tmp_path / "base")]
    with pytest.raises(UserError, match="loaded already"):
        attached.load(find_adapter(f"{tmp_path}/a/../a/same"))


def test_an_unknown_name_lists_what_there_is(tmp_path: Path, model) -> None:
    attached = Attached(model)
    attached.use(attached.load(find_adapter(lora(tmp_path / "mine", seed=1))))
    with pytest.raises(UserError, match="'yours': not loaded; there are base, mine"):
        attached.use("yours")
    assert attached.in_use == "mine"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, model) -> None:
    before = logits(model)
    small = Factors(torch.ones(2, 32), torch.ones(64, 2), 1.0)
    other = write_adapter(Adapter(layers={"model.layers.0.self_attn.q_proj": small}), tmp_path / "other")
    attached = Attached(model)
    with pytest.raises(UserError, match=r"another base model.*q_proj is 64 x 32 there, 64 x 64 here"):
        attached.load(find_adapter(other))
    wide = prompts(tmp_path / "wide")
    settings = wide / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"adapter_layers": 5', '"adapter_layers": 9'))
    with pytest.raises(UserError, match="9 layers, the model has 5"):
        attached.load(find_adapter(wide))
    assert attached.names == ()
    assert torch.equal(logits(model), before)


def test_the_adapter_of_a_run(tmp_path: Path) -> None:
    found = find_adapter(run_with_adapter(tmp_path / "tuned", template="plain"))
    assert (found.name, found.folder, found.template) == ("tuned", tmp_path / "tuned" / "adapter", "plain")
    assert (found.kind, found.base) == ("LORA", str(STORIES))
    inside = find_adapter(tmp_path / "tuned" / "adapter")
    assert (inside.name, inside.template) == ("adapter", None)


def test_a_run_on_plain_text_has_no_template(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("template: alpaca", "layout: completion"))
    assert find_adapter(run).template is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapter_config.json", '{"peft_type": "IA3"}', "`peft_type` is 'IA3'; known are LORA and ADAPTION_PROMPT"),
        ("adapter_config.json", "[]", "not a JSON object"),
        ("other.json", "{}", "not an adapter"),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        find_adapter(tmp_path)


def test_no_folder_and_no_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_adapter(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a web address cannot be used") as refused:
        find_adapter("https://user:secret@host/adapter")
    assert "secret" not in str(refused.value)
