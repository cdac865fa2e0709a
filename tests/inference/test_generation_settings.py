"""What of a model's folder decides how it writes: end tokens, chat templates, also of an adapter; the rest is said."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import call
from tests.model.small import SMALL
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.merge import merge_adapter
from relora.adapters.peft_format import write_adapter
from relora.data.tokenizer import load_tokenizer, train_tokenizer
from relora.errors import UserError
from relora.evaluation.instructions import evaluate_instructions
from relora.inference.generate import generate
from relora.inference.loading import load_model_or_run
from relora.model import build_model, save_model

OURS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THEIRS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED = [{"role": "user", "content": "why?"}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template."""
    tokenizer = train_tokenizer(["to be or not to be, that is the question"] * 3, 270)
    tokenizer.chat_template = OURS
    model = build_model("llama-9m", {**SMALL, "vocab_size": len(tokenizer)}, seed=0, eos_token_id=0)
    assert isinstance(model.config, LlamaConfig)
    return save_model(model, tmp_path_factory.mktemp("plain") / "model", tokenizer)


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    update = Factors(torch.ones(1, 16), torch.ones(16, 1), 0.1)
    layers = {"model.layers.0.self_attn.q_proj": update}
    return write_adapter(Adapter(layers=layers, base=str(model)), tmp_path / "adapter")


def with_settings(model: Path, **settings: Any) -> Path:
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return model


def rows(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("verb", ["generate", "chat", "evaluate"])
def test_generation_settings_without_effect_are_named(
    verb: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "i.jsonl").write_text('{"prompt": "to be", "response": "or not"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    arguments = {
        "generate": ("generate", model, "--prompt", "to", "--max-new-tokens", "2"),
        "chat": ("chat", model),
        "evaluate": ("evaluate", model, "--instructions", tmp_path / "i.jsonl", "--max-new-tokens", "2"),
    }[verb]
    assert call(*arguments).status == 0 and not caplog.messages
    settings = {"suppress_tokens": [5], "num_beams": 3, "forced_bos_token_id": 7, "temperature": 0.7, "top_k": 9}
    with_settings(model, do_sample=True, **settings)
    assert call(*arguments).status == 0
    assert caplog.messages == [
        "warning: generation_config.json: no effect here: forced_bos_token_id, num_beams, suppress_tokens"
    ]


def test_end_tokens_that_the_model_cannot_write(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate(with_settings(model, eos_token_id=[0, 2]), ["to"])
    assert not caplog.messages
    generate(with_settings(model, eos_token_id=[0, 99_999]), ["to"])
    assert "end token 99999 is none of the model's" in caplog.messages[0] and "no text ends there" in caplog.messages[0]
    with pytest.raises(UserError, match="`eos_token_id` has 'abc', which is not the id of a token"):
        generate(with_settings(model, eos_token_id=["abc"]), ["to"])
    caplog.clear()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|new|>"}))
    generate(with_settings(model, eos_token_id=None), ["to"])
    assert f"end token {rows(model)} is none" in caplog.messages[0] and "no text ends by itself" in caplog.messages[0]


@pytest.mark.parametrize("written", ["jinja", "settings", "named"])
def test_the_chat_template_of_an_adapter_asks_for_its_answers(
    written: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    """A trainer that saves its tokenizer beside the adapter has asked with that template."""
    if written == "jinja":
        (adapter / "chat_template.jinja").write_text(THEIRS)
    else:
        named = [{"name": "default", "template": THEIRS}, {"name": "tools", "template": OURS}]
        content = {"chat_template": THEIRS if written == "settings" else named}
        (adapter / "tokenizer_config.json").write_text(json.dumps(content))
    loaded = load_model_or_run(adapter)
    expected = AutoTokenizer.from_pretrained(model)
    with_theirs = expected.apply_chat_template(
        ASKED, chat_template=THEIRS, add_generation_prompt=True, return_dict=False
    )
    assert loaded.encode_chat(ASKED) == with_theirs
    with_ours = expected.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert loaded.encode_chat(ASKED, "base") == with_ours != with_theirs
    (tmp_path / "i.jsonl").write_text('{"prompt": "why?", "response": "or not"}\n')
    evaluate_instructions(adapter, str(tmp_path / "i.jsonl"), max_new_tokens=2, out=tmp_path / "scores")
    sample = json.loads((tmp_path / "scores" / "samples.jsonl").read_text())
    assert sample["prompt"] == "[user] why? [assistant] "


def test_a_template_that_stays_behind_when_an_adapter_is_merged_is_said(
    model: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(str(model)).save_pretrained(adapter)
    merge_adapter(adapter, tmp_path / "same", check=False)
    assert not caplog.messages
    (adapter / "chat_template.jinja").write_text(THEIRS)
    merge_adapter(adapter, tmp_path / "other", check=False)
    (message,) = caplog.messages
    assert f"{adapter}: its chat template is another than {model}'s" in message and "chat_template.jinja" in message


@pytest.mark.parametrize("use", ["beside", "merge"])
def test_tokens_that_only_the_adapters_tokenizer_has_are_named(
    use: str, model: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(adapter)
    if use == "beside":
        load_model_or_run(model, adapters=[str(adapter)])
    else:
        merge_adapter(adapter, tmp_path / "merged", check=False)
    (message,) = caplog.messages
    assert f"{adapter}: its tokenizer has tokens that {model}'s has not ('<|call|>')" in message


def test_a_tokenizer_that_begins_a_text_otherwise_is_said(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GLM's, for example, puts two tokens in front; a prompt has one start token here, as in pretraining."""
    tokenizer = load_tokenizer(str(model))
    for front in ("<|endoftext|>", "<|pad|> <|endoftext|>"):
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in front.split()]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{front} $A", special_tokens=ids)
        tokenizer.save_pretrained(model)
        assert load_tokenizer(str(model))("to").input_ids[: len(ids)] == [number for _, number in ids]
        assert not caplog.messages
        generate(model, ["to"])
    assert caplog.messages == [
        "warning: the tokenizer begins a text with <|pad|> <|endoftext|>, prompts begin with <|endoftext|> here"
    ]


def test_several_chat_templates_without_a_default(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "chat_template.jinja").rename(model / "additional_chat_templates" / "rag.jinja")
    ended = call("generate", model, "--chat", "--prompt", "to")
    assert ended.complaint(2, "`rag`", "is the default", "chat_template.jinja") is None
