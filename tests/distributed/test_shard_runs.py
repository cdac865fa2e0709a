"""Runs whose model is sharded over 2, 3 and 4 real processes: the run of one process, and its checkpoints."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.command import call
from tests.distributed.launched import STEPS, largest_difference, play, settings, tensors_of, torchrun, written
from tests.faults.mounted import Disk, can_mount
from tests.faults.ranks import steps_of

from relora.data.tokenizer import load_tokenizer
from relora.model.load import build_model
from relora.model.save import save_model
from relora.report.metrics import read_json_lines
from relora.train.checkpoint import Checkpoints

WORKER = Path(__file__).with_name("shard_worker.py")
TOLERANCE = 2e-5
"""Of a weight after 30 steps: only the order of sums differs. Runs of other seeds differ by 1e-1."""
COARSE = 5e-3
"""The same with frozen products or weights in few bits: a last bit of an input may move a code by one."""

Met = dict[str, list[dict[str, Any]]]

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper": {
        "restart": {"init": "kaiming", "retain": 0.0},
        "optimizer": {"factors": "adamw"},
        "lowrank": {"residual": {"scale": 1.0, "every_steps": 2}},
    },
    "bf16": {"lowrank": {"base": "bf16"}, "restart": {"directions": "gradient-svd"}},
    "int8": {
        "lowrank": {"base": "int8"},
        "precision": {"dtype": "fp32", "frozen": "int8"},
        "memory": {"activation_checkpointing": "full"},
    },
}
"""Kinds of pretraining, each run by one process and by two that share the model; `paper` has a residual, too."""
EXACT = {"plain", "paper"}
TUNED = {"lora": {}, "lora-int8": {"base": "int8"}, "lora-nf4": {"base": "nf4"}}
"""Bases of LoRA fine-tuning, likewise."""
SHARD = {"distributed": {"strategy": "shard"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def model(place: Path, prepared: Path) -> Path:
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return save_model(
        build_model("llama-9m", shape, seed=0, eos_token_id=tokenizer.eos_token_id), place / "base", tokenizer
    )


@pytest.fixture(scope="module")
def examples(place: Path) -> Path:
    records = [{"instruction": f"Say {n} and {n + 1}.", "output": f"{n}, {n + 1}"} for n in range(32)]
    (place / "examples.jsonl").write_text("\n".join(map(json.dumps, records)))
    return place / "examples.jsonl"


def tuning(model: Path, examples: Path, folder: Path, lowrank: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "task": "instruct",
        "model": {"path": str(model)},
        "data": {"train": str(examples), "validation_share": 0.25, "template": "plain", "sequence_length": 48},
        "method": "lora",
        "lowrank": {"r": 4, "lora_alpha": 8, **lowrank},
        "schedule": {"total_steps": 6},
        "optimizer": {"lr": 1e-2},
        "batch": {"sequences": 6, "micro_sequences": 2},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 6},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"examples": 1, "max_new_tokens": 2},
        **sections,
    }


def scene(name: str, tree: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "tree": tree, **more}


@pytest.fixture(scope="module")
def four(place: Path, prepared: Path) -> Met:
    """What four ranks met: the first part of a run, and one whose model is shared by two of them each."""
    trees = {
        "moved": settings(prepared, place / "moved", **SHARD),
        "hybrid": settings(prepared, place / "hybrid", distributed={"strategy": "hybrid"}),
        "one-machine": settings(prepared, place / "one-machine", distributed={"strategy": "hybrid"}),
    }
    scenes = [
        scene("moved", trees["moved"], until=12),
        scene("hybrid", trees["hybrid"], machines=2),
        scene("one-machine", trees["one-machine"]),
        scene("skewed", settings(prepared, place / "skewed", distributed={"strategy": "hybrid"}), machines=2, skew=12),
    ]
    return play(4, scenes, place / "four", worker=WORKER)


@pytest.fixture(scope="module")
def two(place: Path, prepared: Path, model: Path, examples: Path, four: Met) -> Met:
    """What two ranks met."""
    scenes = [
        scene(f"{name}-2", settings(prepared, place / f"{name}-2", **{**sections, **SHARD}))
        for name, sections in METHODS.items()
    ]
    scenes += [
        scene(f"{name}-2", tuning(model, examples, place / f"{name}-2", lowrank, **SHARD))
        for name, lowrank in TUNED.items()
    ]
    scenes += [
        scene("moved", settings(prepared, place / "moved", distributed={"strategy": "replicate"}), until=18),
        scene("8-bit", settings(prepared, place / "8-bit", optimizer={"name": "adamw-8bit"}, **SHARD)),
    ]
    return play(2, scenes, place / "two", worker=WORKER)


@pytest.fixture(scope="module")
def one(place: Path, prepared: Path, model: Path, examples: Path) -> Path:
    """The runs of this process alone."""
    for name, sections in METHODS.items():
        config = written(settings(prepared, place / f"{name}-1", **sections), place / f"{name}.yaml")
        assert call("pretrain", config, "--quiet").status == 0
    for name, lowrank in TUNED.items():
        config = written(tuning(model, examples, place / f"{name}-1", lowrank), place / f"{name}.yaml")
        assert call("finetune", config, "--quiet").status == 0
    return place


def held_out(folder: Path) -> list[float]:
    records = read_json_lines(folder / "metrics.jsonl")
    return [record["validation_loss"] for record in records if "validation_loss" in record]


@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_run_is_the_run_of_one_process(one: Path, two: Met, name: str) -> None:
    tolerance = TOLERANCE if name in EXACT else COARSE
    assert [met.get("steps") for met in two[f"{name}-2"]] == [STEPS] * 2, two[f"{name}-2"]
    assert largest_difference(tensors_of(one / f"{name}-1"), tensors_of(one / f"{name}-2")) < tolerance
    assert held_out(one / f"{name}-2") == pytest.approx(held_out(one / f"{name}-1"), abs=tolerance)
    shapes = {key: tensor.shape for key, tensor in tensors_of(one / f"{name}-1").items()}
    assert shapes == {key: tensor.shape for key, tensor in tensors_of(one / f"{name}-2").items()}


def test_each_rank_holds_its_own_rows(two: Met, one: Path) -> None:
    whole = sum(tensor.nbytes for name, tensor in load_file(one / "plain-1/model/model.safetensors").items())
    for met in two["plain-2"]:
        assert met["bytes"] < 0.6 * whole


@pytest.mark.parametrize("name", ["plain", "int8"])
def test_the_model_that_is_left_is_whole(one: Path, two: Met, name: str) -> None:
    alone, shared = (load_file(one / f"{name}-{ranks}/model/model.safetensors") for ranks in (1, 2))
    tolerance = TOLERANCE if name in EXACT else COARSE
    assert largest_difference(alone, shared) < tolerance
    assert (one / f"{name}-2/samples.json").read_text() == (one / f"{name}-1/samples.json").read_text()
    assert not list((one / f"{name}-2").glob(".whole-*"))


@pytest.mark.parametrize("name", TUNED)
def test_sharded_fine_tuning_leaves_the_same_adapter(one: Path, two: Met, name: str) -> None:
    assert [met.get("steps") for met in two[f"{name}-2"]] == [6] * 2, two[f"{name}-2"]
    alone, shared = (load_file(one / f"{name}-{ranks}/adapter/adapter_model.safetensors") for ranks in (1, 2))
    assert largest_difference(alone, shared) < (TOLERANCE if name == "lora" else COARSE)
    assert held_out(one / f"{name}-2") == pytest.approx(held_out(one / f"{name}-1"), abs=1e-4)


def test_a_run_goes_on_under_other_strategies(one: Path, prepared: Path, four: Met, two: Met) -> None:
    """Sharded by four, then whole on two, on one, and sharded by three: the run of one process; then its export."""
    assert [met.get("steps") for met in (*four["moved"], *two["moved"])] == [12] * 4 + [18] * 2
    config = written(settings(prepared, one / "moved"), one / "moved.yaml")
    assert call("pretrain", config, "--quiet", "--until", 21).status == 0
    arguments = ("distributed.strategy=shard", "--quiet")
    last = torchrun(3, "-m", "relora", "pretrain", config, *arguments)
    said = last.communicate()[0]
    assert last.returncode == 0, said
    assert largest_difference(tensors_of(one / "plain-1"), tensors_of(one / "moved")) < TOLERANCE
    assert len(list((one / "moved/checkpoints/step-00000030").glob("weights-*-of-00003.safetensors"))) == 3
    assert call("export", one / "moved", "--checkpoint", STEPS, "--out", one / "exported").status == 0
    exported, left = (load_file(one / name / "model.safetensors") for name in ("exported", "moved/model"))
    assert largest_difference(exported, left) < TOLERANCE


def test_machines_hold_replicas_whose_ranks_share_one(one: Path, four: Met) -> None:
    assert [met.get("steps") for met in four["hybrid"]] == [STEPS] * 4, four["hybrid"]
    assert largest_difference(tensors_of(one / "plain-1"), tensors_of(one / "hybrid")) < TOLERANCE
    assert len(list((one / "hybrid/checkpoints/step-00000030").glob("weights-*"))) == 2


def test_a_part_that_differs_between_two_copies_is_found(four: Met) -> None:
    lines = [met["line"] for met in four["skewed"] if met["error"] != "PeerFailed"]
    assert len(lines) == 1 and "rank 3 has another" in lines[0] and "down_proj.weight" in lines[0], four["skewed"]
    assert "step 17" in lines[0]


def test_what_cannot_be_shared_is_refused_once(four: Met, two: Met, place: Path) -> None:
    for met, words in ((four["one-machine"], ("hybrid", "machines")), (two["8-bit"], ("adamw-8bit", "shard"))):
        assert [one["error"] for one in met] == ["UserError", *["PeerFailed"] * (len(met) - 1)]
        assert all(word in met[0]["line"] for word in words) and met[0]["status"] == 2
    assert not (place / "one-machine").exists() and not (place / "8-bit").exists()


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_rank_file_that_is_not_as_it_was_takes_the_checkpoint_along(two: Met, one: Path, harm: str) -> None:
    folder = one / f"harmed-{harm}"
    shutil.copytree(one / "plain-2" / "checkpoints", folder)
    file = folder / "step-00000030" / "optimizer-00002-of-00002.safetensors"
    if harm == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    found, broken = Checkpoints(folder).latest()
    assert found is not None and found.step == 20
    assert len(broken) == 1 and file.name in broken[0]


@pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")
def test_a_disk_that_fills_up_ends_both_ranks_in_one_line(tmp_path: Path, prepared: Path, one: Path) -> None:
    """Rank 1 waits in a collective operation of the sharded model when rank 0 cannot write."""
    with Disk(tmp_path, 2**26) as disk:
        folder = disk.path / "filled"
        config = written(settings(prepared, folder), tmp_path / "filled.yaml")
        process = torchrun(2, "-m", "relora", "pretrain", config, "distributed.strategy=shard", "--quiet")
        while process.poll() is None and steps_of(folder) < 12:
            time.sleep(0.01)
        disk.fill()
        said = process.communicate()[0]
        lines = [line for line in said.splitlines() if line.startswith("relora: ")]
        assert len(lines) == 1 and "No space left on device" in lines[0], said
        assert process.returncode
        found, broken = Checkpoints(folder / "checkpoints").latest()
        assert found is not None and found.step == 10 and not broken
        (disk.path / "filler").unlink()
        assert call("pretrain", config, "--quiet").status == 0
        assert largest_difference(tensors_of(one / "plain-1"), tensors_of(folder)) < TOLERANCE


def test_a_kill_while_one_rank_saves_leaves_the_checkpoint_before(place: Path, prepared: Path, one: Path) -> None:
    tree = settings(prepared, place / "killed", **SHARD)
    (place / "kill").mkdir()
    (place / "kill" / "scenes.json").write_text(json.dumps([scene("killed", tree, die=20)]))
    process = torchrun(2, WORKER, place / "kill", restarts=0)
    process.communicate()
    assert process.returncode
    found, broken = Checkpoints(place / "killed" / "checkpoints").latest()
    assert found is not None and found.step == 10 and not broken
    tree["distributed"]["strategy"] = "replicate"
    assert call("pretrain", written(tree, place / "killed.yaml"), "--quiet").status == 0
    assert largest_difference(tensors_of(one / "plain-1"), tensors_of(place / "killed")) < TOLERANCE
    assert torch.isfinite(torch.tensor(held_out(place / "killed"))).all()
