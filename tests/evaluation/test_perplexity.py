"""Every token is scored once, with the context of its window, and bytes and words are counted exactly."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.paths import DATA
from transformers import PreTrainedTokenizerFast

from relora.data.pretraining.batches import HeldOut
from relora.data.pretraining.shards import FORMAT_VERSION, Index, PreparedFolder, Shard, write_index
from relora.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from relora.errors import NonFinite, UserError
from relora.evaluation.perplexity import evaluate_model, sliding_windows
from relora.measure import evaluate
from relora.model import build_model, open_model, save_model
from relora.model.head import IGNORED

TEXT = "The cat sat on the mat.\n\nA dog — über — barked at the cat; the cat did not move. " * 4
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big dog. The dog was very friendly and wanted to play with her. They played together all day and had a lot of "
    "fun. At the end of the day, Lily went home and told her mom about her new friend."
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, whose large weights make its predictions far from uniform, and a byte-level tokenizer."""
    tokenizer = train_tokenizer([TEXT], 300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_model("llama-9m", {**shape, "vocab_size": 300, "max_position_embeddings": 64}, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(model_folder))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def write_prepared(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str = TEXT) -> PreparedFolder:
    """Write `text` as `relora prepare` would: one document with EOS at its end."""
    ids = np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id], dtype="<u2")
    folder.mkdir()
    ids.tofile(folder / "shard-00000.bin")
    index = Index(
        format_version=FORMAT_VERSION,
        tokens=len(ids),
        documents=1,
        text_bytes=len(text.encode()),
        skipped_records=0,
        dtype="uint16",
        vocab_size=300,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_fingerprint=fingerprint(tokenizer),
        shards=(Shard("shard-00000.bin", len(ids), 0),),
        sources=(),
        options={},
    )
    write_index(folder, index)
    return PreparedFolder.open(folder)


def slow_loss(model_folder: Path, ids: list[int], length: int, stride: int) -> float:
    """Score each token by itself, with the context of the first window that has the token as a label, and sum up."""
    model, total = open_model(model_folder).eval(), 0.0
    for target in range(1, len(ids)):
        start = max(0, math.ceil((target - length) / stride)) * stride
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:target]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, 0)[ids[target]].item()
    return total


@given(tokens=st.integers(2, 60), length=st.integers(1, 20), stride=st.integers(1, 20))
def test_windows_score_every_token_once(tokens: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    ids = np.arange(tokens)
    scored = []
    for number, (inputs, labels) in enumerate(sliding_windows(ids, length, stride)):
        assert len(inputs) == len(labels) <= length
        new = labels != IGNORED
        assert new.any()
        assert (labels[new] == inputs[new] + 1).all()
        assert number == 0 or np.flatnonzero(new)[0] >= length - stride  # an earlier window scored what comes before
        scored += labels[new].tolist()
    assert scored == list(range(1, tokens))


def test_a_stride_of_a_whole_window_gives_the_windows_of_training(
    model_folder: Path, tokenizer, tmp_path: Path
) -> None:
    folder = write_prepared(tmp_path / "prepared", tokenizer)
    expected = evaluate(open_model(model_folder), HeldOut(folder, 16, folder.tokens, 4))
    ids = folder.window(0, folder.tokens)
    windows = [(torch.from_numpy(i)[None], torch.from_numpy(j)[None]) for i, j in sliding_windows(ids, 16, 16)]
    result = evaluate(open_model(model_folder), windows)
    assert result.tokens == expected.tokens == folder.tokens - 1
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (64, 1), (64, None)])
def test_raw_text_agrees_with_a_slow_reference(
    model_folder: Path, tokenizer, text_file: str, length: int, stride: int | None
) -> None:
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT).input_ids]
    expected = slow_loss(model_folder, ids, length, stride or length // 2)
    (score,) = evaluate_model(model_folder, [text_file], sequence_length=length, stride=stride, batch=3)
    assert score.tokens == len(ids) - 1
    assert score.bytes == len(TEXT.encode())
    assert score.stride == (stride or length // 2)
    assert score.loss == pytest.approx(expected / score.tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / score.tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert score.word_perplexity == pytest.approx(math.exp(expected / len(TEXT.split())), rel=1e-4)


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.json", "texts.csv"])
def test_documents_do_not_see_each_other(model_folder: Path, tokenizer, tmp_path: Path, name: str) -> None:
    texts = ["The cat sat.", TEXT[:70], " ", "dog"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    rows = "".join('"' + text.replace('"', '""') + '"\n' for text in ["text", *texts])
    array = json.dumps([{"text": text} for text in texts])
    (tmp_path / name).write_text({"texts.jsonl": lines, "texts.json": array, "texts.csv": rows}[name])
    documents = [[tokenizer.bos_token_id, *tokenizer(text).input_ids] for text in texts]
    expected = sum(slow_loss(model_folder, ids, 16, 8) for ids in documents)
    (score,) = evaluate_model(model_folder, [str(tmp_path / name)], sequence_length=16, batch=4)
    assert score.tokens == sum(len(ids) - 1 for ids in documents)
    assert score.loss == pytest.approx(expected / score.tokens, rel=1e-5)


def test_separators_part_the_documents_of_a_text_file(model_folder: Path, tokenizer, tmp_path: Path) -> None:
    texts = ["The cat sat.\n", TEXT[:70] + "\n", "dog"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("<|endoftext|>\n".join(texts))
    (tmp_path / "texts" / "x.png").write_bytes(b"x")
    expected = sum(
        slow_loss(model_folder, [tokenizer.bos_token_id, *tokenizer(text).input_ids], 16, 8) for text in texts
    )
    for source in ("texts/a.txt", "texts"):
        (score,) = evaluate_model(model_folder, [str(tmp_path / source)], sequence_length=16, batch=4)
        assert score.loss == pytest.approx(expected / score.tokens, rel=1e-5)
        assert score.notes[-1] == "documents parted at 2 separators (`<|endoftext|>`)"
    assert score.notes[0] == f"{tmp_path / 'texts'}: not read: 1 .png (1 bytes)"


@pytest.mark.parametrize("tokens", [1, 7, 40, 10_000])
def test_a_part_of_a_text_counts_its_own_bytes(model_folder: Path, tokenizer, text_file: str, tokens: int) -> None:
    ids = tokenizer(TEXT).input_ids
    (score,) = evaluate_model(model_folder, [text_file], tokens=tokens)
    assert score.tokens == min(tokens, len(ids))
    assert score.bytes == pytest.approx(
        len(tokenizer.decode(ids[:tokens]).encode()), abs=3
    )  # the last character may be cut


def test_a_prepared_folder_is_scored_as_in_training(model_folder: Path, tokenizer, tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "prepared", tokenizer)
    expected = evaluate(open_model(model_folder), HeldOut(folder, 16, 50, 8), bytes_per_token=folder.bytes_per_token)
    plain, strided = (
        evaluate_model(model_folder, [str(folder.path)], sequence_length=16, stride=stride, tokens=49)[0]
        for stride in (None, 4)
    )
    figures = ("loss", "perplexity", "bits_per_byte", "tokens")
    assert [getattr(plain, name) for name in figures] == [getattr(expected, name) for name in figures]
    ids = folder.window(0, 50).tolist()
    assert strided.loss == pytest.approx(slow_loss(model_folder, ids, 16, 4) / 49, rel=1e-5)
    assert plain.word_perplexity is None


def test_another_tokenizer_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "prepared", train_tokenizer(["completely different words here"], 280))
    with pytest.raises(UserError, match="prepared with another tokenizer than the model's"):
        evaluate_model(model_folder, [str(folder.path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 65}, r"sequence_length \(65\) is more than the model's 64 positions"),
        ({"stride": 65}, r"stride \(65\) must not exceed sequence_length \(64\)"),
        ({"stride": 0}, "stride is 0; it must be 1 or more"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "int4"}, "none of fp32, bf16, fp16"),
    ],
)
def test_settings_out_of_range(model_folder: Path, text_file: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_model(model_folder, [text_file], **settings)


def test_sources_that_cannot_be_scored(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data given"):
        evaluate_model(model_folder, [])
    with pytest.raises(UserError, match=r"no-such\.txt: no such file"):
        evaluate_model(model_folder, [str(tmp_path / "no-such.txt")])
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"`body`; relora prepare --text-field names another \(relora prepare --sk"):
        evaluate_model(model_folder, [str(tmp_path / "a.jsonl")])


def test_it_is_silent_and_its_scores_are_json(model_folder: Path, text_file: str, capfd) -> None:
    scores = evaluate_model(model_folder, [text_file, text_file], sequence_length=32)
    assert capfd.readouterr() == ("", "")
    assert json.loads(json.dumps([asdict(score) for score in scores]))[1]["data"] == text_file


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data is not here")
def test_a_trained_model_knows_stories_better_than_other_text(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "other.txt").write_text("Quarterly revenue, net of provisions, rose on stronger hydrocarbon exports.")
    story, other = evaluate_model(
        DATA / "models" / "stories260K-llama-hf", [str(tmp_path / "story.txt"), str(tmp_path / "other.txt")]
    )
    assert 0.7 < story.loss < 1.8 < other.loss  # nats per token; 1.27 on TinyStories at large


def test_a_loss_that_is_no_number_is_no_score(model_folder: Path, text_file: str, tmp_path: Path) -> None:
    """A weight that is infinite is named at once, and what only some texts meet by the loss."""
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.inf
    broken = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    line = r"broken: what the model computes is not a number: model\.layers\.1\.mlp\.down_proj\.weight holds 1 infinite"
    with pytest.raises(NonFinite, match=line):
        evaluate_model(broken, [text_file], tokens=20)
    met = load_tokenizer(str(model_folder))(TEXT).input_ids[3]
    weights = load_file(model_folder / "model.safetensors")
    weights["model.embed_tokens.weight"][met] = math.nan  # the first token of the vocabulary does not meet it
    assert met > 0
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"text\.txt: the model's loss is nan: model\.embed_tokens\.weight .*damaged"):
        evaluate_model(broken, [text_file])
    write_prepared(tmp_path / "prepared", load_tokenizer(str(model_folder)))
    with pytest.raises(NonFinite, match="prepared: the model's loss is nan"):
        evaluate_model(broken, [str(tmp_path / "prepared")])
