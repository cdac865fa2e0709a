"""Mistakes of users: one line on stderr, exit status 2, and nothing on the disk has changed."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from tests.cli.terminal import NO_HUB, assert_refused, contents, done
from tests.command import Ended, call


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["pretrian", "x.yaml"], "pretrain"),
        (["--nonsense"], "--nonsense"),
        (["pretrain"], "config"),
        (["pretrain", "x.yaml", "--nonsense"], "--nonsense"),
        (["prepare"], "sources"),
        (["prepare", "x.txt"], "--out"),
        (["prepare", "x.txt", "--out"], "--out"),
        (["prepare", "x.txt", "--out", "y", "--train-tokenizer", "many"], "--train-tokenizer"),
        (["evaluate", "m"], "--data"),
        (["generate", "m"], "--prompt"),
        (["generate", "m", "--prompt", "x", "--top-k", "few"], "--top-k"),
        (["export"], "run"),
        (["export", "r", "--checkpoint", "last"], "--checkpoint"),
        (["report"], "run"),
        (["doctor", "more"], "more"),
        (["config"], "--schema"),
    ],
    ids=" ".join,
)
def test_a_wrong_verb_option_or_argument(arguments: list[str], word: str) -> None:
    assert_refused(call(*arguments), word)


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
PRETRAIN_MISTAKES = [
    (["optimzer.lr=1e-3"], ["`optimzer`", "`optimizer`"]),
    (["restart.every_step=3"], ["`restart.every_step`", "`restart.every_steps`"]),
    (["learning_rate=1"], ["`learning_rate`"]),
    (["schedule.min_lr_ratio=2"], ["`schedule.min_lr_ratio`", "2"]),
    (["optimizer.lr=-1"], ["`optimizer.lr`", "-1"]),
    (["optimizer.lr=.nan"], ["`optimizer.lr`"]),
    (["optimizer.betas=[1.5, 0.9]"], ["`optimizer.betas"]),
    (["batch.sequences=0"], ["`batch.sequences`"]),
    (["batch.micro_sequences=3"], ["sequences (4)", "micro_sequences (3)"]),
    (["method=rolera"], ["`method`", "'relora'"]),
    (["precision.dtype=fp8"], ["`precision.dtype`", "'bf16'"]),
    (["schedule.total_tokens=9"], ["total_steps", "total_tokens"]),
    (["data.train=[]"], ["data.train"]),
    (["optimizer.lr"], ["optimizer.lr", "key.sub=value"]),
    (["optimizer.lr=["], ["optimizer.lr=[", "YAML"]),
    (["seed.x=1"], ["`seed`"]),
    (["device.x.y=1", "device.x.y.z=1"], ["`y`", "not a section"]),
    (["warm_start.steps=8"], ["warm_start.steps (8)", "8 steps"]),
    (["schedule.warmup_steps=8"], ["schedule.warmup_steps (8)"]),
    (["restart.warmup_steps=2"], ["restart.warmup_steps (2)", "restart.every_steps (2)"]),
    (["lowrank.r=33"], ["lowrank.r (33)", "32"]),
    (["lowrank.target_modules=[q_proj, nothing]"], ["'nothing' matches no linear layer", "q_proj"]),
    (["lowrank.target_modules=no.*thing"], ["'no.*thing' matches no linear layer"]),
    (["lowrank.target_modules=("], ["'('", "regular expression"]),
    (["data.sequence_length=65"], ["data.sequence_length (65)", "64 positions"]),
    (["model.vocab_size=100"], ["model.vocab_size", "512"]),
    (["model.preset=llama-8m"], ["llama-8m", "llama-9m"]),
    (["model.num_attention_heads=5"], ["model.hidden_size (32)"]),
    ([f"model={{path: {NO_HUB}}}"], [NO_HUB]),
    ([f"model.path={NO_HUB}"], ["preset", "path"]),
    ([f"data.train={NO_HUB}"], [NO_HUB, "no such folder"]),
    ([f"data.validation={NO_HUB}"], [NO_HUB, "no such folder"]),
    (["batch.sequences=40000"], ["tokens", "40000"]),
    (["evaluate.tokens=1"], ["2 tokens"]),
    (["device=abacus"], ["device", "abacus"]),
    pytest.param(["device=cuda"], ["device: cuda", "device: auto"], marks=needs_no_cuda),
]


@pytest.mark.parametrize(("overrides", "words"), PRETRAIN_MISTAKES)
def test_a_configuration_that_cannot_be_run(
    config: Path, tmp_path: Path, overrides: list[str], words: Sequence[str]
) -> None:
    before = contents(tmp_path)
    assert_refused(call("pretrain", config, *overrides), *words)
    assert contents(tmp_path) == before


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed(config: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert_refused(call("pretrain", config, "log.trackers=[wandb]"), "wandb", "pip install")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no such file"),
        (b"- a\n- b\n", "mapping"),
        (b"a: [1", "YAML"),
        (b"caf\xe9: 1", "UTF-8"),
        (b"", "mapping"),
    ],
    ids=["missing", "a list", "torn", "latin-1", "empty"],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, word: str) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    for verb in ("pretrain", "config"):
        assert_refused(call(verb, tmp_path / "c.yaml"), "c.yaml", word)


def test_a_folder_in_place_of_the_configuration(tmp_path: Path) -> None:
    assert_refused(call("pretrain", tmp_path), str(tmp_path))


def test_an_unknown_key_in_the_file(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + "restrat: {every_steps: 3}\n")
    assert_refused(call("pretrain", config), "config.yaml", "`restrat`", "`restart`")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_folders_of_different_tokenizers(config: Path, tmp_path: Path, other_prepared: Path, split: str) -> None:
    assert_refused(call("pretrain", config, f"data.{split}={other_prepared / split}"), "another tokenizer")
    assert not (tmp_path / "run").exists()


def test_the_parent_of_prepared_folders(config: Path, prepared: Path) -> None:
    assert_refused(call("pretrain", config, f"data.train={prepared}"), str(prepared / "train"))


def test_a_corpus_smaller_than_one_sequence(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the {name}")
    tokenizer = Path(yaml.safe_load(config.read_text())["data"]["train"]) / "tokenizer"
    out = tmp_path / "out"
    done("prepare", tmp_path / "a.txt", tmp_path / "b.txt", "--out", out, "--tokenizer", tokenizer, "--validation", 0.5)
    assert_refused(call("pretrain", config, f"data.train={out / 'train'}"), str(out / "train"), "17")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_shard_with_an_id_outside_the_vocabulary(
    config: Path, prepared: Path, tmp_path: Path, split: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared / split, damaged)
    shard = bytearray((damaged / "shard-00000.bin").read_bytes())
    shard[20:22] = (513).to_bytes(2, "little")
    (damaged / "shard-00000.bin").write_bytes(shard)
    # so many steps that every window of the data is read
    ended = call("pretrain", config, f"data.{split}={damaged}", "schedule.total_steps=400", "--quiet")
    assert_refused(ended, str(damaged), "damaged", "relora prepare")
    assert not (tmp_path / "run").exists()


def test_a_shard_cut_short(config: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "train", tmp_path / "short")
    os.truncate(tmp_path / "short" / "shard-00000.bin", 100)
    assert_refused(call("pretrain", config, f"data.train={tmp_path / 'short'}"), "shard-00000.bin", "100 bytes")


def test_a_run_folder_that_holds_another_run(finished: Path) -> None:
    before = contents(finished)
    config = finished.with_name("config.yaml")
    assert_refused(call("pretrain", config, "batch.sequences=8"), "batch.sequences (4 there, 8 here)", "--fresh")
    assert_refused(call("pretrain", config, "seed=1", "method=lora"), "method", "seed")
    assert contents(finished) == before


def test_a_run_folder_that_holds_something_else(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    assert_refused(call("pretrain", config), str(tmp_path / "run"), "not a run folder")
    assert contents(tmp_path) == before


def test_fresh_moves_a_run_aside(config: Path, tmp_path: Path) -> None:
    done("pretrain", config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
    done("pretrain", config, "seed=1", "--fresh")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run.1").glob("*.json*")} == before
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1


def test_a_file_where_the_run_folder_should_be(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    assert_refused(call("pretrain", config), str(tmp_path / "run"))
    assert_refused(call("pretrain", config, "--fresh", f"output_dir={tmp_path / 'file' / 'run'}"), "file/run")
    assert contents(tmp_path) == before


def test_no_permission_to_write(config: Path, tmp_path: Path) -> None:
    place: Path
    if os.geteuid():
        (place := tmp_path / "locked").mkdir(mode=0o500)
    elif not os.access(place := Path("/sys"), os.F_OK):
        pytest.skip("there is no place where root may not write")
    (tmp_path / "page.txt").write_text("some text " * 50)
    assert_refused(call("pretrain", config, f"output_dir={place / 'run'}"), str(place / "run"))
    arguments = ["prepare", tmp_path / "page.txt", "--train-tokenizer", 300, "--out", place / "out"]
    assert_refused(call(*arguments), str(place / "out"))
    assert not (place / "run").exists() and not (place / "out").exists()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Folder of files that cannot be used, each for another reason."""
    good = "\n".join(json.dumps({"text": f"page {number}"}) for number in range(4))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    (tmp_path / "broken.jsonl").write_text(good + '\n{"text": "torn\n' + good)
    (tmp_path / "fields.jsonl").write_text(good)
    (tmp_path / "number.jsonl").write_text(good + '\n{"text": 3}\n')
    (tmp_path / "book.docx").write_text("text")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(os.urandom(2000), mtime=0)[:-900])
    (tmp_path / "table.parquet").write_text("no table")
    (tmp_path / "folder").mkdir()
    (tmp_path / "unreadable.txt").symlink_to("/proc/self/mem")  # opens, even for root, and cannot be read
    (tmp_path / "good.txt").write_text("the only document")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], ["nowhere.txt", "no such file"]),
        (["empty.txt"], ["empty.txt", "no text"]),
        (["latin.txt"], ["latin.txt", "UTF-8"]),
        (["unreadable.txt"], ["unreadable.txt", "cannot be read"]),
        (["broken.jsonl"], ["broken.jsonl", "line 5", "--skip-bad"]),
        (["number.jsonl"], ["number.jsonl", "line 5", "not text"]),
        (["fields.jsonl", "--text-field", "body"], ["line 1", "`body`", "`text`"]),
        (["book.docx"], ["book.docx", ".jsonl"]),
        (["torn.txt.gz"], ["torn.txt.gz"]),
        (["table.parquet"], ["table.parquet"]),
        (["folder"], ["folder", "no readable file"]),
        (["good.txt"], ["too few", "--validation 0"]),
        (["good.txt", "broken.jsonl"], ["broken.jsonl", "line 5"]),
        (["good.txt", "--validation", "150%"], ["--validation", "150%"]),
        (["good.txt", "--validation", "some"], ["--validation", "some"]),
        (["good.txt", "--validation", "-1%"], ["--validation", "-1%"]),
        (["good.txt", "--take", "0"], ["--take 0"]),
        (["good.txt", "--workers", "-2"], ["--workers -2"]),
        (["good.txt", "--train-tokenizer", "100"], ["--train-tokenizer 100"]),
        (["good.txt", "--tokenizer", NO_HUB], ["--tokenizer"]),
    ],
)
def test_sources_and_options_that_cannot_be_used(sources: Path, arguments: list[str], words: Sequence[str]) -> None:
    files = [sources / argument if "." in argument or argument == "folder" else argument for argument in arguments]
    before = contents(sources)
    given = [] if "--train-tokenizer" in arguments else ["--train-tokenizer", "300"]
    assert_refused(call("prepare", *files, "--out", sources / "out" / "deeper", *given), *words)
    assert contents(sources) == before


def test_a_tokenizer_that_is_not_there(sources: Path) -> None:
    arguments = ["prepare", sources / "good.txt", "--out", sources / "out"]
    assert_refused(call(*arguments, "--tokenizer", NO_HUB), NO_HUB)
    assert_refused(call(*arguments, "--tokenizer", sources / "folder"), str(sources / "folder"))
    assert_refused(call(*arguments), "--tokenizer", "--train-tokenizer")
    assert not (sources / "out").exists()


def test_prepare_leaves_alone_what_it_did_not_write(prepared: Path, sources: Path) -> None:
    (sources / "folder" / "thesis.tex").write_text("mine")
    before = contents(sources)
    options = ["--train-tokenizer", "300"]
    page = sources / "good.txt"
    assert_refused(call("prepare", page, "--out", sources / "folder", *options), "folder", "another --out")
    assert_refused(call("prepare", page, "--out", sources / "good.txt", *options), "good.txt", "another --out")
    assert contents(sources) == before
    before = contents(prepared)
    assert_refused(call("prepare", page, "--out", prepared, *options), str(prepared), "another --out")
    assert contents(prepared) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "RUN", "--data", NO_HUB], [NO_HUB]),
        (["evaluate", NO_HUB, "--data", "DATA"], [NO_HUB]),
        (["evaluate", "RUN", "--data", "OTHER"], ["another tokenizer"]),
        (["evaluate", "RUN", "--data", "DATA", "--sequence-length", "65"], ["65", "64 positions"]),
        (["evaluate", "RUN", "--data", "DATA", "--stride", "17"], ["stride (17)"]),
        (["evaluate", "RUN", "--data", "DATA", "--tokens", "0"], ["tokens"]),
        (["evaluate", "RUN", "--data", "DATA", "--batch", "0"], ["batch"]),
        (["evaluate", "RUN", "--data", "DATA", "--dtype", "fp12"], ["fp12", "bf16"]),
        (["evaluate", "RUN", "--data", "DATA", "--device", "abacus"], ["abacus"]),
        (["evaluate", "EMPTY", "--data", "DATA"], ["empty"]),
        (["generate", "RUN", "--prompt", "x", "--temperature", "-1"], ["temperature"]),
        (["generate", "RUN", "--prompt", "x", "--top-p", "0"], ["top_p"]),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "64"], ["max_new_tokens (64)", "64 positions"]),
        (["generate", "EMPTY", "--prompt", "x"], ["empty"]),
        (["export", "RUN", "--checkpoint", "5"], ["no checkpoint of step 5", "6, 8"]),
        (["export", "RUN", "--dtype", "fp12"], ["fp12"]),
        (["export", "EMPTY"], ["empty", "not a run folder"]),
        (["export", "RUN", "--out", "DATA"], ["not a model folder"]),
        (["report", "EMPTY"], ["empty"]),
        (["report", NO_HUB], [NO_HUB]),
    ],
)
def test_what_a_finished_run_cannot_be_asked(
    finished: Path, prepared: Path, other_prepared: Path, tmp_path: Path, arguments: list[str], words: Sequence[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "RUN": finished,
        "DATA": prepared / "validation",
        "OTHER": other_prepared / "train",
        "EMPTY": tmp_path / "empty",
    }
    before = [contents(folder) for folder in (finished, prepared, tmp_path)]
    assert_refused(call(*(places.get(argument, argument) for argument in arguments)), *words)
    assert [contents(folder) for folder in (finished, prepared, tmp_path)] == before


def test_evaluating_a_run_that_has_no_model_yet(finished: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    assert_refused(call("evaluate", tmp_path, "--data", prepared / "validation"), "no model yet", "relora export")
    assert_refused(call("generate", tmp_path, "--prompt", "x"), "no model yet")
    assert_refused(call("export", tmp_path), "no sound checkpoint")
    assert_refused(call("report", tmp_path), "metrics.jsonl")


def test_the_installed_command_gives_status_2_and_one_line(config: Path) -> None:
    command = [sys.executable, "-c", "from relora.cli import main; main()", "pretrain", str(config), "sed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "`sed`", "`seed`")
