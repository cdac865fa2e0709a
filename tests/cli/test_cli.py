"""The command line as a person has it: what every verb prints, what every mistake gets, what a signal leaves.

A mistake is one line on stderr and exit status 2, and nothing on the disk has changed.
"""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from tests.command import Ended, call

from relora.report.metrics import read_json_lines

VERBS = (
    *("prepare", "pretrain", "finetune", "compare", "plan", "config"),
    *("export", "evaluate", "generate", "chat", "report", "doctor"),
)
TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}
NO_HUB = "no/such/place"
"""Neither a folder nor a name that the hub could have, so nothing is asked there."""


def done(*arguments: object) -> str:
    """What a command that must succeed prints."""
    ended = call(*arguments)
    assert ended.status == 0, ended.err
    return ended.out


def assert_refused(ended: Ended, *words: str) -> None:
    """One line on stderr that says all of `words`, status 2, nothing else."""
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("relora: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err, ended.err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder with their modification times, and the folders."""
    return {
        str(path): (path.read_bytes() if path.is_file() and not path.is_symlink() else b"", path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def settings(prepared: Path, output_dir: Path) -> dict[str, object]:
    """Eight steps: warm start 2, restarts before steps 4 and 6."""
    return {
        "output_dir": str(output_dir),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "train": str(prepared / "train"),
            "validation": str(prepared / "validation"),
            "sequence_length": 16,
        },
        "lowrank": {"r": 4, "lora_alpha": 4},
        "warm_start": {"steps": 2},
        "restart": {"every_steps": 2, "warmup_steps": 1},
        "schedule": {"total_steps": 8, "warmup_steps": 1},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 4, "tokens": 200},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 4},
    }


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    """A configuration whose run folder is `tmp_path / "run"`."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(prepared, tmp_path / "run")))
    return path


@pytest.fixture(scope="session")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(prepared, folder / "run")))
    assert "held-out perplexity" in done("pretrain", folder / "config.yaml")
    return folder / "run"


@pytest.fixture
def finetuning_config(finished: Path, tmp_path: Path) -> Path:
    """A configuration that fine-tunes the finished run on four records."""
    records = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {
        "task": "instruct",
        "output_dir": str(tmp_path / "tuned"),
        "model": {"path": str(finished)},
        "data": {"train": str(tmp_path / "records.jsonl"), "sequence_length": 64, "validation_share": 0.4},
        "schedule": {"total_steps": 2},
        "batch": {"sequences": 2, "micro_sequences": 1},
    }
    (tmp_path / "finetuning.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "finetuning.yaml"


@pytest.fixture(scope="session")
def other_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"{name}: the cat sat on the mat, and so did the other cat. " * 20)
    done("prepare", folder, "--out", folder / "out", "--train-tokenizer", 280, "--validation", "50%")
    return folder / "out"


# What works


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_options_and_an_example(verb: str) -> None:
    printed = done(verb, "--help")
    assert f"Example: relora {verb}" in " ".join(printed.split()) and "--help" in printed
    assert verb in done("--help")


def test_the_command_alone_shows_the_help() -> None:
    """As a page, not squeezed into one line."""
    ended = call()
    assert "\nCommands:\n" in ended.out + ended.err


WITHOUT_TORCH = """
import sys
from relora.cli import main
for arguments in {commands!r}:
    sys.argv = ["relora", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, 2, None), end.code
print("torch" in sys.modules)
"""


def test_help_and_misspelt_keys_answer_before_torch_is_loaded(config: Path) -> None:
    commands = [["--help"], *([verb, "--help"] for verb in VERBS), ["pretrain", str(config), "optimzer.lr=1"]]
    script = WITHOUT_TORCH.format(commands=commands)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


def test_config_prints_every_default_and_reads_its_own_output(config: Path, tmp_path: Path) -> None:
    printed = done("config", config, "optimizer.lr=2e-3", "lowrank.target_modules=[q_proj, v_proj]")
    tree = yaml.safe_load(printed)
    assert tree["optimizer"]["lr"] == 2e-3 and tree["lowrank"]["target_modules"] == ["q_proj", "v_proj"]
    assert tree["restart"]["optimizer"] == "keep" and not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(printed)
    assert done("config", tmp_path / "again.yaml") == printed


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(done("config", "--schema"))
    assert schema["additionalProperties"] is False
    assert {"model", "data", "lowrank", "warm_start", "restart", "schedule"} <= schema["properties"].keys()


def test_dry_run_prints_the_plan_and_builds_nothing(config: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    plan = json.loads(done("pretrain", config, "--dry-run", "--json"))
    assert [(phase["name"], phase["first_step"], phase["steps"]) for phase in plan["phases"]] == [
        ("warm_start", 0, 2),
        ("low_rank", 2, 6),
    ]
    assert plan["restarts"] == [4, 6] and plan["total_tokens"] == 8 * 4 * 16
    printed = done("pretrain", config, "--dry-run")
    assert "warm start" in printed and "restarts: 2 (before steps 4, 6)" in printed
    assert contents(tmp_path) == before


def test_a_finished_run_has_all_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "tokenizer",
        "metrics.jsonl",
        "restarts.jsonl",
        "samples.json",
        "checkpoints",
        "model",
        "report.html",
    }


def test_pretrain_prints_json_alone(config: Path) -> None:
    result = json.loads(done("pretrain", config, "--json"))
    assert (result["steps"], result["tokens"]) == (8, 8 * 4 * 16) and result["evaluation"]["perplexity"] > 1


def test_evaluate(finished: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("It was a bright cold day, and the clocks were striking. " * 5)
    arguments = ["evaluate", finished, "--data", prepared / "validation", "--data", tmp_path / "raw.txt"]
    held_out, raw = json.loads(done(*arguments, "--tokens", 199, "--json"))
    last = [line for line in read_json_lines(finished / "metrics.jsonl") if line["kind"] == "evaluation"][-1]
    assert held_out["perplexity"] == pytest.approx(last["perplexity"], rel=1e-4)
    assert held_out["tokens"] == last["validation_tokens"] == 199 and raw["word_perplexity"] > 1
    printed = done(*arguments)
    assert "perplexity" in printed and "136" in printed


def test_generate(finished: Path) -> None:
    arguments = ["generate", finished, "--prompt", "The", "--prompt", "It", "--max-new-tokens", 5]
    ended = call(*arguments)
    assert ended.status == 0 and "The" in ended.out and "tokens/s" in ended.err and "peak memory" in ended.err
    generation = json.loads(done(*arguments, "--json"))
    assert len(generation["texts"]) == 2 and generation["texts"][1].startswith("It")
    assert all(text in ended.out for text in generation["texts"])  # the same seed, the same text


def test_export_of_a_checkpoint(finished: Path, prepared: Path, tmp_path: Path) -> None:
    printed = done("export", finished, "--checkpoint", 6, "--out", tmp_path / "at-6", "--dtype", "bf16")
    assert printed.strip() == str(tmp_path / "at-6")
    assert json.loads((tmp_path / "at-6" / "config.json").read_text())["dtype"] == "bfloat16"
    score = json.loads(done("evaluate", tmp_path / "at-6", "--data", prepared / "validation", "--json"))[0]
    assert 1 < score["perplexity"] < 1000


def test_report_of_an_unfinished_run(config: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "unfinished"
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:4]) + b'{"kind": "train", "st')  # as if it were being written
    assert done("report", run).strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 100_000


def test_doctor() -> None:
    assert json.loads(done("doctor", "--json"))["versions"]["torch"] == torch.__version__
    assert "torch" in done("doctor")


def test_prepare_reuses_what_is_there_and_says_so(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: a page of words, and words again. " * 30)
    arguments = ["prepare", *sorted(tmp_path.glob("*.txt")), "--out", tmp_path / "out", "--train-tokenizer", 300]
    report = json.loads(done(*arguments, "--validation", "0.4", "--json"))
    assert report["train"]["documents"] + report["validation"]["documents"] == 3 and not report["reused"]
    assert "nothing changed" in done(*arguments, "--validation", "40%")


@pytest.mark.parametrize("verb", ["prepare", "evaluate"])
def test_progress_draws_on_terminals_only(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """FORCE_COLOR, which many CI systems set, makes no log file a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: a page of words, and words again. " * 30)
    pages = sorted(tmp_path.glob("*.txt"))
    options = {"prepare": ["--out", tmp_path / "out", "--train-tokenizer", 300], "evaluate": ["--data", pages[0]]}
    ended = call(verb, *(pages if verb == "prepare" else [finished]), *options[verb])
    assert ended.status == 0 and "\x1b" not in ended.err, ended.err


def test_skip_bad_counts(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"page {number} of the book " * 9}) for number in range(9)]
    (tmp_path / "pages.jsonl").write_text("\n".join([*lines[:4], '{"text": "torn', "[]", *lines[4:]]))
    arguments = ["prepare", tmp_path / "pages.jsonl", "--out", tmp_path / "out", "--train-tokenizer", 300, "--skip-bad"]
    report = json.loads(done(*arguments, "--json"))
    assert report["train"]["skipped_records"] == 2
    assert report["train"]["documents"] + report["validation"]["documents"] == 9
    assert "left out: 2 bad records" in done(*arguments)


# What a mistake gets


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


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "compare"])
def test_several_processes_do_not_train(
    config: Path, finetuning_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Under a launcher such as torchrun every process would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    before = contents(tmp_path)
    assert_refused(call(verb, finetuning_config if verb == "finetune" else config), "WORLD_SIZE", "torchrun")
    assert contents(tmp_path) == before


def test_several_processes_may_read(
    config: Path, finetuning_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only reads answers there as it does elsewhere, and writes nothing."""
    reading = [
        ["config", config],
        ["pretrain", config, "--dry-run"],
        ["plan", config, "--json"],
        ["finetune", finetuning_config, "--show", "1"],
    ]
    before = contents(tmp_path)
    alone = [done(*arguments) for arguments in reading]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [done(*arguments) for arguments in reading] == alone
    assert json.loads(alone[2])["phases"] and "Say" in alone[3]
    assert contents(tmp_path) == before


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
    # so many steps that every window is met
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
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: room for the checkpoints of a tiny run, not for its report (5 MB)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("this process may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def enlarge(disk: Path, size: str = "64m") -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave not a byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_no_disk_space_for_a_run(config: Path, disk: Path) -> None:
    """Refused at its start, and the same command goes on once there is room."""
    filler = fill(disk)
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}"]
    assert_refused(call(*arguments), str(disk / "run"), "free")
    assert list(disk.iterdir()) == [filler]
    filler.unlink()
    enlarge(disk)
    done(*arguments)


def assert_stopped_itself(status: int, err: str, *words: str) -> None:
    assert status == 3 and err.startswith("relora: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_a_disk_that_fills_up_while_the_run_goes_on(config: Path, disk: Path) -> None:
    """Status 3 and one line; with room made, the same command continues."""
    enlarge(disk, "32m")
    overrides = [f"output_dir={disk / 'run'}", "schedule.total_steps=200", *LONG_PHASES]
    process = start(config, *overrides)
    wait_for(disk / "run", 15, process)  # past a checkpoint
    filler = fill(disk)
    _, err = process.communicate(timeout=60)
    assert_stopped_itself(process.returncode, err, str(disk / "run"), "space")
    filler.unlink()
    assert "continuing after step" in done("pretrain", config, *overrides)


def test_a_disk_that_has_no_room_for_the_report(config: Path, disk: Path) -> None:
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}", "--quiet"]
    ended = call(*arguments)
    assert_stopped_itself(ended.status, ended.err, "report.html", "space")
    enlarge(disk)
    done(*arguments)


def test_continuing_needs_room_for_what_is_still_to_come_only(config: Path, disk: Path) -> None:
    """What the run has already written is not asked for once more."""
    enlarge(disk)
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}", "model.hidden_size=96", "model.vocab_size=4096"]
    done(*arguments)
    enlarge(disk, f"{(shutil.disk_usage(disk).used >> 10) + 17_000}k")  # 15 MB for one checkpoint and its swap
    done(*arguments)


def test_no_disk_space_to_prepare(disk: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}: a page of words, and words again. " * 30)
    filler = fill(disk)
    pages = [tmp_path / f"{name}.txt" for name in "abc"]
    arguments = ["prepare", *pages, "--out", disk / "out", "--train-tokenizer", 300]
    ended = call(*arguments)
    assert ended.status in (2, 3) and ended.err.count("\n") == 1 and "space" in ended.err, ended.err
    filler.unlink()
    done(*arguments)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Files that cannot be used, each in its own way."""
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


# What a signal leaves


LONG_PHASES = ["restart.every_steps=20", "checkpoint.every_steps=10", "evaluate.every_steps=50"]
"""For runs of many steps: most of them only train."""


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """`relora pretrain` in a process of its own."""
    script = "from relora.cli import main; main()"
    command = [sys.executable, "-c", script, "pretrain", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never logged")


def test_stopped_by_signals_and_continued_gives_the_same_bytes(config: Path, tmp_path: Path) -> None:
    """SIGTERM and SIGINT: a checkpoint, one line, 143 and 130. SIGKILL: the last checkpoint. Then on to the end."""
    overrides = ["schedule.total_steps=100", *LONG_PHASES]
    run = tmp_path / "run"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 25), (signal.SIGKILL, 55)):
        process = start(config, *overrides)
        wait_for(run, step, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
        logged = [line["step"] for line in read_json_lines(run / "metrics.jsonl")]
        assert saved < 100, "it came to its end before the signal"
        if number == signal.SIGKILL:
            assert process.returncode == -number and saved >= 50
            continue
        assert process.returncode == 128 + number and err.count("\n") == 1 and "Traceback" not in err
        assert f"{number.name}: stopped after step {saved}" in err and "same command continues" in err
        assert logged[-1] == saved >= step
    assert "continuing after step" in done("pretrain", config, *overrides)
    done("pretrain", config, *overrides, f"output_dir={tmp_path / 'whole'}", "--quiet")
    for name in ("weights", "optimizer"):
        path = Path("checkpoints", "step-00000100", f"{name}.safetensors")
        assert (run / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    for name in ("metrics.jsonl", "restarts.jsonl"):
        figures = [
            [{key: line[key] for key in line.keys() - TIMINGS} for line in read_json_lines(folder / name)]
            for folder in (run, tmp_path / "whole")
        ]
        assert figures[0] == figures[1]


def test_the_installed_command_gives_status_2_and_one_line(config: Path) -> None:
    command = [sys.executable, "-c", "from relora.cli import main; main()", "pretrain", str(config), "sed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "`sed`", "`seed`")
