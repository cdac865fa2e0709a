import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from relora.data.pretraining import journal
from relora.data.pretraining import prepare as prepare_module
from relora.data.pretraining.prepare import prepare
from relora.data.pretraining.shards import PreparedFolder
from relora.data.tokenizer import load_tokenizer
from relora.errors import Interrupted, RunStopped, UserError


def _texts(count: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths; some occur twice."""
    draw = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ünï", "第三", "42", "<|endoftext|>"]
    texts = [" ".join(draw.choices(words, k=draw.choice([1, 5, 40, 300]))) for _ in range(count)]
    return texts + texts[:: max(1, count // 5)]


def _write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def _files(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def _documents(folder: Path) -> list[str]:
    """The texts of a split, by its own tokenizer: the inverse of `prepare`."""
    split = PreparedFolder.open(folder)
    tokenizer = load_tokenizer(str(split.tokenizer_path))
    ids = split.window(0, split.tokens).tolist()
    assert ids[-1] == tokenizer.eos_token_id
    documents: list[list[int]] = [[]]
    for token in ids[:-1]:
        if token == tokenizer.eos_token_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(document) for document in documents]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, shards and journal lines from little text."""
    monkeypatch.setattr(prepare_module, "CHUNK_CHARS", 3000)
    monkeypatch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(journal, "SHARD_TOKENS", 2000)


@pytest.mark.usefixtures("small_steps")
def test_no_token_is_dropped_and_no_text_on_both_sides(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = _texts(150)
    source = _write(tmp_path / "a.jsonl", texts)
    report = prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0.2, workers=2)
    train, validation = _documents(tmp_path / "out/train"), _documents(tmp_path / "out/validation")
    assert Counter(train) + Counter(validation) == Counter(texts)
    assert [text for text in texts if text in set(train)] == train  # in the order of the source
    assert not set(train) & set(validation)
    assert report.validation is not None
    for index, documents in ((report.train, train), (report.validation, validation)):
        assert index.documents == len(documents)
        assert index.text_bytes == sum(len(text.encode()) for text in documents)
    assert len(report.train.shards) > 3
    assert not (tmp_path / "out" / journal.JOURNAL_NAME).exists()


@pytest.mark.usefixtures("small_steps")
def test_the_bytes_do_not_depend_on_workers(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(150))
    for workers in (1, 3):
        prepare([source], tmp_path / str(workers), tokenizer=str(tokenizer_folder), validation=0.2, workers=workers)
    assert _files(tmp_path / "1") == _files(tmp_path / "3")


def test_the_split_does_not_depend_on_order_or_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = _texts(100)
    one = _write(tmp_path / "one.jsonl", texts)
    halves = [_write(tmp_path / f"{half}.jsonl", texts[::-1][half::2]) for half in (0, 1)]
    for name, sources in (("x", [one]), ("y", halves)):
        prepare(sources, tmp_path / name, tokenizer=str(tokenizer_folder), validation=0.2, workers=1)
    for split in ("train", "validation"):
        assert sorted(_documents(tmp_path / "x" / split)) == sorted(_documents(tmp_path / "y" / split))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_killed_anywhere_it_continues_to_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, own_tokenizer: bool
) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(30))
    out, calls, kill_at, fsync = tmp_path / "out", 0, 0, os.fsync

    def killing_fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def run() -> bool:
        chosen = {"train_tokenizer": 280} if own_tokenizer else {"tokenizer": str(tokenizer_folder)}
        return prepare([source], out, validation=0.2, workers=1, **chosen).continued

    monkeypatch.setattr(os, "fsync", killing_fsync)
    run()
    whole, points = _files(out), calls
    continued, stride = 0, 4 if own_tokenizer else 2  # prime to the three syncs that alternate: all kinds are met
    for kill_at in range(1, points + 1, stride):
        shutil.rmtree(out)
        child = os.fork()
        if child == 0:
            calls = 0
            run()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        calls = points
        continued += run()
        assert _files(out) == whole, kill_at
    assert continued >= points // stride - 1  # a kill before the journal's first line leaves nothing to continue


def test_interrupted_by_hand_it_continues(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_CHARS", 3000)
    source = _write(tmp_path / "a.jsonl", _texts(60))

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command continues") as caught:
        prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), progress=interrupt)
    assert caught.value.exit_status == 130
    assert prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder)).continued


def test_a_full_disk_keeps_what_is_done(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(60))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal.SplitWriter, "sync", lambda _: full(0))
        patch.setattr(prepare_module, "JOURNAL_SECONDS", 0.0)
        with pytest.raises(RunStopped, match="cannot be written: No space left on device; the same command continues"):
            prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder))
    assert prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder)).continued


def test_nothing_changed_means_nothing_done(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(60))
    first = prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), workers=1)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    second = prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), workers=2)
    assert (first.reused, second.reused) == (False, True)
    assert (first.train, first.validation) == (second.train, second.validation)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize("finished", [True, False])
def test_anything_changed_is_refused(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    texts = _texts(60)
    source, out = _write(tmp_path / "a.jsonl", texts), tmp_path / "out"

    def run(source: str = source, **options: object) -> None:
        prepare([source], out, **({"tokenizer": str(tokenizer_folder), "workers": 1} | options))

    if finished:
        run()
    else:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(prepare_module, "_one_pass", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run()
    before = _files(out)
    other = _write(tmp_path / "b.jsonl", texts)
    for options, message in (
        ({"validation": 0.3}, "validation was 0.01 and is now 0.3"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"take": 5}, "take was None and is now 5"),
        ({"tokenizer": None, "train_tokenizer": 300}, "tokenizer was '.*' and is now None"),
        ({"source": other}, r"the sources were .*a\.jsonl and are now .*b\.jsonl"),
    ):
        with pytest.raises(UserError, match=rf"out: holds tokens prepared otherwise \({message}\); delete it or"):
            run(**options)
    _write(tmp_path / "a.jsonl", texts[1:])
    with pytest.raises(UserError, match=r"a\.jsonl has changed since"):
        run()
    assert _files(out) == before


@pytest.mark.parametrize("content", ["broken", '{"body": "x"}'])
def test_a_mistake_in_a_source_leaves_nothing(tmp_path: Path, tokenizer_folder: Path, content: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}\n' * 20 + content)
    for chosen in ({"tokenizer": str(tokenizer_folder)}, {"train_tokenizer": 300}):
        with pytest.raises(UserError, match=r"a\.jsonl, line 21: .*--skip-bad"):
            prepare([str(source)], tmp_path / "new" / "out", **chosen)
    assert list(tmp_path.iterdir()) == [source]


def test_bad_records_are_counted_in_the_index(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}\nbroken\n{"text": "y"}\n')
    report = prepare([str(source)], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0, skip_bad=True)
    assert report.train.skipped_records == 1
    assert str(report).splitlines()[:2] == [
        f"train: {report.train.tokens} tokens, 2 documents, 0.0 MB of text",
        "left out: 1 bad records (1 not valid JSON)",
    ]
    assert report.validation is None
    assert _documents(tmp_path / "out/train") == ["x", "y"]
    assert not (tmp_path / "out/validation").exists()


def test_few_documents_still_give_both_sides(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", ["one", "two", "three", "three"])
    report = prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0.001)
    assert report.validation is not None
    assert report.train.documents + report.validation.documents == 4
    assert len(set(_documents(tmp_path / "out/validation"))) == 1


def test_one_long_text_file_gives_both_sides(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(
        "".join(f"Chapter {number}.\n\nIt was a dark night.\n\n" for number in range(5000))
    )
    report = prepare([str(tmp_path / "book.txt")], tmp_path / "out", train_tokenizer=300)
    assert report.validation is not None
    assert report.train.within_documents and report.validation.within_documents
    assert 0.002 < report.validation.text_bytes / (tmp_path / "book.txt").stat().st_size < 0.02  # of 1%
    assert "parts of them are held out" in str(report)
    pieces = _documents(tmp_path / "out/train") + _documents(tmp_path / "out/validation")
    assert Counter("".join(pieces)) == Counter((tmp_path / "book.txt").read_text())


def test_one_document_cannot_be_split(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", ["the same"] * 3)
    with pytest.raises(UserError, match=r"3 document\(s\), too few to hold any out; .*--validation 0"):
        prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder))
    assert not (tmp_path / "out").exists()
    assert prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0).train.documents == 3


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["<end>", *(f"w{number}" for number in range(1 << 16))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "large")
    source = _write(tmp_path / "a.jsonl", ["w0 w65535"])
    index = prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "large"), validation=0).train
    assert (index.dtype, index.vocab_size) == ("uint32", 1 + (1 << 16))
    assert PreparedFolder.open(tmp_path / "out/train").window(0, 3).tolist() == [1, 1 << 16, 0]


def test_what_is_in_the_way_is_left_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, message in (
        ("other", "holds something else, which is left alone"),
        ("file", "a file is in the way"),
        ("file/out", "cannot be written: Not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([source], tmp_path / name, tokenizer=str(tokenizer_folder))
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_two_at_once_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(20))

    def second(_: object) -> None:
        with pytest.raises(UserError, match="another `relora prepare` is writing here"):
            prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder))

    assert not prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder), progress=second).reused


def test_a_damaged_journal_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _texts(20))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / journal.JOURNAL_NAME).write_text("nonsense\n")
    with pytest.raises(UserError, match=r"journal\.jsonl: damaged; delete .*out and prepare again"):
        prepare([source], tmp_path / "out", tokenizer=str(tokenizer_folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --tokenizer .* or --train-tokenizer"),
        ({"tokenizer": "x", "train_tokenizer": 300}, "give either"),
        ({"train_tokenizer": 100}, "--train-tokenizer 100: .* at least 258"),
        ({"train_tokenizer": 300, "validation": 1.0}, r"--validation 1\.0: must be a share"),
        ({"train_tokenizer": 300, "take": 0}, "--take 0: must be at least 1"),
        ({"train_tokenizer": 300, "workers": 0}, "--workers 0: must be at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare([_write(tmp_path / "a.jsonl", ["x"])], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_progress_is_told(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_CHARS", 3000)
    texts = _texts(60)
    told = []
    report = prepare([_write(tmp_path / "a.jsonl", texts)], tmp_path / "out", train_tokenizer=280, progress=told.append)
    assert [progress.stage for progress in told[:2]] == ["tokenizer", "tokens"]
    assert report.validation is not None
    assert told[-1].tokens == report.train.tokens + report.validation.tokens
    assert told[-1].text_bytes == sum(len(text.encode()) for text in texts)
    assert told[-1].read_share == 1.0


STORIES = "".join(f"A cat sat {number} times.\n<|endoftext|>\n" for number in range(40))


def test_separators_part_the_documents_of_a_text_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text(STORIES + "Of `<|endoftext|>`, a token.\n")
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0.2)
    assert report.validation is not None
    assert report.train.documents + report.validation.documents == 41
    assert (report.train.separators, report.train.separators_in_text) == (40, 1)
    documents = _documents(tmp_path / "out/train") + _documents(tmp_path / "out/validation")
    assert sorted(documents)[0] == "A cat sat 0 times.\n"
    assert "documents parted at 40 separators (`<|endoftext|>`)\n`<|endoftext|>`: 1 times inside a text" in str(report)
    again = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tokenizer_folder), validation=0.2)
    assert again.reused and again.notes == report.notes


def test_a_separator_of_ones_own_parts_documents_inside_lines(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("##".join(f"document {number}" for number in range(30)))
    out = tmp_path / "out"

    def run(separator: str | None, folder: Path = out) -> int:
        options = {"tokenizer": str(tokenizer_folder), "validation": 0, "document_separator": separator}
        return prepare([str(tmp_path / "a.txt")], folder, **options).train.documents

    assert run("##") == 30
    with pytest.raises(UserError, match=r"document_separator was '##' and is now None"):
        run(None)
    assert run("@", tmp_path / "other") == 1
    _write(tmp_path / "b.jsonl", ["x"])
    with pytest.raises(UserError, match=r"--document-separator: parts plain text files .*, and the sources have none"):
        prepare([str(tmp_path / "b.jsonl")], tmp_path / "new", tokenizer=str(tokenizer_folder), document_separator="##")


def test_the_eos_token_of_a_given_tokenizer_parts_documents(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["</s>", "a", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("a a\n</s>\nb\n")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tmp_path / "words"), validation=0)
    split = PreparedFolder.open(tmp_path / "out/train")
    assert split.window(0, split.tokens).tolist() == [1, 1, 0, 2, 0]


def _made_before_separators(out: Path) -> None:
    """Rewrite the indexes of a folder as the first release wrote them."""
    for split in ("train", "validation"):
        file = out / split / "index.json"
        index = json.loads(file.read_text())
        for field in ("separators", "separators_in_text", "within_documents"):
            del index[field]
        del index["options"]["document_separator"]
        file.write_text(json.dumps(index))


def test_a_folder_of_an_earlier_release_is_complete_if_its_documents_are_the_same(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    (tmp_path / "parted.txt").write_text("a story\n<|endoftext|>\n")
    plain = [str(tmp_path / f"{number}.txt") for number in range(30)]
    parted = [*plain, str(tmp_path / "parted.txt")]
    for name, sources in (("plain", plain), ("parted", parted)):
        prepare(sources, tmp_path / name, tokenizer=str(tokenizer_folder), validation=0.2)
        _made_before_separators(tmp_path / name)
    assert PreparedFolder.open(tmp_path / "parted/train").index.separators == 0  # it can still be trained on
    assert prepare(plain, tmp_path / "plain", tokenizer=str(tokenizer_folder), validation=0.2).reused
    with pytest.raises(UserError, match=r"`<\|endoftext\|>` was text, and now parts the documents of plain text files"):
        prepare(
            [*plain, str(tmp_path / "parted.txt")], tmp_path / "parted", tokenizer=str(tokenizer_folder), validation=0.2
        )


def test_a_folder_whose_files_in_capitals_are_read_now_says_so(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "win").mkdir()
    for number in range(30):
        (tmp_path / "win" / f"{number}.txt").write_text(f"document {number}")
    prepare([str(tmp_path / "win")], tmp_path / "out", tokenizer=str(tokenizer_folder))
    (tmp_path / "win" / "BOOK.TXT").write_text("a book")
    with pytest.raises(UserError, match=r"had 30 files to read, and now has 31: BOOK\.TXT with a suffix in capitals"):
        prepare([str(tmp_path / "win")], tmp_path / "out", tokenizer=str(tokenizer_folder))


def test_what_a_folder_holds_and_is_not_read_is_reported(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number}.txt").write_text(f"document {number}")
    (tmp_path / "in" / "x.png").write_bytes(b"123")
    for _ in range(2):  # written, and found complete
        report = prepare([str(tmp_path / "in")], tmp_path / "in" / "out", tokenizer=str(tokenizer_folder))
        assert f"{tmp_path / 'in'}: not read: 1 .png (3 bytes)" in str(report).splitlines()
        assert [(one.source, len(one.left_out)) for one in report.not_read] == [(str(tmp_path / "in"), 1)]


@pytest.mark.usefixtures("small_steps")
def test_held_out_parts_of_one_document_continue_after_kills(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "It was a dark night. " * 10 for number in range(400))
    source, out = _write(tmp_path / "a.jsonl", [text]), tmp_path / "out"

    def run(out: Path, stop_at: int | None = None) -> object:
        seen = 0

        def stop(_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == stop_at:
                raise KeyboardInterrupt

        return prepare([source], out, tokenizer=str(tokenizer_folder), validation=0.1, workers=1, progress=stop)

    report = run(tmp_path / "whole")
    assert report.train.within_documents
    train, validation = _documents(tmp_path / "whole/train"), _documents(tmp_path / "whole/validation")
    assert len("".join(train + validation)) == len(text)
    assert not any(part in whole for part in validation for whole in train)
    for stop_at in (1, 3, 2):
        with pytest.raises(Interrupted):
            run(out, stop_at)
    assert run(out).continued
    assert _files(out) == _files(tmp_path / "whole")


def test_a_tokenizer_is_not_trained_on_held_out_parts(tmp_path: Path) -> None:
    """The tokenizer of a text without its held-out parts is the one that the text gets."""
    text = "\n\n".join(f"Paragraph {number} of {number * 7919}. Night {number}." * 3 for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    prepare([str(tmp_path / "book.txt")], tmp_path / "out", train_tokenizer=400, validation=0.3)
    trained = _documents(tmp_path / "out/train")
    assert len(_documents(tmp_path / "out/validation")) > 3
    alone = _write(tmp_path / "train.jsonl", trained)
    prepare([alone], tmp_path / "alone", train_tokenizer=400, validation=0)
    first, second = (tmp_path / name / "train/tokenizer/tokenizer.json" for name in ("out", "alone"))
    assert first.read_bytes() == second.read_bytes()


def test_what_an_earlier_release_began_and_cannot_be_completed_starts_over(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """A threshold that leaves a split empty is no longer chosen, but may stand in a journal."""
    source, out = _write(tmp_path / "a.jsonl", _texts(20)), tmp_path / "out"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prepare([source], out, tokenizer=str(tokenizer_folder), validation=0.2, progress=stop)
    file = out / journal.JOURNAL_NAME
    header, *states = file.read_text().splitlines()
    old = {**json.loads(header), "threshold": 1}
    del old["within_documents"]
    file.write_text("\n".join([json.dumps(old), *states, ""]))
    with pytest.raises(UserError, match="begun by an earlier version; what was unfinished is removed"):
        prepare([source], out, tokenizer=str(tokenizer_folder), validation=0.2)
    assert prepare([source], out, tokenizer=str(tokenizer_folder), validation=0.2).validation is not None
