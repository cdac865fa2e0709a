"""Whatever is given is opened: a model, a run with a model or an adapter, an adapter with the base that it names."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import STORIES, lora, needs_data, prompts, run_with_adapter, with_template

from relora.errors import UserError
from relora.inference.loading import LoadedModel, load_model_or_run

pytestmark = needs_data
HELLO = [{"role": "user", "content": "Hello"}]


@torch.no_grad()
def logits(finished: LoadedModel) -> torch.Tensor:
    return finished.model(torch.tensor([finished.encode("Once upon a time")])).logits


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_model_or_run(STORIES, device="cpu")


def test_an_adapter_opens_its_base(tmp_path: Path, base: LoadedModel) -> None:
    for place in (lora(tmp_path / "lora", seed=1), prompts(tmp_path / "prompts")):
        finished = load_model_or_run(place, device="cpu")
        assert finished.adapters.in_use == place.name
        assert not torch.allclose(logits(finished), logits(base), atol=1e-2)
        beside = load_model_or_run(STORIES, adapters=[str(place)], device="cpu")
        assert beside.adapters.in_use == "base"
        assert torch.equal(logits(beside), logits(base))
        beside.adapters.use(place.name)
        assert torch.equal(logits(beside), logits(finished))


def test_a_run_with_an_adapter(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "tuned")
    finished = load_model_or_run(run, device="cpu")
    assert (finished.adapters.in_use, finished.sequence_length) == ("tuned", 64)
    assert finished.tokenizer.decode(finished.encode_chat(HELLO)).endswith("Hello\n\n### Response:")
    settings = run / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    assert torch.equal(logits(load_model_or_run(run, device="cpu")), logits(finished))  # config.yaml names it, too


def test_a_run_that_trained_the_whole_model(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "tuned", template="plain")
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="has no model yet"):
        load_model_or_run(run)
    shutil.copytree(STORIES, run / "model")
    finished = load_model_or_run(run, device="cpu")
    assert finished.adapters.names == ()
    assert finished.tokenizer.decode(finished.encode_chat(HELLO), skip_special_tokens=True) == "Hello\n"


def test_every_adapter_is_asked_in_its_own_words(tmp_path: Path) -> None:
    alpaca = run_with_adapter(tmp_path / "alpaca")
    plain = run_with_adapter(tmp_path / "plain", template="plain")
    model = with_template(tmp_path / "model")
    finished = load_model_or_run(model, adapters=[str(alpaca), str(plain)], device="cpu")
    read = {
        name: finished.tokenizer.decode(finished.encode_chat(HELLO, name), skip_special_tokens=True)
        for name in ("base", "alpaca", "plain")
    }
    assert read["base"] == "user: Hello\nassistant:"
    assert read["plain"] == "Hello\n"
    assert read["alpaca"].endswith("### Response:")
    finished.adapters.use("plain")
    assert finished.encode_chat(HELLO) == finished.encode_chat(HELLO, "plain")


def test_a_base_that_is_not_there_or_not_named(tmp_path: Path) -> None:
    gone = lora(tmp_path / "gone", seed=1, base=str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"gone: its base cannot be opened: .*moved.*generate MODEL --adapter .*gone"):
        load_model_or_run(gone)
    assert load_model_or_run(STORIES, adapters=[str(gone)], device="cpu").adapters.names == ("gone",)
    with pytest.raises(UserError, match=r"does not say which model it belongs to.*relora generate MODEL --adapter"):
        load_model_or_run(lora(tmp_path / "silent", seed=1, base=None))


def test_an_adapter_that_names_another_model_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = with_template(tmp_path / "other")
    places = [str(lora(tmp_path / name, seed=1, base=base)) for name, base in (("a", str(other)), ("b", "hub/model"))]
    own = str(lora(tmp_path / "c", seed=2))
    renamed = str(lora(tmp_path / "d", seed=3, base=f"owner/{STORIES.name}"))
    with caplog.at_level(logging.WARNING):
        load_model_or_run(STORIES, adapters=[*places, own, renamed], device="cpu")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"{places[0]} was trained on {other}, not on {STORIES}" in told[0]
    assert f"{places[1]} was trained on hub/model" in told[1]


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tells classes of texts apart"):
        load_model_or_run(run_with_adapter(tmp_path / "run", task="classification"))


def test_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="a web address cannot be used") as refused:
        load_model_or_run("https://user:secret@host/model")
    assert "secret" not in str(refused.value)


def test_bytes_that_are_no_text(base: LoadedModel) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        base.encode("\udcff")


def test_a_tokenizer_of_another_model(tmp_path: Path, base: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"has no chat template.*`relora generate`"):
        base.encode_chat(HELLO)
