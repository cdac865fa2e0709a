"""`relora plan` at the terminal."""

import json
from pathlib import Path

import pytest
import yaml
from tests.command import call

from relora.config import load_config
from relora.errors import UserError
from relora.planning.fit import fitting
from relora.planning.plan import make_plan
from relora.planning.probe import process_bytes
from relora.planning.sizes import size_in_bytes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a real process has been measured."""
    folder = tmp_path_factory.mktemp("cache")
    process_bytes(folder / "relora")
    return folder


@pytest.fixture
def config(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Warm start and low rank; the data need not be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    file = tmp_path / "config.yaml"
    model = {"preset": "llama-9m", "vocab_size": 512, "num_hidden_layers": 1}
    tree = {
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": model,
        "data": {"train": "later", "validation": "later", "sequence_length": 256},
        "lowrank": {"r": 8, "base": "fp32"},
        "precision": {"frozen": "fp32"},
        "warm_start": {"steps": 4},
        "restart": {"every_steps": 4, "warmup_steps": 1},
        "schedule": {"total_steps": 14, "warmup_steps": 2},
        "batch": {"sequences": 16, "micro_sequences": 16},
    }
    file.write_text(yaml.safe_dump(tree))
    return file


def test_figures_add_up(config: Path, tmp_path: Path) -> None:
    ended = call("plan", config, "--json")
    figures = json.loads(ended.out)
    warm_start, low_rank = figures["phases"]
    assert (warm_start["name"], warm_start["steps"], low_rank["first_step"], low_rank["steps"]) == (
        "warm_start",
        4,
        4,
        10,
    )
    assert figures["restarts"] == 2 and figures["process"] > 10**8
    for phase in figures["phases"]:
        tensors = sum(phase["figures"]["memory"].values())
        assert phase["predicted_peak"] == phase["peak"] == tensors + phase["allocator"] + figures["process"]
        assert phase["checkpoint_peak"] == phase["peak"] + phase["figures"]["snapshot"]
    assert figures["peak"] == max(phase["checkpoint_peak"] for phase in figures["phases"])
    assert figures["seconds"] == pytest.approx(
        sum(phase["figures"]["seconds"] * phase["steps"] for phase in figures["phases"])
    )
    assert not (tmp_path / "run").exists()


def test_a_person_reads_a_table(config: Path) -> None:
    printed = call("plan", config, "checkpoint.background=false").out
    for word in ("warm start", "low rank", "moments", "activations", "process", "peak of a step"):
        assert word in printed


def test_other_settings_are_listed(config: Path) -> None:
    plan = make_plan(load_config(config), alternatives=True)
    assert {other.method for other in plan.alternatives} == {"full", "lora", "relora"}
    by = {(o.method, o.base, o.activation_checkpointing): o.peak for o in plan.alternatives}
    assert len(by) == len(plan.alternatives) == 3 + 2 * 3 * 3
    assert by["lora", "fp32", "none"] <= by["relora", "fp32", "none"] <= by["full", None, "none"]
    assert by["lora", "fp32", "none"] < by["lora", "bf16", "none"]  # on a CPU the masters lie beside the copies


def test_what_fits_is_written_and_nothing_overwritten(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "fits.yaml"
    before = make_plan(load_config(config)).peak
    limit = before - 20 * 2**20
    assert call("plan", config, "--fit", limit, "--out", out).status == 0
    fits = load_config(out)
    assert make_plan(fits).peak <= limit < before
    assert (fits.method, fits.batch.sequences) == ("relora", 16) and fits.batch.micro_sequences <= 16
    text = out.read_text()
    assert call("plan", config, "--fit", limit, "--out", out).complaint(2, "fits.yaml", "is there already") is None
    assert out.read_text() == text


def test_what_cannot_fit_says_what_is_least(config: Path) -> None:
    with pytest.raises(UserError, match=r"nothing fits, the smallest peak is \d+ MiB"):
        fitting(load_config(config, ["lowrank.r=8"]), 2**20)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("800MB", 8 * 10**8), ("1.5 GiB", 3 * 2**29), ("123", 123)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "6 gallons", "nan GB", "inf"])
def test_what_is_no_size(config: Path, text: str) -> None:
    assert call("plan", config, f"--fit={text}").complaint(2, "--fit", "6GiB") is None


def test_out_needs_fit(config: Path, tmp_path: Path) -> None:
    assert call("plan", config, "--out", tmp_path / "x.yaml").complaint(2, "--out", "--fit") is None


def test_a_probe_takes_real_steps(config: Path) -> None:
    (phase,) = make_plan(load_config(config, ["method=full", "batch.micro_sequences=8"]), probed=True).phases
    assert phase.measured is not None and phase.peak == phase.measured.peak
    assert phase.seconds == phase.measured.step_seconds * 14
    assert 0.8 < phase.predicted_peak / phase.peak < 1.25


def test_a_damaged_cache_is_measured_anew(cache: Path, tmp_path: Path) -> None:
    (kept,) = (cache / "relora").glob("process-*.json")
    (tmp_path / kept.name).write_text('{"bytes": "many"}')
    assert process_bytes(tmp_path) == pytest.approx(process_bytes(cache / "relora"), rel=0.1)
    assert json.loads((tmp_path / kept.name).read_text())["bytes"] > 0


def test_a_full_rank_run_has_alternatives_only_where_they_are_possible(config: Path) -> None:
    """The default rank is larger than these layers; a full-rank run does not mind."""
    plan = make_plan(load_config(config, ["method=full", "lowrank.r=4096"]), alternatives=True)
    assert {other.method for other in plan.alternatives} == {"full"}


def test_a_place_that_cannot_be_written_is_said_before_the_search(config: Path, tmp_path: Path) -> None:
    call("plan", config, "--fit", "6GiB", "--out", tmp_path / "absent" / "x.yaml").complaint(2, "absent", "no folder")


def test_a_warm_start_that_the_run_ends_is_said_to_be_the_longest(config: Path) -> None:
    auto = "warm_start={auto: true, steps: 6, window_steps: 1}"
    assert "0 ... 6 at most" in call("plan", config, auto).out
    figures = json.loads(call("plan", config, auto, "method=full", "--alternatives", "--json").out)
    assert {other["method"] for other in figures["alternatives"]} == {"full", "lora", "relora"}
    assert not figures["adaptive_switch"]
