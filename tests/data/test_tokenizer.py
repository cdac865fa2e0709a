import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.paths import DATA

from relora.data.tokenizer import (
    END_OF_TEXT,
    PAD,
    copy_tokenizer,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from relora.errors import UserError

SHARED = DATA / "tokenizers"
TEXTS = ["the cat sat on the mat, the dog on the log\n", "numbers: 1 22 333 4444; ünïcödé — “quotes”"] * 5


@given(text=st.text())
def test_a_trained_tokenizer_gives_every_text_back(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_of_a_trained_tokenizer() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token) == (0, 1, PAD)
    assert vocabulary_size(tokenizer) == len(tokenizer) == 300
    assert END_OF_TEXT not in tokenizer.decode(tokenizer.encode("a text"))


def test_training_is_deterministic_between_processes() -> None:
    code = (
        "from relora.data.tokenizer import fingerprint, train_tokenizer\n"
        f"print(fingerprint(train_tokenizer({TEXTS!r}, 320)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(train_tokenizer(TEXTS, 320))


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="--train-tokenizer 257: a byte-level vocabulary has at least 258 ids"):
        train_tokenizer(TEXTS, 257)


def test_the_fingerprint_follows_the_ids_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    save_tokenizer(tokenizer, tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(tokenizer)
    copy.model_max_length, copy.padding_side = 7, "left"
    copy("text", truncation=True, max_length=3, padding="max_length")  # leaves its settings in the backend
    assert fingerprint(copy) == fingerprint(tokenizer)
    assert fingerprint(train_tokenizer(TEXTS, 301)) != fingerprint(tokenizer)
    copy.eos_token = PAD
    assert fingerprint(copy) != fingerprint(tokenizer)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
@pytest.mark.parametrize("name", ["t5-base", "mistral-v1-32k", "corpus-bpe-8k"])
def test_the_fingerprint_survives_saving(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(SHARED / name))
    save_tokenizer(tokenizer, tmp_path / "copy")
    assert fingerprint(load_tokenizer(str(tmp_path / "copy"))) == fingerprint(tokenizer)


def test_what_is_no_tokenizer_is_one_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    no_eos = tmp_path / "no_eos"
    no_eos.mkdir()
    (no_eos / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (no_eos / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for folder, message in (
        ("absent", "absent: no such folder"),
        ("empty", "empty: cannot be opened as a tokenizer"),
        ("broken", "broken: cannot be opened as a tokenizer"),
        ("no_eos", "no_eos: has no EOS token"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(str(tmp_path / folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "`auto_map` asks for code"),
        ({"tokenizer_class": "AutoModelForCausalLM"}, "is not a tokenizer of transformers"),
        ({"vocab_file": "../vocabulary.txt"}, "not a file of this folder"),
        ({"vocab_file": "/etc/passwd"}, "not a file of this folder"),
    ],
)
def test_a_tokenizer_that_asks_for_more_than_its_folder(
    tmp_path: Path, tokenizer_folder: Path, settings: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(folder))


def test_paths_of_where_a_tokenizer_was_made_do_no_harm(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Many on the hub still carry them."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = folder / "tokenizer_config.json"
    old = {"special_tokens_map_file": "/home/author/map.json", "tokenizer_file": "/home/author/tokenizer.json"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    assert fingerprint(load_tokenizer(str(folder))) == fingerprint(load_tokenizer(str(tokenizer_folder)))


def test_a_copy_holds_no_file_of_this_machine(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "given")
    (tmp_path / "secret").write_text("the reader's own")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes.txt: a link that leads out of its folder"):
        copy_tokenizer(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_web_address_is_not_repeated() -> None:
    with pytest.raises(UserError, match="a web address cannot be used") as caught:
        load_tokenizer("https://reader:hf_secret@hub.example/owner/name")
    assert "hf_secret" not in str(caught.value)
