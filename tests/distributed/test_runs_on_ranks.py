"""Whole runs on 1, 2, 3 and 4 real processes: the same run, faults of one rank, and what is refused."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import call
from tests.distributed.launched import (
    STEPS,
    largest_difference,
    play,
    settings,
    tensors_of,
    torchrun,
    written,
)
from tests.faults.ranks import process_of

from relora.report.metrics import read_json_lines

TOLERANCE = 2e-5
"""Of a weight after 30 steps in the fast mode, whose sums are rounded in another order. Runs of other seeds differ by
1e-1."""

Met = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def scene(name: str, tree: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "tree": tree, **more}


@pytest.fixture(scope="module")
def four(place: Path, prepared: Path) -> Met:
    """What four ranks met."""

    def tree(name: str, **sections: Any) -> dict[str, Any]:
        return settings(prepared, place / name, **sections)

    tree_sums = {"distributed": {"deterministic": True}}
    return play(
        4,
        [
            scene("fast-4", tree("fast-4")),
            scene("tree-4", tree("tree-4", **tree_sums)),
            scene("dropout-4", tree("dropout-4", **tree_sums, lowrank={"lora_dropout": 0.2})),
            scene("moved", tree("moved", **tree_sums), until=12),
            scene("few", tree("few", batch={"sequences": 2, "micro_sequences": 1})),
            scene("few-parts", tree("few-parts", **tree_sums, batch={"sequences": 8, "micro_sequences": 4})),
        ],
        place / "four",
    )


@pytest.fixture(scope="module")
def two(place: Path, prepared: Path, four: Met, one: Path) -> Met:
    """What two ranks met."""

    def tree(name: str, **sections: Any) -> dict[str, Any]:
        return settings(prepared, place / name, **sections)

    tree_sums = {"distributed": {"deterministic": True}}
    return play(
        2,
        [
            scene("fast-2", tree("fast-2")),
            scene("tree-2", tree("tree-2", **tree_sums)),
            scene("moved", tree("moved", **tree_sums), until=18),
            scene("nan", tree("nan"), fault=["nan", 1, 12]),
            scene("skipped", tree("skipped", non_finite={"policy": "skip"}), fault=["nan", 1, 12]),
            scene("rewound", tree("rewound", non_finite={"policy": "rewind"}), fault=["nan", 1, 12]),
            scene("skewed", tree("skewed"), fault=["skew", 1, 12]),
            scene("slow", tree("slow"), fault=["slow", 1, 2]),
            scene("unlike", tree("unlike"), fault=["seed", 1, 0]),
            *(scene(f"{name}-2", tuning(one, place / f"{name}-2", **sections)) for name, sections in TUNINGS.items()),
            scene("full", tree("full"), fault=["save", 0, 12]),  # the last: the disk stays full
        ],
        place / "two",
    )


@pytest.fixture(scope="module")
def one(place: Path, prepared: Path) -> Path:
    """Runs of this process alone."""
    tree_sums = {"distributed": {"deterministic": True}}
    for name, sections in {
        "fast-1": {},
        "tree-1": tree_sums,
        "dropout-1": {**tree_sums, "lowrank": {"lora_dropout": 0.2}},
    }.items():
        config = written(settings(prepared, place / name, **sections), place / f"{name}.yaml")
        assert call("pretrain", config, "--quiet").status == 0
    return place


def tuning(place: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A fine-tuning run of 6 steps from the model of `fast-1`, in a fixed order of sums."""
    records = place / "records.jsonl"
    if not records.exists():
        records.write_text(
            "".join(json.dumps({"instruction": f"Say {n}.", "output": f"{n}"}) + "\n" for n in range(12))
        )
        lines = (json.dumps({"text": f"{n} apples", "label": n % 2}) + "\n" for n in range(12))
        (place / "labels.jsonl").write_text("".join(lines))
    task = sections.pop("task", "instruct")
    return {
        "task": task,
        "output_dir": str(folder),
        "model": {"path": str(place / "fast-1" / "model")},
        "data": {"train": str(records if task == "instruct" else place / "labels.jsonl"), "validation_share": 0.4},
        "schedule": {"total_steps": 6},
        "batch": {"sequences": 4, "micro_sequences": 1},
        "precision": {"dtype": "fp32"},
        "log": {"trackers": []},
        "samples": {"examples": 0},
        "distributed": {"deterministic": True, "timeout_seconds": 20},
        **sections,
    }


TUNINGS: dict[str, dict[str, Any]] = {
    "nf4": {"lowrank": {"r": 4, "base": "nf4", "lora_dropout": 0.1}},
    "prompts": {"method": "llama-adapter"},
    "classes": {"task": "classification", "lowrank": {"r": 4}},
}


@pytest.fixture(scope="module")
def tuned(one: Path, two: Met) -> Path:
    """Fine-tuning runs of this process alone, beside those of two ranks."""
    for name, sections in TUNINGS.items():
        config = written(tuning(one, one / f"{name}-1", **sections), one / f"{name}.yaml")
        ended = call("finetune", config, "--quiet")
        assert ended.status == 0, ended.err
    return one


@pytest.mark.parametrize("name", TUNINGS)
def test_fine_tuning_gives_the_same_bits(tuned: Path, name: str) -> None:
    alone, other = tensors_of(tuned / f"{name}-1", 6), tensors_of(tuned / f"{name}-2", 6)
    assert all(torch.equal(alone[key], other[key]) for key in alone | other)
    assert losses(tuned / f"{name}-1") == losses(tuned / f"{name}-2")


def losses(folder: Path) -> list[float]:
    """Held-out losses measured in training; the final one is of other weights, since `worker` opens no base in fp32."""
    return [
        record["validation_loss"]
        for record in read_json_lines(folder / "metrics.jsonl")
        if record["kind"] == "evaluation"
    ]


def trained(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(folder / "metrics.jsonl") if record["kind"] == "train"]


def test_any_number_of_ranks_gives_the_same_run(one: Path, two: Met, four: Met) -> None:
    alone = tensors_of(one / "fast-1")
    for name in ("fast-2", "fast-4"):
        assert largest_difference(alone, tensors_of(one / name)) < TOLERANCE, name
        assert losses(one / name) == pytest.approx(losses(one / "fast-1"), abs=1e-4)
        assert [r["tokens"] for r in trained(one / name)] == [r["tokens"] for r in trained(one / "fast-1")]
    for met in (*two["fast-2"], *four["fast-4"]):
        assert met["steps"] == STEPS
    assert len({met["hash"] for met in four["fast-4"]}) == len({met["hash"] for met in two["fast-2"]}) == 1


def test_a_fixed_order_gives_the_same_bits_on_any_number_of_ranks(one: Path, two: Met, four: Met) -> None:
    alone = tensors_of(one / "tree-1")
    for name in ("tree-2", "tree-4"):
        other = tensors_of(one / name)
        assert all(torch.equal(alone[key], other[key]) for key in alone | other), name
        assert losses(one / name) == losses(one / "tree-1")  # the held-out loss, too


def test_dropout_draws_the_same_on_any_number_of_ranks(one: Path, four: Met) -> None:
    alone, other = tensors_of(one / "dropout-1"), tensors_of(one / "dropout-4")
    assert all(torch.equal(alone[key], other[key]) for key in alone | other)


def test_a_run_continues_on_other_numbers_of_ranks(one: Path, prepared: Path, two: Met, four: Met) -> None:
    """Four ranks, then two, one and three, in every phase of it; to the bits of the run of one process."""
    assert [met["steps"] for met in (*four["moved"], *two["moved"])] == [12] * 4 + [18] * 2
    config = written(
        settings(prepared, one / "moved", distributed={"deterministic": True, "timeout_seconds": 20}),
        one / "moved.yaml",
    )
    assert call("pretrain", config, "--quiet", "--until", 27).status == 0
    last = torchrun(3, "-m", "relora", "pretrain", config, "--strict", "--quiet")
    said = last.communicate()[0]
    assert last.returncode == 0, said
    alone, other = tensors_of(one / "tree-1"), tensors_of(one / "moved")
    assert all(torch.equal(alone[key], other[key]) for key in alone | other)
    assert (one / "moved" / "model" / "config.json").is_file()


def test_only_what_trains_travels(one: Path, two: Met) -> None:
    """In every step 4 bytes for each number that trains, and for each tensor of it; after the switch far fewer."""
    totals = [record["reduced_bytes"] for record in trained(one / "fast-2")]
    sent = [now - before for before, now in zip([0, *totals], totals, strict=False)]
    tensors = tensors_of(one / "fast-2")
    weights = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    factors = {name for name in weights if name.rpartition(".")[2] in ("lora_A", "lora_B")}
    matrices = {name.rpartition(".")[0] + ".weight" for name in factors}
    full, low = set(weights) - factors, set(weights) - matrices

    def expected(names: set[str]) -> int:
        return 4 * (sum(weights[name].numel() for name in names) + len(names))

    assert sent == [expected(full)] * 8 + [expected(low)] * (STEPS - 8)


@pytest.mark.parametrize("name", ["nan", "skewed", "full"])
def test_a_fault_of_one_rank_ends_all(two: Met, name: str) -> None:
    assert all(met["status"] == 3 for met in two[name]), two[name]
    assert all(met["seconds"] < 60 for met in two[name])
    silent = [met for met in two[name] if met["error"] == "PeerFailed"]
    assert len(silent) == 1, two[name]  # the other one says it


def test_a_nan_of_one_rank_is_named(two: Met) -> None:
    line = two["nan"][0]["line"]
    assert "step 12" in line and "rank 1" in line and "batch 12" in line, line


@pytest.mark.parametrize("name", ["skipped", "rewound"])
def test_all_ranks_answer_a_nan_alike(two: Met, one: Path, name: str) -> None:
    assert len({met["hash"] for met in two[name]}) == 1
    kinds = [record["kind"] for record in read_json_lines(one / name / "metrics.jsonl")]
    assert kinds.count({"skipped": "skipped", "rewound": "rewind"}[name]) == 1


def test_a_rank_that_drifts_is_found_before_anything_is_saved(two: Met, one: Path) -> None:
    line = two["skewed"][0]["line"]
    assert "rank 1" in line and "at step 17" in line and ".weight" in line, line
    assert max(path.name for path in (one / "skewed" / "checkpoints").iterdir()) == "step-00000010"


def test_a_slow_rank_is_named(two: Met, one: Path) -> None:
    last = trained(one / "slow")[-1]
    assert last["ranks"] == 2 and last["slowest_rank"] == 1
    assert last["own_seconds_max"] > last["own_seconds_min"] and last["data_seconds_max"] >= 0.15
    assert last["peak_memory_bytes"] >= last["peak_memory_bytes_min"] > 0


def test_more_ranks_than_work_is_refused(four: Met, one: Path) -> None:
    for name, word in (("few", "batch.sequences"), ("few-parts", "batch.micro_sequences")):
        assert [met["error"] for met in four[name]] == ["UserError", *["PeerFailed"] * 3], four[name]
        assert word in four[name][0]["line"] and four[name][0]["status"] == 2
        assert not (one / name).exists()


def test_a_killed_rank_is_started_again_by_the_launcher(place: Path, prepared: Path, one: Path) -> None:
    """SIGKILL after the first checkpoint: the run goes on from there by itself, to the same bits."""
    folder = place / "killed"
    tree = settings(prepared, folder, distributed={"deterministic": True, "timeout_seconds": 20})
    process = torchrun(2, "-m", "relora", "pretrain", written(tree, place / "killed.yaml"), "--quiet", restarts=2)
    while process.poll() is None and not (folder / "checkpoints" / "step-00000010").is_dir():
        time.sleep(0.01)
    child = process_of(process.pid, 1)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    alone, other = tensors_of(one / "tree-1"), tensors_of(folder)
    assert all(torch.equal(alone[key], other[key]) for key in alone | other)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, ("RANK", "torchrun")),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, ("MASTER_ADDR",)),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ("WORLD_SIZE", "two")),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ("RANK", "2")),
    ],
)
def test_a_missing_variable_is_named(
    variables: dict[str, str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = call("pretrain", written({}, tmp_path / "config.yaml"))
    assert ended.complaint(2, *words) is None, ended


def test_only_rank_0_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    ended = call("pretrain", written({}, tmp_path / "config.yaml"))
    assert (ended.status, ended.err, ended.out) == (2, "", "")


def test_different_configurations_are_refused_once(two: Met, place: Path) -> None:
    """Each rank has its own seed: rank 0 alone says so, and nothing is written."""
    first, second = two["unlike"]
    assert (first["error"], first["status"]) == ("UserError", 2) and "seed: 0 on rank 0, 1 on rank 1" in first["line"]
    assert (second["error"], second["status"]) == ("PeerFailed", 2)
    assert not (place / "unlike").exists()


def test_prepare_and_compare_use_rank_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "text.txt").write_text("word " * 100)
    ended = call("prepare", tmp_path / "text.txt", "--out", tmp_path / "out", "--train-tokenizer", 300)
    assert (ended.status, ended.out, ended.err) == (0, "", "") and not (tmp_path / "out").exists()
    assert call("compare", tmp_path / "none.yaml").status == 0  # it is not even read
