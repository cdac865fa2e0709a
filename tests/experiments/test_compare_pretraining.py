"""Comparisons of pretraining methods, end to end on a tiny model; every run in a process of its own."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from tests.command import call

from relora.config import load_config, parse_config
from relora.errors import UserError
from relora.experiments.compare_pretraining import Budget, budget_of, compare_pretraining
from relora.experiments.methods import methods_of
from relora.experiments.pretraining_runs import end_of, train_and_record, with_run_folder
from relora.planning.model_shape import with_settled_dtype
from relora.recipes.pretrain import pretrain
from relora.report.history import read_history

TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def written(prepared: Path, folder: Path, **changes: object) -> Path:
    """Write a configuration: 16 steps, warm start of 4, restarts before steps 8 and 12."""
    path = folder / "config.yaml"
    tree = {
        "output_dir": str(folder / "compared"),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
        "data": {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 16},
        "lowrank": {"r": 4, "lora_alpha": 4},
        "warm_start": {"steps": 4},
        "restart": {"every_steps": 4, "warmup_steps": 1},
        "schedule": {"total_steps": 16, "warmup_steps": 2},
        "optimizer": {"lr": 4.0e-3},
        "batch": {"sequences": 4, "micro_sequences": 4},
        "checkpoint": {"every_steps": 8},
        "evaluate": {"every_steps": 4, "tokens": 400},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 2},
    }
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture(scope="module")
def compared(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Make a comparison; return its configuration, its standard output and its standard error."""
    path = written(prepared, tmp_path_factory.mktemp("compare"))
    ended = call("compare", path, *COMMAND)
    assert ended.status == 0, ended.err
    return path, ended.out, ended.err


COMMAND = (
    *("--methods", "full,relora", "--seeds", "2", "--jobs", "2", "--tune-lr"),
    *("--rates", "0.001,1,1e9", "--lr", "relora=0.01"),
)


def record(path: Path) -> dict[str, Any]:
    return json.loads((path.parent / "compared" / "comparison.json").read_text())


def test_rates_are_tuned_and_repeated_over_seeds(compared: tuple[Path, str, str]) -> None:
    path, _, _ = compared
    full, relora = record(path)["results"]
    assert full["rate"] == 4e-3 and not full["at_edge"]
    tried = [(attempt["rate"], attempt["length"], attempt["seed"]) for attempt in record(path)["attempts"]]
    assert tried[:3] == [(4e-6, 0.25, 0), (4e-3, 0.25, 0), (4e6, 0.25, 0)]
    assert (4e-3, 1.0, 0) in tried and (4e-3, 1.0, 1) in tried and (0.01, 1.0, 1) in tried
    assert sum(length == 1.0 and seed == 0 for _, length, seed in tried) == 3
    # three runs go to step 4, and two of these on to step 16, with 64 tokens a step
    assert full["tuning_tokens"] == (4 + 2 * 16) * 64
    assert relora["tuning_tokens"] == 0 and relora["rate"] == 0.01
    # everything except the factors trains at the best rate of full rank
    assert [(one["lr"], one["lowrank_lr"], one["seed"]) for one in relora["outcomes"]] == [
        (4e-3, 0.01, 0),
        (4e-3, 0.01, 1),
    ]
    for one in (full, relora):
        perplexities = [outcome["perplexity"] for outcome in one["outcomes"]]
        assert one["perplexity"] == pytest.approx(sum(perplexities) / 2)
        assert one["spread"] == pytest.approx(abs(perplexities[0] - perplexities[1]) / 2**0.5)
        assert {outcome["tokens"] for outcome in one["outcomes"]} == {16 * 64}
    assert full["of_full"] == 1.0 and relora["of_full"] == pytest.approx(relora["perplexity"] / full["perplexity"])


def test_a_rate_that_diverges_is_one_that_lost(compared: tuple[Path, str, str]) -> None:
    path, _, err = compared
    found = [(attempt["rate"], attempt["length"], attempt["outcome"]["loss"]) for attempt in record(path)["attempts"]]
    assert [one for one in found if one[0] == 4e6] == [(4e6, 0.25, None)]
    assert "full  rate 4e+06" in err and "diverged" in err


def test_memory_is_counted_by_kind(compared: tuple[Path, str, str]) -> None:
    full, relora = ({**one["outcomes"][0], **one["outcomes"][0]["memory"]} for one in record(compared[0])["results"])
    buffers = full["weights"] - 4 * full["parameters"]  # the rotary embedding has some
    assert 0 <= buffers < 1000 and full["factors"] == 0
    for one in (full, relora):
        assert one["weights"] == 4 * one["parameters"] + buffers
        assert one["gradients"] == 4 * one["trainable_parameters"]
        # m and v; of a factor m, and a number for each of its features; and step counts
        in_factors = one["factors"] // 4
        expected = 8 * (one["trainable_parameters"] - in_factors) + 4 * in_factors + one["factors"] // 4
        assert one["moments"] == pytest.approx(expected, rel=0.01)
        assert one["peak_memory_bytes"] > 50e6
    # 4 attention layers of 32 x 32 and 3 of 32 x 64 in each of two blocks
    assert relora["factors"] == 4 * 2 * 4 * (4 * 64 + 3 * 96)
    assert relora["trainable_parameters"] < full["trainable_parameters"] == full["parameters"]


def test_a_table_a_spreadsheet_and_a_page(compared: tuple[Path, str, str]) -> None:
    path, out, err = compared
    folder = path.parent / "compared"
    assert "held-out perplexity" in out and "relora" in out and str(folder / "comparison.html") in out
    assert err.count(" seed ") == 8 and "full  rate 0.004  4 steps  seed 0" in err
    text = (folder / "comparison.md").read_text()
    assert "| full |" in text and " ± " in text and "over 2 seeds" in text
    with (folder / "comparison.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("full", "0"),
        ("full", "1"),
        ("relora", "0"),
        ("relora", "1"),
    ]
    kept = record(path)["results"][1]["outcomes"][1]
    assert (
        float(rows[3]["perplexity"]) == kept["perplexity"]
        and int(rows[3]["moments_bytes"]) == kept["memory"]["moments"]
    )
    page = (folder / "comparison.html").read_text()
    assert "Held-out loss" in page and "first round of rates" in page and "--series-1" in page


def test_seconds_are_those_of_training_steps(compared: tuple[Path, str, str]) -> None:
    """Evaluations took time as well, and are not counted."""
    for result in record(compared[0])["results"]:
        for outcome in result["outcomes"]:
            history = read_history(Path(outcome["folder"]))
            assert outcome["seconds"] == pytest.approx(sum(one["step_seconds"] for one in history.train))
            assert sum(one["seconds"] for one in history.evaluations) > 0.01 * outcome["seconds"]


def test_runs_leave_their_records_and_little_else(compared: tuple[Path, str, str]) -> None:
    runs = list((compared[0].parent / "compared" / "runs").iterdir())
    assert len(runs) == 6  # three of the search, the other seed of its winner, and two at the rate that was given
    for run in runs:
        left = {path.name for path in run.iterdir()}
        assert left >= {"config.yaml", "metrics.jsonl", "environment.json"}
        assert left & {"outcome.json", "outcome-4.json"} and not left & {"checkpoints", "model", "report.html"}
    assert sum((run / "outcome-4.json").exists() for run in runs) == 3
    assert sum((run / "outcome.json").exists() for run in runs) == 5


def test_a_run_that_a_search_lets_go_on_is_that_of_a_run_in_one_piece(compared: tuple[Path, str, str]) -> None:
    path = compared[0]
    won = record(path)["results"][0]["outcomes"][0]
    assert (Path(won["folder"]) / "outcome-4.json").exists()
    config = load_config(Path(won["folder"]) / "config.yaml", [f"output_dir={path.parent / 'through'}"])
    assert pretrain(config, quiet=True).evaluation.loss == won["loss"]


def test_what_is_done_is_not_done_again(compared: tuple[Path, str, str]) -> None:
    """A comparison that lost one run makes this run again, to the same figures, and no other."""
    path = compared[0]
    before = record(path)
    lost = Path(before["results"][1]["outcomes"][1]["folder"])
    (lost / "outcome.json").unlink()
    (lost / "metrics.jsonl").unlink()
    ended = call("compare", path, *COMMAND, "--json")
    assert (
        ended.status == 0 and ended.err.count("perplexity") == 1 and "relora  rate 0.01  16 steps  seed 1" in ended.err
    )
    assert without_times(json.loads(ended.out)) == without_times(before)
    again = call("compare", path, *COMMAND, "--seeds", "1")
    assert (again.status, again.err) == (0, "") and "over 1 seeds" in (lost.parents[1] / "comparison.md").read_text()


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def test_a_comparison_that_is_stopped_goes_on(prepared: Path, tmp_path: Path) -> None:
    """At SIGKILL and SIGTERM the run stops with a checkpoint; continued, it ends at the loss of a run in one piece."""
    changes = {
        "schedule": {"total_steps": 400, "warmup_steps": 2},
        "evaluate": {"every_steps": 100, "tokens": 400},
        "checkpoint": {"every_steps": 1000},
    }
    path = written(prepared, tmp_path, **changes)
    assert stopped_at(path, signal.SIGKILL, 20) == -signal.SIGKILL
    [run] = (tmp_path / "compared" / "runs").iterdir()
    wait_for(lambda: is_free(run))  # its process ends by itself
    first = newest_step(run)
    assert stopped_at(path, signal.SIGTERM, first + 20) == 143
    assert 20 <= first < newest_step(run) < 400 and not (run / "outcome.json").exists()
    ended = call("compare", path, "--methods", "full", "--json", "--keep")
    assert ended.status == 0, ended.err
    [result] = json.loads(ended.out)["results"]
    assert result["outcomes"][0]["steps"] == 400 and (run / "model").is_dir() and (run / "report.html").exists()
    other = call("compare", path, "--methods", "full", "--json", f"output_dir={tmp_path / 'other'}")
    assert json.loads(other.out)["results"][0]["outcomes"][0]["loss"] == result["outcomes"][0]["loss"]


def stopped_at(path: Path, number: signal.Signals, step: int) -> int:
    """Send a signal to a comparison of one method when its run has taken so many steps; return its exit status."""
    command = [sys.executable, "-c", "from relora.cli import main; main()", "compare", str(path), "--methods", "full"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        metrics = "compared/runs/*/metrics.jsonl"
        wait_for(lambda: any(file.read_bytes().count(b"\n") > step for file in path.parent.glob(metrics)))
        process.send_signal(number)
        return process.wait(60)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_free(run: Path) -> bool:
    """Return whether no process holds the run folder."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def newest_step(run: Path) -> int:
    return max((int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")), default=0)


def test_mistakes_are_told_before_anything_runs(prepared: Path, tmp_path: Path) -> None:
    path = written(prepared, tmp_path)
    for arguments, words in (
        (("--methods", "full,lorra"), "`lorra` is none of full"),
        (("--methods", "full", "--method", "mine:restart.evry=2"), "evry"),
        (("--methods", "full", "--lr", "lora=1e-3"), "no such method among full"),
        (("--methods", "full", "--lr", "full=fast"), "write METHOD=RATE"),
        (("--methods", "full", "--lr", "full=-1"), "write METHOD=RATE"),
        (("--rates", "1,2"), "--tune-lr"),
        (("--seeds", "0"), "--seeds 0"),
        (("--answers", "3"), "no `task`"),
        (("data.train=nowhere",), "nowhere"),
    ):
        ended = call("compare", path, *arguments)
        assert ended.complaint(2, words) is None, ended.complaint(2, words)
        assert not (tmp_path / "compared").exists()
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "config.yaml").write_text("")
    assert call("compare", path).complaint(2, "holds a run") is None


def test_fine_tuning_has_options_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "finetune.yaml"
    tree = {
        "output_dir": "x",
        "task": "instruct",
        "model": {"path": "x"},
        "data": {"train": "x"},
        "schedule": {"epochs": 1},
    }
    path.write_text(yaml.safe_dump(tree))
    assert call("compare", path, "--tune-lr").complaint(2, "--tune-lr", "has a `task`") is None


def test_a_run_is_known_by_what_decides_its_numbers(prepared: Path, tmp_path: Path) -> None:
    path = written(prepared, tmp_path)

    def folder(*overrides: str) -> str:
        return Path(with_run_folder(load_config(path, overrides), tmp_path, "run").output_dir).name

    assert folder() == folder("output_dir=elsewhere", "log.every_steps=3", "checkpoint.keep_last=5")
    for change in ("lowrank.r=2", "optimizer.eps=1e-6", "data.sequence_length=8", "evaluate.tokens=100", "seed=1"):
        assert folder(change) != folder(), change
    # full rank ignores settings of factors, so comparisons that differ in these share their full-rank runs
    full = folder("method=full")
    assert full == folder("method=full", "lowrank.r=2", "warm_start.steps=1", "restart.every_steps=9", "variant=paper")
    assert full != folder("method=full", "optimizer.lr=1e-4")
    # the tokens count, not their path
    (tmp_path / "moved").symlink_to(prepared)
    assert folder(f"data.train={tmp_path / 'moved' / 'train'}") == folder()
    assert folder(f"data.train={prepared / 'validation'}") != folder()


def test_an_outcome_that_was_damaged_is_named(prepared: Path, tmp_path: Path) -> None:
    path = written(prepared, tmp_path)
    overrides = methods_of("full", [], path, [])
    own = load_config(path, [*overrides["full"], "checkpoint.keep_last=1", "optimizer.lr=0.004"])
    own = with_settled_dtype(own)
    run = Path(with_run_folder(own, tmp_path / "compared" / "runs", "full-lr0.004").output_dir)
    run.mkdir(parents=True)
    (run / "outcome.json").write_text('{"loss": "low"}')
    with pytest.raises(UserError, match=r"outcome\.json: damaged"):
        compare_pretraining(path, [], overrides, Budget())


@example(total=2, start=0.5, share=0.25)  # a quarter of one step
@given(total=st.integers(2, 5000), start=st.floats(0, 0.9), share=st.sampled_from([0.25, 0.5, 0.63, 1.0]))
def test_a_rung_is_a_share_of_what_follows_the_warm_start(total: int, start: float, share: float) -> None:
    warm_start = int(start * total)
    tree = {
        "output_dir": "x",
        "method": "lora",
        "model": {"preset": "llama-9m"},
        "data": {"train": "x", "validation": "x"},
        "warm_start": {"steps": warm_start},
        "schedule": {"total_steps": total, "warmup_steps": 0},
    }
    end = end_of(parse_config(tree), share)
    assert warm_start < end <= total and abs(end - warm_start - share * (total - warm_start)) <= 1
    full = end_of(parse_config(tree | {"method": "full"}), share)
    assert 1 <= full <= total and abs(full - share * total) <= 1


def test_other_rates_of_factors_are_told_apart_at_the_first_rung(prepared: Path, tmp_path: Path) -> None:
    """The warm start of nearly half the run, which is the same at every rate, is over there."""
    path = written(prepared, tmp_path, warm_start={"steps": 7}, evaluate={"every_steps": 100, "tokens": 400})
    config = load_config(path, ["method=lora", "checkpoint.keep_last=1"])
    rates = (1e-3, 1e-1)
    configs = [load_config(path, ["method=lora", f"optimizer.lowrank_lr={rate}"]) for rate in rates]
    low, high = (train_and_record(with_run_folder(one, tmp_path, "run"), 0.25, keep=False) for one in configs)
    assert low.steps == high.steps == end_of(config, 0.25) == 9 and low.loss != high.loss


def test_budget_of_a_command_line() -> None:
    budget = budget_of(["full=1e-3,2e-3"], tune=True, multiples="1,3", seeds=None, jobs=None, keep=False, runs=None)
    assert (budget.given, budget.multiples, budget.seeds, budget.jobs) == ({"full": (1e-3, 2e-3)}, (1.0, 3.0), 1, 1)
