"""What the hub refuses is one line for each reason, within seconds; what it gives is complete.

The hub's own client talks to a server on this machine.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.files.stand_in_hub import StandInHub, stand_in_hub, use_hub
from tests.model.small import SMALL

from relora.adapters.merge import merge_adapter, unmerge_adapter
from relora.adapters.save_load import save_adapter
from relora.data.readers import hub_revision
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.files.hub import MODEL_FILES, hub_folder
from relora.inference.loading import load_model_or_run
from relora.lowrank import LowRankConfig, inject
from relora.model import build_model, model_folder, open_model, save_model

ONE_LINE_SECONDS = 8
OPENERS: dict[str, Callable[[str], object]] = {
    "model": model_folder,
    "tokenizer": load_tokenizer,
    "dataset": hub_revision,
}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
TEMPLATES = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with stand_in_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture
def instruct(hub: StandInHub, tmp_path: Path, prepared: Path) -> str:
    """Put a model whose chat templates are files of their own on the hub; return its id."""
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    tokenizer.chat_template = TEMPLATES
    model = build_model("llama-9m", {**SMALL, "vocab_size": len(tokenizer)}, seed=0)
    folder = save_model(model, tmp_path / "instruct", tokenizer)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    hub.open["owner/instruct"] = folder
    return "owner/instruct"


def refused(opener: str, name: str) -> str:
    """The line with which a name is refused, in time."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        OPENERS[opener](name)
    assert time.monotonic() - start < ONE_LINE_SECONDS
    line = str(caught.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("opener", OPENERS)
def test_a_gated_repository_says_where_to_ask_and_how_to_log_in(hub: StandInHub, opener: str) -> None:
    hub.gated.add("owner/gated")
    line = refused(opener, "owner/gated")
    assert "gated on the hub" in line
    assert f"{hub.address}/{'datasets/' if opener == 'dataset' else ''}owner/gated, then log in" in line
    assert "`hf auth login`" in line
    assert len(hub.asked) <= 4


def test_a_gated_repository_tells_an_account_without_access_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with stand_in_hub(monkeypatch, tmp_path / "cache", token="hf_valid") as hub:
        hub.gated.add("owner/gated")
        line = refused("model", "owner/gated")
    assert "the account that is logged in has no access" in line
    assert "auth login" not in line


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("token", [None, "hf_valid"])
def test_a_name_that_the_hub_does_not_have_may_be_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opener: str, token: str | None
) -> None:
    with stand_in_hub(monkeypatch, tmp_path / "cache", token) as hub:
        line = refused(opener, "owner/mispelt")
        assert len(hub.asked) == 1
    assert f"the hub has no {opener} of that name" in line
    assert "for a private one log in with `hf auth login`" in line


@pytest.mark.parametrize("opener", OPENERS)
def test_a_token_that_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opener: str) -> None:
    with stand_in_hub(monkeypatch, tmp_path / "cache", token="hf_expired"):
        line = refused(opener, "owner/any")
    assert "the hub refuses the token" in line
    assert "hf auth login" in line
    assert "hf_expired" not in line


@pytest.mark.parametrize("opener", OPENERS)
def test_an_error_of_the_hub_is_named_by_its_number(hub: StandInHub, opener: str) -> None:
    hub.failing.add("owner/any")
    assert "the hub's answer was 500" in refused(opener, "owner/any")
    assert len(hub.asked) == 1


@pytest.mark.parametrize("opener", OPENERS)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opener: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        use_hub(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path)
        line = refused(opener, "owner/any")
    assert "the hub cannot be reached" in line
    assert "hf auth login" not in line


@pytest.mark.parametrize("opener", OPENERS)
def test_offline_by_the_users_own_setting(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, opener: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub was not asked (HF_HUB_OFFLINE is set)" in refused(opener, "owner/any")
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("relora.files.hub.SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        assert "the hub cannot be reached" in refused("model", "owner/any")


def test_a_model_of_the_hub_keeps_its_chat_templates(instruct: str, hub: StandInHub, tmp_path: Path) -> None:
    folder = model_folder(instruct)
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja", "model.safetensors"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin"}
    by_path = load_tokenizer(str(hub.open[instruct]))
    for tokenizer in (load_tokenizer(str(folder)), load_tokenizer(instruct)):
        assert tokenizer.chat_template == by_path.chat_template == TEMPLATES
    asked = [{"role": "user", "content": "the cat"}]
    loaded = load_model_or_run(instruct)
    assert loaded.encode_chat(asked) == load_model_or_run(hub.open[instruct]).encode_chat(asked)
    assert load_model_or_run(instruct).tokenizer.decode(loaded.encode_chat(asked)).endswith("<user>the cat<assistant>")


def test_what_is_in_the_cache_opens_without_the_hub(
    instruct: str, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(instruct)
    asked = len(hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folder(instruct) == folder
    open_model(instruct)
    assert len(hub.asked) == asked


def test_half_a_download_is_not_taken_for_the_model(
    instruct: str, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer(instruct)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="has only some of its files, and the hub gave no others"):
        hub_folder(instruct, "model", MODEL_FILES)


def test_the_revision_that_an_adapter_names_is_opened(
    instruct: str, hub: StandInHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter fits the revision that it was trained on, and the main branch may have moved since."""
    model = open_model(hub.open[instruct])
    inject(model, LowRankConfig(r=2, rest="frozen"))
    adapter = save_adapter(model, tmp_path / "adapter", base=instruct)
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"revision": "v2"}))
    for use in (load_model_or_run, lambda folder: merge_adapter(folder, tmp_path / "merged")):
        with pytest.raises(UserError, match="the hub has no such revision of it"):
            use(adapter)
    hub.revisions.add("v2")
    hub.asked.clear()
    assert load_model_or_run(adapter).adapters.in_use == "adapter"
    merge_adapter(adapter, tmp_path / "merged")
    described = [path for path in hub.asked if "/revision/" in path]
    assert described and all("/revision/v2" in path for path in described)
    assert unmerge_adapter(tmp_path / "merged", tmp_path / "again").exact and not caplog.records
    merge_adapter(adapter, tmp_path / "here", base=hub.open[instruct])  # a folder has no revisions
