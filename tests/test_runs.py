"""Whole runs on real text: losses pinned, killed at every step and continued to the same bytes, results that plain
transformers loads.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relora.config import RunConfig, parse_config
from relora.data.pretraining.shards import PreparedFolder
from relora.device import deterministic
from relora.errors import UserError
from relora.export.checkpoint import export
from relora.lowrank import low_rank_layers
from relora.lowrank.costs import NOMINAL_RATES
from relora.recipes.from_settings import settled_lowrank
from relora.recipes.job import assemble
from relora.recipes.pretrain import job_of, pretrain
from relora.recipes.pretraining_inputs import gather_pretraining
from relora.recipes.resume import Start
from relora.report.console import Console
from relora.report.metrics import read_json_lines
from relora.report.reporter import Reporter
from relora.runs.folder import claim, describe_run
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.run import Run, restore

TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}
"""What differs between two runs of the same numbers."""

Configure = Callable[..., RunConfig]


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def configure(prepared: Path, tmp_path: Path) -> Configure:
    """A run of 14 steps: warm start 4, restarts before steps 8 and 12; overrides by dotted key."""

    def build(name: str = "run", **overrides: object) -> RunConfig:
        tree: dict[str, object] = {
            "output_dir": str(tmp_path / name),
            "model": {
                "preset": "llama-9m",
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
            },
            "data": {
                "train": str(prepared / "train"),
                "validation": str(prepared / "validation"),
                "sequence_length": 32,
            },
            "method": "relora",
            "lowrank": {"r": 4, "lora_alpha": 4},
            "warm_start": {"steps": 4},
            "restart": {"every_steps": 4, "warmup_steps": 1},
            "schedule": {"total_steps": 14, "warmup_steps": 2},
            "optimizer": {"lr": 5e-3},
            "batch": {"sequences": 4, "micro_sequences": 2},
            "precision": {"dtype": "fp32"},
            "checkpoint": {"every_steps": 3},
            "evaluate": {"every_steps": 5, "tokens": 300},
            "log": {"every_steps": 2, "trackers": []},
            "samples": {"prompts": ["The"], "max_new_tokens": 4},
        }
        for key, value in overrides.items():
            section, _, last = key.rpartition("__")
            target = tree[section] if section else tree
            assert isinstance(target, dict)
            target[last] = value
        return parse_config(tree)

    return build


def execute(config: RunConfig, change: Callable[[Run], Run] = lambda run: run) -> Path:
    """As the recipe does up to the last step, with a hand on the run."""
    parts = gather_pretraining(config)
    with claim(config, fresh=False) as folder:
        describe_run(folder, config, 0)
        with (
            Reporter(folder, config.total_steps, [], Console(quiet=True)) as reporter,
            Checkpoints(folder / "checkpoints", config.checkpoint.keep_last) as checkpoints,
        ):
            lowrank = settled_lowrank(config, parts.model, parts.device, NOMINAL_RATES)
            run = change(assemble(job_of(config, parts), Start(None, lowrank, {}, []), reporter, checkpoints))
            with deterministic(parts.device):
                train(run, restore(run, checkpoints.latest()[0]))
    return folder


def killed_at(step: int) -> Callable[[Run], Run]:
    def change(run: Run) -> Run:
        def batch_at(t: int) -> object:
            if t == step:
                raise Killed
            return run.batch_at(t)

        return dataclasses.replace(run, batch_at=batch_at)

    return change


def figures(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_json_lines(folder / file)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    final = max((folder / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in final.glob("*.safetensors")}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"restart__optimizer": "random", "lowrank__lora_dropout": 0.1},
        {"method": "lora", "warm_start__steps": 0, "optimizer__lowrank_b_lr_ratio": 4.0},
        {"warm_start__steps": 0},
        {"precision__dtype": "bf16", "lowrank__trainable_scaling": True, "restart__optimizer": "magnitude"},
        {"precision__frozen": "int8"},
        {"precision__frozen": "int8", "lowrank__base": "int8", "lowrank__lora_dropout": 0.1},
        {
            "restart": {
                "every_steps": 4,
                "warmup_steps": 1,
                "ramp": "factors",
                "optimizer": "keep",
                "init": "balanced",
                "directions": "gradient-svd",
                "stagger": "layers",
                "turns": 2,
            },
            "lowrank__lora_dropout": 0.1,
        },
        {
            "restart": {
                "every_steps": 2,
                "growth": 2.0,
                "warmup_steps": 1,
                "until": 0.8,
                "optimizer": "project",
                "init": "weight-svd",
            }
        },
        {"restart": {"every_steps": 4, "warmup_steps": 0, "init": "balanced", "stagger": "ranks", "turns": 2}},
        {"lowrank__residual": {"scale": 0.5, "every_steps": 2}, "lowrank__lora_dropout": 0.1},
        {
            "warm_start": {"auto": True, "steps": 8, "window_steps": 1, "slope": 0.9, "energy": 0.1},
            "lowrank__ranks": "spectrum",
            "restart": {"every_steps": 2, "warmup_steps": 1, "adaptive": True, "slope": 0.0},
        },
        {
            "optimizer__factors": "muon",
            "optimizer__matrices": "muon",
            "warm_start": {"steps": 4, "takeover": True},
            "restart": {
                "every_steps": 3,
                "warmup_steps": 0,
                "init": "balanced",
                "optimizer": "project",
                "retain": 0.5,
            },
        },
    ],
    ids=[
        *("plain", "dropout", "lora", "no warm start", "bf16", "int8", "int8 alone"),
        *("balanced by layers", "projected, growing", "balanced by ranks", "residual", "adaptive", "muon"),
    ],
)
def test_killed_before_every_step_and_continued_gives_the_same_bytes(
    configure: Configure, variant: dict[str, object]
) -> None:
    whole = execute(configure("whole", **variant))
    for step in range(1, 14):
        config = configure(f"killed-{step}", **variant)
        with pytest.raises(Killed):
            execute(config, killed_at(step))
        folder = execute(config)
        assert bytes_of(folder) == bytes_of(whole), step
        for file in ("metrics.jsonl", "restarts.jsonl"):
            assert figures(folder, file) == figures(whole, file), step


def test_a_run_decides_by_what_it_sees_and_its_checkpoints_are_exported(configure: Configure) -> None:
    """Switched after two windows beyond the warm-up, with ranks of its own, and restarted when the update was full."""
    config = configure(
        warm_start={"auto": True, "steps": 10, "window_steps": 1, "slope": 0.9, "energy": 0.1},
        lowrank__ranks="spectrum",
        restart={"every_steps": 3, "warmup_steps": 1, "adaptive": True, "slope": 0.0, "rank_share": 0.1},
        variant="paper",  # balanced factors are full from the start
    )
    result = pretrain(config, quiet=True)
    [ranks] = [line["ranks"] for line in figures(result.folder) if line.get("of") == "ranks"]
    phases = {line["step"]: line["phase"] for line in figures(result.folder) if line["kind"] == "train"}
    assert (phases[4], phases[5]) == ("warm_start", "low_rank")
    assert [line["step"] for line in figures(result.folder, "restarts.jsonl")] == [7, 10, 13]
    assert isinstance(ranks, dict) and len(ranks) == 14 and len(set(ranks.values())) > 1
    exported = export(result.folder, step=14)
    assert (exported / "model.safetensors").read_bytes() == (result.folder / "model" / "model.safetensors").read_bytes()


def test_a_run_killed_again_and_again_arrives(configure: Configure) -> None:
    whole, config = execute(configure("whole")), configure("killed")
    for step in (2, 4, 7, 8, 8, 12, 13):
        with pytest.raises(Killed):
            execute(config, killed_at(step))
    assert bytes_of(execute(config)) == bytes_of(whole)
    assert figures(Path(config.output_dir)) == figures(Path(configure("whole").output_dir))


PINNED: dict[str, tuple[dict[str, object], list[float]]] = {
    "full": ({"method": "full"}, [6.24652, 6.21389, 6.07659, 5.99538, 5.86268, 5.78877, 5.76762]),
    "lora": (
        {"method": "lora", "optimizer__factors": "adamw"},
        [6.24652, 6.21389, 6.10846, 6.03966, 5.87785, 5.80627, 5.78854],
    ),
    "balanced": ({"optimizer__factors": "adamw"}, [6.24652, 6.21389, 6.10846, 6.02491, 5.91737, 5.87121, 5.84160]),
    "paper": ({"variant": "paper"}, [6.24652, 6.21389, 6.15578, 6.08083, 5.96636, 5.90534, 5.89415]),
    "default": ({}, [6.24652, 6.21389, 6.10846, 6.05033, 5.94795, 5.89257, 5.86592]),
}
"""Settings -> training loss at steps 2, 4 ... 14. A change that should not matter keeps them."""


@pytest.mark.parametrize("run", PINNED)
def test_pinned_losses(configure: Configure, run: str) -> None:
    settings, pinned = PINNED[run]
    folder = execute(configure(**settings))
    losses = [line["loss"] for line in figures(folder) if line["kind"] == "train" and line["step"] % 2 == 0]
    assert losses == pytest.approx(pinned, rel=1e-4)  # other processors sum in another order


def test_tokens_in_are_tokens_trained_on(configure: Configure) -> None:
    folder = execute(configure())
    lines = [line for line in figures(folder) if line["kind"] == "train"]
    assert [line["tokens"] for line in lines] == [line["step"] * 4 * 32 for line in lines]


def test_every_cycle_trains_every_layer(configure: Configure) -> None:
    """The published code wraps with A = B = 0 and loses its first cycle: here each cycle merges something in every
    layer.
    """
    folder = execute(configure())
    restarts = figures(folder, "restarts.jsonl")
    assert [line["step"] for line in restarts] == [8, 12]
    for line in restarts:
        assert len(line["layers"]) == 14 * 1 and all(layer["update_norm"] > 0 for layer in line["layers"])
        assert line["loss_after"] == pytest.approx(line["loss_before"], abs=1e-5)


def test_factors_train_in_the_first_cycle(configure: Configure) -> None:
    seen: list[bool] = []

    def change(run: Run) -> Run:
        def batch_at(t: int) -> object:
            if t == 7:
                seen.extend(bool(layer.delta().any()) for layer in low_rank_layers(run.model).values())
            return run.batch_at(t)

        return dataclasses.replace(run, batch_at=batch_at)

    execute(configure(), change)
    assert seen and all(seen)


LOADER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
total = tokens = 0
for window in json.load(open(sys.argv[2])):
    ids = torch.tensor(window)
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    tokens += len(ids) - 1
text = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=5, do_sample=False)
assert "relora" not in sys.modules
keys = list(model.state_dict())
found = {"loss": total / tokens, "tokens": tokens, "dtype": str(model.dtype)}
print(json.dumps(found | {"new": text.shape[1], "keys": keys}))
"""


@pytest.mark.parametrize("method", ["relora", "lora"])
def test_the_model_is_a_plain_one_of_the_same_perplexity(configure: Configure, tmp_path: Path, method: str) -> None:
    """On the whole held-out part, its short last window included; in training it is measured on a sample."""
    config = configure(method=method)
    result = pretrain(config, quiet=True)
    stream = PreparedFolder.open(config.data.validation)
    starts = range(0, stream.tokens - 1, 32)
    windows = [stream.window(start, min(33, stream.tokens - start)).tolist() for start in starts]
    (tmp_path / "windows.json").write_text(json.dumps(windows))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOADER,
        str(result.folder / "model"),
        str(tmp_path / "windows.json"),
    ]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert math.exp(printed["loss"]) == pytest.approx(result.evaluation.perplexity, rel=1e-4)
    assert printed["tokens"] == result.evaluation.tokens == stream.tokens - 1
    logged = figures(result.folder)[-1]
    assert (logged["kind"], logged["perplexity"]) == ("final", result.evaluation.perplexity)
    assert printed["dtype"] == "torch.float32" and not any("lora_" in key for key in printed["keys"])
    assert (result.folder / "report.html").stat().st_size > 100_000


def test_export_of_a_checkpoint_equals_the_final_model(configure: Configure) -> None:
    result = pretrain(configure(), quiet=True)
    exported = export(result.folder, step=14)
    assert (exported / "model.safetensors").read_bytes() == (result.folder / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 12, 14"):
        export(result.folder, step=5)


def test_another_run_in_the_folder_is_refused_and_fresh_moves_it_aside(configure: Configure) -> None:
    config = configure()
    folder = execute(config)
    before = bytes_of(folder)
    with pytest.raises(UserError, match=r"batch\.sequences \(4 there, 8 here\)"):
        pretrain(configure(batch__sequences=8), quiet=True)
    assert bytes_of(folder) == before
    execute(configure(log__every_steps=7))  # changes nothing that is trained
    with claim(config, fresh=True):
        assert not (folder / "checkpoints").exists() and bytes_of(folder.with_name("run.1")) == before


def test_a_damaged_checkpoint_is_passed_over(configure: Configure) -> None:
    folder = execute(configure())
    whole = bytes_of(folder)
    damaged = folder / "checkpoints" / "step-00000014" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    newest, broken = Checkpoints(folder / "checkpoints").latest()
    assert newest is not None and newest.step == 12 and "weights.safetensors" in broken[0]
    assert bytes_of(execute(configure())) == whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"data__train": "nowhere"}, "nowhere"),
        ({"model__max_position_embeddings": 16}, r"data\.sequence_length \(32\)"),
        ({"batch__sequences": 40_000}, "tokens"),
        ({"model__vocab_size": 100}, r"model\.vocab_size"),
        ({"lowrank__r": 33}, r"lowrank\.r \(33\)"),
        ({"lowrank__target_modules": ["nothing"]}, "'nothing' matches no linear layer"),
        ({"model__preset": "llama-8m"}, "llama-9m"),
        ({"device": "cuda:7"}, "cuda"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_refused_before_anything_is_created(configure: Configure, override: dict[str, object], message: str) -> None:
    config = configure(**override)
    with pytest.raises(UserError, match=message) as caught:
        pretrain(config, quiet=True)
    assert "\n" not in str(caught.value) and not Path(config.output_dir).exists()


def test_a_folder_of_something_else_is_not_touched(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        pretrain(configure(), quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
