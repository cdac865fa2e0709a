"""Refused configurations: one short line that names the file and the key, status 2, before torch is loaded.

Each row is the smallest change that makes a right configuration wrong, as overrides or as the file's content.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.faults.tiny import relora

LONGEST_LINE = 200
SECONDS = 5.0
"""Largest processor time of a case, against endless loops; the slowest took 0.2 s on the machine of the figures."""
VALID = {
    "output_dir": "run",
    "model": {"preset": "llama-9m"},
    "data": {"train": "train", "validation": "validation"},
    "schedule": {"total_steps": 3000},
}

OVERRIDES = [
    # unknown keys
    (["optimzer.lr=1"], "`optimzer.lr`|`optimzer`"),
    (["optimizer.learning_rate=1"], "`optimizer.learning_rate`"),
    (["lr=1"], "`optimizer.lr`"),
    (["restart.every=10"], "`restart.every_steps`"),
    (["lowrank.rank=8"], "`lowrank.rank`"),
    (["lowrank.str=8"], "`lowrank.str`"),
    (["data.train=[{path: a, weigth: 2}]"], "`data.train.weight`"),
    (["data.train=[{weight: 2}]"], "`data.train.0.path` is missing"),
    (["x" * 5000 + "=1"], "unknown key"),
    (["a.b.c.d=1"], "`a`"),
    (["seed.x=1"], "`seed`"),
    # values of the wrong type
    (["optimizer.lr=fast"], "`optimizer.lr`"),
    (["optimizer.lr=true"], "optimizer.lr"),
    (["optimizer.lr=[1e-3]"], "`optimizer.lr`"),
    (["optimizer.lr=2024-01-01"], "`optimizer.lr`"),
    (["seed=one"], "`seed`"),
    (["seed=yes"], "seed"),
    (["seed=1.5"], "`seed`"),
    (["seed="], "`seed`"),
    (["batch=8"], "`batch`"),
    (["lowrank=[]"], "`lowrank`"),
    (["model=llama-9m"], "`model`"),
    (["output_dir=3"], "`output_dir`"),
    (["log.trackers=tensorboard"], "`log.trackers`"),
    (["samples.prompts=[1]"], "`samples.prompts.0`"),
    (["optimizer.betas=0.9"], "`optimizer.betas`"),
    (["optimizer.betas=[0.9]"], "`optimizer.betas.1`"),
    (["optimizer.betas=[0.9, 0.9, 0.9]"], "`optimizer.betas`"),
    (["lowrank.target_modules=[1]"], "`lowrank.target_modules.0`"),
    # values out of range
    (["seed=-1"], "`seed`"),
    (["seed=18446744073709551616"], "`seed`"),
    (["optimizer.lr=0"], "`optimizer.lr`"),
    (["optimizer.lr=-1e-3"], "`optimizer.lr`"),
    (["optimizer.lr=.nan"], "`optimizer.lr`"),
    (["optimizer.lr=.inf"], "`optimizer.lr`"),
    (["optimizer.lr=1e308"], "`optimizer.lr`"),
    (["optimizer.betas=[0.9, 1.0]"], "`optimizer.betas.1`"),
    (["optimizer.name=sgd"], "`optimizer.name`"),
    (["optimizer.clip_grad_norm=-1"], "`optimizer.clip_grad_norm`"),
    (["lowrank.r=0"], "`lowrank.r`"),
    (["lowrank.r=8.5"], "`lowrank.r`"),
    (["lowrank.lora_dropout=1"], "`lowrank.lora_dropout`"),
    (["lowrank.base=int3"], "`lowrank.base`"),
    (["precision.dtype=fp8"], "`precision.dtype`"),
    (["method=rolera"], "`method`"),
    (["restart.optimizer=clear"], "`restart.optimizer`"),
    (["optimizer.name=adamw-8bit", "restart.optimizer=random"], "restart.optimizer: random cannot work on the codes"),
    (["precision.frozen=fp32", "precision.dtype=bf16"], "precision"),
    (["restart.keep_ratio=1"], "`restart.keep_ratio`"),
    (["schedule.min_lr_ratio=0"], "`schedule.min_lr_ratio`"),
    (["schedule.total_steps=0"], "`schedule.total_steps`"),
    (["schedule.total_steps=9999999999999999999999"], "`schedule.total_steps`"),
    (["schedule={total_tokens: " + "9" * 400 + "}"], "`schedule.total_tokens`"),
    (["batch.sequences=-8"], "`batch.sequences`"),
    (["checkpoint.keep_last=0"], "`checkpoint.keep_last`"),
    (["evaluate.every_steps=0"], "`evaluate.every_steps`"),
    (["log.trackers=[mlflow]"], "`log.trackers.0`"),
    (["data.train=[]"], "data.train"),
    (["data.train=[{path: a, weight: 0}]"], "`data.train.0.weight`"),
    (["data.train="], "`data.train`"),
    (["data.sequence_length=0"], "`data.sequence_length`"),
    (["samples.top_p=1.1"], "`samples.top_p`"),
    (['output_dir=""'], "`output_dir`"),
    (['output_dir="a\\0b"'], "output_dir"),
    (['output_dir="\\ud800"'], "`output_dir`"),
    # values that contradict one another
    (["model.path=x"], "preset"),
    (["model.preset="], "preset"),
    (["model={path: x, hidden_size: 8}"], "hidden_size"),
    (["schedule.total_tokens=9"], "total_steps"),
    (["batch.sequences=7"], "micro_sequences (8)"),
    (["warm_start.steps=3000"], "warm_start.steps (3000)"),
    (["schedule.warmup_steps=3000"], "schedule.warmup_steps (3000)"),
    (["restart.warmup_steps=1000"], "restart.every_steps (20)"),
]
SPELLINGS = [
    (["optimizer.lr"], "optimizer.lr"),
    (["=1"], "'=1'"),
    (["seed=["], "seed=["),
    (["seed=" + "[" * 5000], "seed="),
    (["seed=!!int abc"], "seed="),
    (["seed=2024-13-45"], "seed="),
    (["seed=" + "9" * 5000], "seed="),
    (["seed=!!python/object/apply:os.getcwd []"], "seed="),
    (["model.preset.x=1"], "model.preset.x=1"),
    (["device.x.y=1", "device.x.y.z=1"], "`y`"),
]
FILES = [
    ("empty", b"", "mapping"),
    ("a list", b"- 1\n", "mapping"),
    ("text", b"hello", "mapping"),
    ("torn", b"a: [1", "YAML"),
    ("a tab", b"a:\n\tb: 1", "YAML"),
    ("binary", b"\x7fELF\x02\x01\x01\x00\xff\xfe", "UTF-8"),
    ("latin-1", b"caf\xe9: 1", "UTF-8"),
    ("UTF-16", "output_dir: run\n".encode("utf-16"), "UTF-8"),
    ("NUL", b"output_dir: a\0b\n", "YAML"),
    ("two documents", b"a: 1\n---\nb: 2\n", "YAML"),
    ("a tag", b"output_dir: !!python/object/apply:os.getcwd []\n", "YAML"),
    ("an unknown alias", b"a: *x\n", "YAML"),
    ("a bomb", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "YAML"),
    ("a recursion", b"a: &a [*a]\n", "YAML"),
    ("a key twice", b"seed: 1\nseed: 2\n", "seed"),
    ("a list as a key", b"? [a]\n: 1\n", "YAML"),
    ("a number as a key", yaml.safe_dump({**VALID, 3: 4}).encode(), "`3`"),
    ("very deep", b"{a: " * 5000, "YAML"),
    ("very large", b"# comment\n" * 1_000_000, "bytes"),
    ("no model", yaml.safe_dump({key: VALID[key] for key in VALID if key != "model"}).encode(), "`model` is missing"),
    ("control characters", b'"\\e[31m": 1\n' + yaml.safe_dump(VALID).encode(), "unknown key"),
]
CASES = [
    *(pytest.param(VALID, overrides, word, True, id=overrides[0][:40]) for overrides, word in OVERRIDES),
    *(pytest.param(VALID, overrides, word, False, id=overrides[0][:40]) for overrides, word in SPELLINGS),
    *(pytest.param(content, [], word, True, id=name) for name, content, word in FILES),
]


def _write(folder: Path, content: object) -> None:
    data = content if isinstance(content, bytes) else yaml.safe_dump(content).encode()
    (folder / "c.yaml").write_bytes(data)


@pytest.mark.parametrize(("content", "overrides", "word", "names_file"), CASES)
def test_it_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: object,
    overrides: list[str],
    word: str,
    names_file: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, content)
    started = time.process_time()
    ended = relora("pretrain", "c.yaml", *overrides)
    seconds = time.process_time() - started
    assert (ended.status, ended.out) == (2, ""), ended
    assert ended.err.startswith("relora: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
    assert ended.err[:-1].isprintable() and len(ended.err) <= LONGEST_LINE + 1, (len(ended.err), ended.err)
    assert any(part in ended.err for part in word.split("|")) and ("c.yaml" in ended.err or not names_file), ended.err
    assert seconds < SECONDS and [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


IN_A_PROCESS = """
import json, sys
from relora.cli import main
for overrides in json.loads(sys.argv[1]):
    sys.argv = ["relora", "pretrain", "c.yaml", *overrides]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, end.code
    assert "torch" not in sys.modules, overrides
"""


def test_it_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """One fresh process reads them all, and prints one line on stderr for each."""
    _write(tmp_path, VALID)
    cases = [overrides for overrides, _ in (*OVERRIDES, *SPELLINGS)]
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps(cases)]
    ended = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert len(ended.stderr.splitlines()) == len(cases)
