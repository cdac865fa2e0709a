"""Hostile files: nothing is unpickled or run, nothing is written elsewhere, and every refusal is one line.

The cases are in `tests/hostile/corpus.py`. Every one is bounded in time and memory, and meets the environment variable
that switches torch's own protection off.
"""

import json
import logging
import pickle
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tests.hostile.corpus import EITHER, Case, cases, plant
from tests.hostile.world import World, build_world, call, payload, watched

from relora.errors import UserError
from relora.inference.loading import load_model_or_run
from relora.model import open_model

CASES = list(cases())
MOST_SECONDS = 10.0
"""Of the processor: a guard against what does not end; the slowest case took 0.54 s on the machine of the figures."""
MOST_BYTES = 200 << 20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> World:
    """What every case spoils a copy of. All verbs have run once, so that no case is charged for an import."""
    world = build_world(tmp_path_factory.mktemp("world") / "good")
    used = world.copy(world.root.with_name("used"))
    for verb in ("prepare", "evaluate", "generate", "pretrain", "export", "report", "check"):
        ended = call(getattr(used, verb)())
        assert ended.status == 0, ended.err
    return world


@pytest.fixture(autouse=True)
def no_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_the_watch_sees_what_it_is_there_for(good: World, tmp_path: Path) -> None:
    with watched(tmp_path / "allowed") as watch:
        pickle.loads(payload(tmp_path / "marker"))
        subprocess.run(["true"], check=True)
    assert (tmp_path / "marker").is_dir()
    assert watch.unpickled == ["posix.mkdir"]
    assert watch.written == [str(tmp_path / "marker")]
    assert watch.started != []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_file(case: Case, good: World, tmp_path: Path) -> None:
    world = good.copy(tmp_path / "world")
    arguments = case.spoil(world)
    before = {file: file.read_bytes() for file in world.outside.rglob("*") if file.is_file()}
    with watched(tmp_path) as watch:
        ended = call(arguments)
    assert not world.marker.exists()
    assert watch.unpickled == []
    assert "pretrain" in arguments or watch.started == []  # a run asks git for its revision
    assert watch.written == []
    assert {file: file.read_bytes() for file in world.outside.rglob("*") if file.is_file()} == before
    assert ended.peak_bytes < MOST_BYTES
    assert ended.status in ((0, 2) if case.says == EITHER else (0,) if case.says is None else (2,)), ended.err
    if ended.status == 2:
        assert re.fullmatch(r"relora: [^\n]{1,500}\n", ended.err), ended.err
        assert case.says == EITHER or re.search(case.says, ended.err), ended.err
        assert ended.cpu_seconds < MOST_SECONDS


def test_a_process_of_its_own_refuses_too(good: World, tmp_path: Path) -> None:
    """With the variable in its environment from the start, and without the imports that other cases had."""
    world = good.copy(tmp_path / "world")
    plant(world)
    (world.model / "model.safetensors").unlink()
    done = subprocess.run(
        [sys.executable, "-c", "from relora.cli import main; main()", *world.evaluate()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"relora: [^\n]*pickled[^\n]*\n", done.stderr)
    assert not world.marker.exists()


@pytest.mark.parametrize(
    "verb", ["prepare", "pretrain", "resume", "export", "evaluate", "generate", "report", "check", "doctor"]
)
def test_no_verb_opens_a_pickle(verb: str, good: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = good.copy(tmp_path / "world")
    plant(world)
    monkeypatch.chdir(world.model)
    with watched(tmp_path) as watch:
        ended = call(getattr(world, verb)())
    assert ended.status == 0, ended.err
    assert watch.unpickled == watch.written == []
    assert not world.marker.exists()


# Code that comes with a model

OWN_CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.mkdir({marker!r})
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(good: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A model of an architecture that only its own file knows; loaded, it leaves the marker."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    world = good.copy(tmp_path / "world")
    (world.model / "modeling_own.py").write_text(OWN_CODE.format(marker=str(world.marker)))
    named = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    world.edit("model/config.json", auto_map=named, model_type="own")
    return world


def test_a_models_own_code_runs_only_when_it_is_trusted(own_code: World, caplog: pytest.LogCaptureFixture) -> None:
    for from_scratch in (False, True):
        with pytest.raises(UserError, match=r"needs code that comes with it \(modeling_own.py\).*--trust-remote-code"):
            open_model(own_code.model, from_scratch=from_scratch)
    assert not own_code.marker.exists()
    with caplog.at_level(logging.WARNING):
        loaded = load_model_or_run(own_code.model, trust_remote_code=True)
    assert own_code.marker.exists()
    assert type(loaded.model).__name__ == "OwnModel"
    assert [record.message for record in caplog.records if record.name.startswith("relora")] == [
        f"warning: {own_code.model}: runs code that came with the model: modeling_own.py"
    ]


@pytest.mark.parametrize("verb", ["generate", "pretrain"])
def test_the_person_at_the_terminal_says_what_is_trusted(own_code: World, verb: str) -> None:
    own_code.write_config(path=str(own_code.model), from_scratch=True)
    trust = {"generate": "--trust-remote-code", "pretrain": "model.trust_remote_code=true"}[verb]
    refused = call(getattr(own_code, verb)())
    assert refused.status == 2
    assert "modeling_own.py" in refused.err
    assert not own_code.marker.exists()
    ended = call([*getattr(own_code, verb)(), trust])
    assert ended.status == 0, ended.err
    assert own_code.marker.exists()


def test_a_run_folder_cannot_say_that_its_code_is_trusted(own_code: World) -> None:
    own_code.model.rename(own_code.run / "own")
    config = own_code.run / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["model"] = {"path": str(own_code.run / "own"), "trust_remote_code": True}
    config.write_text(yaml.safe_dump(settings))
    ended = call(own_code.export())
    assert ended.status == 2, ended.err
    assert not own_code.marker.exists()


def test_a_known_architecture_is_transformers_own_and_saved_without_its_map(good: World, tmp_path: Path) -> None:
    world = good.copy(tmp_path / "world")
    world.edit("model/config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    model = open_model(world.model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert "auto_map" not in model.config.to_dict()


# Links


def test_a_hub_snapshots_links_are_followed_and_no_others(good: World, tmp_path: Path) -> None:
    """The hub's cache keeps REPO/blobs/HASH, and REPO/snapshots/COMMIT/NAME is a link to it."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(good.model.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert call(["generate", str(snapshot), "--prompt", "The", "--max-new-tokens", "1"]).status == 0
    (snapshot / "notes.txt").symlink_to("../../notes.txt")
    with pytest.raises(UserError, match=r"notes.txt: a link that leads out of its folder"):
        open_model(snapshot)
    (snapshot / "notes.txt").unlink()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link that leads out of its folder"):
        open_model(snapshot)


def test_links_within_a_folder_and_a_link_to_it_are_in_order(good: World, tmp_path: Path) -> None:
    world = good.copy(tmp_path / "world")
    (world.model / "same.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(world.model)
    open_model(tmp_path / "link")


# Secrets

SECRETS = {
    "HF_TOKEN": "hf_plantedtokenAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedtokenBBBBBBBBBBBBBB",
    "WANDB_API_KEY": "plantedwandbkeyCCCCCCCCCCCCCCCCCCCCCCCCC",
    "AWS_SECRET_ACCESS_KEY": "plantedawsDDDDDDDDDDDDDDDD",
    "SOME_PASSWORD": "plantedpasswordEEEEEE",
}


def test_secrets_reach_no_file_and_no_line(good: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    world = good.copy(tmp_path / "world")
    said = []
    for verb in ("prepare", "pretrain", "resume", "export", "evaluate", "generate", "report", "check"):
        arguments = getattr(world, verb)()
        if verb in ("pretrain", "resume"):  # not quiet, and with a tracker
            arguments = [*(item for item in arguments if item != "--quiet"), "log.trackers=[tensorboard]"]
        said.append(call(arguments))
    said.append(call(["doctor", "--json"]))
    assert [ended.status for ended in said] == [0] * len(said), [ended.err for ended in said]
    address = f"https://reader:{SECRETS['HF_TOKEN']}@hub.example/owner/name"
    (world.model / "model.safetensors").write_bytes(b"")
    failed = [
        call([*world.pretrain(), f"model={{path: '{address}'}}"]),
        call([*world.pretrain(), f"data.train={address}"]),
        call([*world.pretrain(), f"output_dir={address}"]),
        call(["evaluate", address, *world.evaluate()[2:]]),
        call(["generate", address, *world.generate()[2:]]),
        call([*world.prepare()[:-1], address]),
        call(world.evaluate()),
    ]
    assert [ended.status for ended in failed] == [2] * len(failed), [ended.err for ended in failed]
    printed = "".join(ended.out + ended.err for ended in said + failed).encode()
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any("tensorboard" in str(file) for file in written)
    for secret in SECRETS.values():
        assert secret.encode() not in printed
        assert [file for file, content in written.items() if secret.encode() in content] == []


# The report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\"'`&${x}<!--"


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]


def test_the_report_of_a_run_with_hostile_words(good: World, tmp_path: Path) -> None:
    """A whole run whose name, prompts and layers are markup."""
    world = good.copy(tmp_path / "world")
    name = HOSTILE.replace("/", "\\")
    plain = _Tags((world.run / "report.html").read_text())
    settings = yaml.safe_load(world.config.read_text())
    settings |= {"output_dir": str(world.root / name), "samples": {"prompts": [HOSTILE], "max_new_tokens": 2}}
    settings |= {"method": "relora", "restart": {"every_steps": 1, "warmup_steps": 0}}
    world.config.write_text(yaml.safe_dump(settings))
    ended = call(world.pretrain())
    assert ended.status == 0, ended.err
    run = world.root / name
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    restarts = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    for restart in restarts:
        restart |= {"optimizer": HOSTILE}
        for layer in restart["layers"]:
            layer["name"] = HOSTILE
    (run / "restarts.jsonl").write_text("".join(json.dumps(restart) + "\n" for restart in restarts))
    assert call(["report", str(run)]).status == 0
    page = (run / "report.html").read_text()
    parsed = _Tags(page)
    assert parsed.tags.count("script") == plain.tags.count("script")
    assert "img" not in parsed.tags
    assert parsed.handlers == plain.handlers
    assert page.count("alert(1)") >= 3  # there, as text
    assert HOSTILE not in page
