"""Every kind of path is opened: a model, a run with a model or an adapter, an adapter and the base that it names."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import STORIES, lora, needs_data, prompts, run_with_adapter, with_template
from tests.paths import DATA

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.inference.loading import LoadedModel, load_model_or_run

pytestmark = needs_data
HELLO = [{"role": "user", "content": "Hello"}]


@torch.no_grad()
def logits(loaded: LoadedModel) -> torch.Tensor:
    return loaded.model(torch.tensor([loaded.encode("Once upon a time")])).logits


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_model_or_run(STORIES, device="cpu")


def test_an_adapter_opens_its_base(tmp_path: Path, base: LoadedModel) -> None:
    for place in (lora(tmp_path / "lora", seed=1), prompts(tmp_path / "prompts")):
        loaded = load_model_or_run(place, device="cpu")
        assert loaded.adapters.in_use == place.name
        assert not torch.allclose(logits(loaded), logits(base), atol=1e-2)
        beside = load_model_or_run(STORIES, adapters=[str(place)], device="cpu")
        assert beside.adapters.in_use == "base"
        assert torch.equal(logits(beside), logits(base))
        beside.adapters.use(place.name)
        assert torch.equal(logits(beside), logits(loaded))


def test_a_run_with_an_adapter(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "tuned")
    loaded = load_model_or_run(run, device="cpu")
    assert (loaded.adapters.in_use, loaded.sequence_length) == ("tuned", 64)
    assert loaded.tokenizer.decode(loaded.encode_chat(HELLO)).endswith("Hello\n\n### Response:")
    settings = run / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    assert torch.equal(
        logits(load_model_or_run(run, device="cpu")), logits(loaded)
    )  # config.yaml names the base as well


def test_a_run_that_trained_the_whole_model(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "tuned", template="plain")
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="has no model yet"):
        load_model_or_run(run)
    shutil.copytree(STORIES, run / "model")
    loaded = load_model_or_run(run, device="cpu")
    assert loaded.adapters.names == ()
    assert loaded.tokenizer.decode(loaded.encode_chat(HELLO), skip_special_tokens=True) == "Hello\n"


def test_the_prompt_of_every_adapter_is_written_by_its_own_template(tmp_path: Path) -> None:
    alpaca = run_with_adapter(tmp_path / "alpaca")
    plain = run_with_adapter(tmp_path / "plain", template="plain")
    model = with_template(tmp_path / "model")
    loaded = load_model_or_run(model, adapters=[str(alpaca), str(plain)], device="cpu")
    decoded = {
        name: loaded.tokenizer.decode(loaded.encode_chat(HELLO, name), skip_special_tokens=True)
        for name in ("base", "alpaca", "plain")
    }
    assert decoded["base"] == "user: Hello\nassistant:"
    assert decoded["plain"] == "Hello\n"
    assert decoded["alpaca"].endswith("### Response:")
    loaded.adapters.use("plain")
    assert loaded.encode_chat(HELLO) == loaded.encode_chat(HELLO, "plain")


def test_a_base_that_is_missing_or_not_named(tmp_path: Path) -> None:
    gone = lora(tmp_path / "gone", seed=1, base=str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"gone: its base cannot be opened: .*moved.*generate MODEL --adapter .*gone"):
        load_model_or_run(gone)
    assert load_model_or_run(STORIES, adapters=[str(gone)], device="cpu").adapters.names == ("gone",)
    with pytest.raises(UserError, match=r"does not say which model it belongs to.*relora generate MODEL --adapter"):
        load_model_or_run(lora(tmp_path / "silent", seed=1, base=None))


def test_an_adapter_that_names_another_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tells classes of texts apart"):
        load_model_or_run(run_with_adapter(tmp_path / "run", task="classification"))


def test_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="a web address cannot be used") as refused:
        load_model_or_run("https://user:secret@host/model")
    assert "secret" not in str(refused.value)


def test_invalid_unicode_is_refused(base: LoadedModel) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        base.encode("\udcff")


def test_a_chat_needs_a_template(base: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"has no chat template.*`relora generate`"):
        base.encode_chat(HELLO)


def test_a_tokenizer_of_another_model_is_refused(base: LoadedModel) -> None:
    other = replace(base, tokenizer=load_tokenizer(str(DATA / "tokenizers" / "gpt2")))
    with pytest.raises(UserError, match=r"gives id \d+ but the model has 512 ids"):
        other.encode("Once upon a time")
