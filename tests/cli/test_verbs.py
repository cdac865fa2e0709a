"""Output of every verb, for people and as JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests.cli.terminal import contents, done
from tests.command import call

from relora.cli.options import unescape
from relora.report.metrics import read_json_lines

VERBS = (
    *("prepare", "pretrain", "finetune", "compare", "plan", "config"),
    *("export", "evaluate", "generate", "chat", "report", "doctor"),
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_options_and_an_example(verb: str) -> None:
    printed = done(verb, "--help")
    assert f"Example: relora {verb}" in " ".join(printed.split()) and "--help" in printed
    assert verb in done("--help")


def test_the_command_alone_shows_the_help() -> None:
    """The help is a page, not squeezed into one line."""
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


def test_the_help_answers_before_pydantic_is_loaded() -> None:
    """It would take longer than all the rest; typer itself may load it for the options of a verb."""
    script = WITHOUT_TORCH.format(commands=[["--help"]])
    ended = subprocess.run(
        [sys.executable, "-c", script.replace('"torch"', '"pydantic"')], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "False"


def test_config_prints_every_default_and_reads_its_own_output(config: Path, tmp_path: Path) -> None:
    printed = done("config", config, "optimizer.lr=2e-3", "lowrank.target_modules=[q_proj, v_proj]")
    tree = yaml.safe_load(printed)
    assert tree["optimizer"]["lr"] == 2e-3 and tree["lowrank"]["target_modules"] == ["q_proj", "v_proj"]
    assert tree["restart"]["optimizer"] == "project" and not (tmp_path / "run").exists()
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
    held_out, raw = json.loads(done(*arguments, "--json"))
    final = read_json_lines(finished / "metrics.jsonl")[-1]
    assert final["kind"] == "final" and held_out["tokens"] == final["validation_tokens"]
    assert held_out["perplexity"] == pytest.approx(final["perplexity"], rel=1e-6)
    assert raw["word_perplexity"] > 1 and json.loads(done(*arguments, "--tokens", 199, "--json"))[0]["tokens"] == 199
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
    """FORCE_COLOR, which many CI systems set, does not turn a log file into a terminal."""
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


def test_prepare_parts_documents_and_says_what_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "PAGES.TXT").write_text(
        "\n---\n".join(f"page {number} of the book " * 9 for number in range(9))
    )
    (tmp_path / "texts" / "notes.doc").write_bytes(b"123")
    arguments = ["prepare", tmp_path / "texts", "--out", tmp_path / "out", "--train-tokenizer", 300]
    report = json.loads(done(*arguments, "--document-separator", r"\n---\n", "--validation", "0.3", "--json"))
    assert report["train"]["documents"] + report["validation"]["documents"] == 9
    assert report["train"]["options"]["document_separator"] == "\n---\n"
    assert report["not_read"] == [
        {
            "source": str(tmp_path / "texts"),
            "left_out": [{"why": "not a kind that can be read", "kind": ".doc", "files": 1, "bytes": 3}],
        }
    ]
    assert "not read: 1 .doc (3 bytes)" in done(*arguments, "--document-separator", r"\n---\n", "--validation", "0.3")


def test_escapes_of_a_separator() -> None:
    assert unescape(r"\n\t\f\\n\x") == "\n\t\f\\n\\x"
