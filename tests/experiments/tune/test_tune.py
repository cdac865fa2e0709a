"""Whole searches on a tiny model: what they leave, that they survive kills, and that workers share one study."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from tests.command import call
from tests.experiments.tune.conftest import Launch

from relora.config import load_finetune_config
from relora.recipes.finetune import finetune


def record(config: Path) -> dict[str, Any]:
    return json.loads((config.parent / "study" / "tune.json").read_text())


def in_storage(config: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{config.parent / 'study' / 'study.db'}")
    return optuna.load_study(study_name="study", storage=storage).trials


def tune(config: Path, *arguments: object) -> None:
    ended = call("tune", config, "--space", config.with_name("space.yaml"), *arguments)
    assert ended.status == 0, ended.err


def test_a_search_leaves_its_best_settings_and_what_it_found(config: Path, tmp_path: Path) -> None:
    """One process after the other; the second space has a rate at which everything diverges."""
    space = yaml.safe_load((tmp_path / "space.yaml").read_text())
    space["optimizer.lowrank_lr"] = {"choices": [1, 4e11], "of": "optimizer.lowrank_lr"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    options = ("--trials", 3, "--rungs", "0.5,1", "--sampler", "random", "--seeds", 2, "--finalists", 1)
    tune(config, *options, "--objectives", "loss,adapter")
    found = record(config)
    trials = {trial["trial"]: trial for trial in found["trials"]}
    assert (
        len(trials) == 3 and trials[1]["diverged"] and trials[0]["values"]["optimizer.lowrank_lr"] == 2e-3
    )  # the configuration itself
    finished = [trial for trial in trials.values() if trial["state"] == "complete" and not trial["diverged"]]
    assert finished and found["best"]["trial"] == found["trials"][0]["trial"]
    for trial in trials.values():
        assert trial["diverged"] == (trial["values"]["optimizer.lowrank_lr"] > 1), trial
        assert trial["state"] == ("complete" if trial["diverged"] or "100" in trial["losses"] else "pruned")
        rows = {2: 2, 4: 4, 8: 8}[trial["values"]["lowrank.r"]]
        assert trial["adapter_bytes"] == pytest.approx(found["trials"][0]["adapter_bytes"] * rows / _rank(found))
    best = found["trials"][0]
    assert len(best["seeds"]) == 2 and found["best"]["loss"] == pytest.approx(sum(best["seeds"]) / 2)
    assert best["trial"] in found["front"]

    # the winner was made in two parts; its command makes it in one, and best.yaml runs as it is
    config_again = load_finetune_config(tmp_path / "study" / "best.yaml")
    assert config_again.output_dir == str(tmp_path / "study" / "best")
    assert finetune(config_again, quiet=True).evaluation.loss == best["losses"]["100"]
    assert best["command"].startswith(f"relora finetune {config} ")

    left = {path.name for path in (tmp_path / "study").iterdir()}
    assert left >= {"best.yaml", "tune.json", "tune.md", "tune.csv", "tune.html", "study.db"}
    lines = list(csv.DictReader((tmp_path / "study" / "tune.csv").read_text().splitlines()))
    assert len(lines) == 4 and [line["repeats"] for line in lines].count("") == 3
    page = (tmp_path / "study" / "tune.html").read_text()
    assert "parcoords" in page and "Pareto front" in page and "no trial saw" in page
    assert not list((tmp_path / "study" / "trials").glob("*/checkpoints"))

    # the same command has nothing left to do
    before = in_storage(config)
    tune(config, *options)
    assert in_storage(config) == before


def _rank(found: dict[str, Any]) -> int:
    return int(found["trials"][0]["values"]["lowrank.r"])


def test_a_search_that_is_killed_and_one_that_is_interrupted_go_on(config: Path, launch: Launch) -> None:
    options = ("--trials", 2, "--rungs", "0.5,1")
    folder = config.parent / "study"
    with launch(*options) as killed:
        _wait_for(lambda: (folder / "trials" / "0000" / "metrics.jsonl").exists(), killed)
        killed.kill()
    with launch(*options) as interrupted:
        _wait_for(lambda: any(trial.intermediate_values for trial in in_storage(config)), interrupted)
        interrupted.send_signal(signal.SIGINT)
        err = interrupted.communicate(timeout=120)[1]
    assert interrupted.returncode == 130
    last = err.strip().splitlines()[-1]
    for words in ("relora: SIGINT: best trial", "done", "running", "pruned", "left; the same command continues"):
        assert words in last
    reported = {trial.number: trial.intermediate_values for trial in in_storage(config)}
    tune(config, *options)
    ended = in_storage(config)
    assert [trial.number for trial in ended] == [0, 1]
    for number, losses in reported.items():
        assert losses.items() <= ended[number].intermediate_values.items()
    assert all(trial.state.is_finished() for trial in ended)
    # the first trial was stopped on its way, if not twice, and ends in the numbers of a run that went through
    through = load_finetune_config(config, [f"output_dir={config.parent / 'through'}"])
    losses = ended[0].intermediate_values
    if 100 in losses:
        assert finetune(through, quiet=True).evaluation.loss == losses[100]
    else:
        assert finetune(through, until=4, quiet=True).evaluation.loss == losses[50]


def _wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 300
    while True:
        assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
        try:
            if condition():
                return
        except (KeyError, OSError, optuna.exceptions.OptunaError):
            pass  # the study is not there yet
        time.sleep(0.1)


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a database of a PostgreSQL server that lives as long as the test."""
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    owner: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}  # a server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="relora-"))
    if owner:
        shutil.chown(folder, "postgres")
    run = {"check": True, "capture_output": True, "cwd": folder, **owner}
    control = [str(programs[-1] / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    subprocess.run([programs[-1] / "initdb", "-A", "trust", "-U", "relora", "-D", folder / "data"], **run)
    options = f"-k {folder} -c listen_addresses=''"
    subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], **run)
    try:
        yield f"postgresql://relora@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
        shutil.rmtree(folder)


def test_workers_of_a_launcher_share_a_study_without_a_duplicate(config: Path) -> None:
    """On SQLite, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "relora"]
    command += ["tune", str(config), "--space", str(config.with_name("space.yaml"))]
    command += ["--trials", "3", "--rungs", "1", "--sampler", "random"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    trials = in_storage(config)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)
    assert len({json.dumps(trial.params, sort_keys=True) for trial in trials}) == 3
    told = [line.split()[1] for line in ended.stderr.splitlines() if line.startswith("trial ")]
    assert sorted(told) == ["0", "1", "2"]  # each was run by one of them, once
    assert ended.stdout.count("best.yaml") == 1  # one of them prints the table


def test_a_search_on_a_database_server(config: Path, server: str) -> None:
    tune(config, "--trials", 1, "--rungs", "1", "--storage", server)
    storage = optuna.storages.RDBStorage(server.replace("postgresql://", "postgresql+psycopg://"))
    trials = optuna.load_study(study_name="study", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    assert [trial.state.name for trial in trials] == ["COMPLETE"]
    assert record(config)["best"]["loss"] == trials[0].value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--trials N"]),
        (("--trials", 0), ["--trials 0"]),
        (("--trials", 2, "--jobs", 0), ["--jobs 0"]),
        (("--trials", 2, "--hours", -1), ["--hours -1"]),
        (("--trials", 2, "--rungs", "1,2"), ["--rungs"]),
        (("--trials", 2, "--sampler", "cma"), ["--sampler cma"]),
        (("--trials", 2, "--objectives", "memory"), ["`loss` must be among them"]),
        (("--trials", 2, "--objectives", "loss,beauty"), ["`beauty`"]),
        (("--trials", 2, "--memory", "huge"), ["--memory huge"]),
        (("--trials", 2, "--storage", "nonsense"), ["--storage nonsense"]),
        (("--trials", 2, "--adapter", "10B"), ["none of 30 draws can be run", "--adapter allows"]),
        (("--trials", 2, "method=full", "--adapter", "1MB"), ["has no factors"]),
        (("--trials", 2, "lowrank.target_modules=nothing"), ["none of 30 draws can be run", "lowrank.target_modules"]),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_line(
    config: Path, options: tuple[object, ...], words: list[str]
) -> None:
    ended = call("tune", config, "--space", config.with_name("space.yaml"), *options)
    assert not (complaint := ended.complaint(2, *words)), complaint
    assert not (config.parent / "study" / "trials").exists()


def test_a_run_folder_is_no_place_for_a_study(config: Path) -> None:
    finetune(load_finetune_config(config), until=1, quiet=True)
    ended = call("tune", config, "--trials", 1)
    assert not (complaint := ended.complaint(2, "holds a run; give the search a folder of its own")), complaint


def test_memory_is_planned_before_a_trial_starts(config: Path) -> None:
    ended = call("tune", config, "--space", config.with_name("space.yaml"), "--trials", 1, "--memory", "1MiB")
    assert not (complaint := ended.complaint(2, "--memory: a process takes")), complaint
