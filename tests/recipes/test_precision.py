"""`precision.dtype: auto`: what it takes on which device, and that a run goes on with what it began with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relora.config import FinetuneConfig, RunConfig, load_config, parse_config, parse_finetune_config, to_yaml
from relora.lowrank.calibrate import rates_file
from relora.planning.doctor import diagnose
from relora.planning.plan import make_plan
from relora.planning.timetable import timetable_of
from relora.recipes import precision
from relora.recipes.finetune import finetune
from relora.recipes.precision import auto_on, bf16_shares, settle_dtype, settle_dtype_of_run, with_dtype
from relora.recipes.pretrain import pretrain
from relora.train.checkpoint import Checkpoints

CPU = torch.device("cpu")
Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path, prepared: Path) -> Configure:
    """A run of six steps; sections by name, `precision` with a default dtype."""

    def build(folder: str = "run", **sections: Any) -> RunConfig:
        tree = {
            "output_dir": str(tmp_path / folder),
            "device": "cpu",
            "model": {
                "preset": "llama-9m",
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
            },
            "data": {
                "train": str(prepared / "train"),
                "validation": str(prepared / "validation"),
                "sequence_length": 32,
            },
            "lowrank": {"r": 4},
            "warm_start": {"steps": 2},
            "restart": {"every_steps": 2, "warmup_steps": 1},
            "schedule": {"total_steps": 6, "warmup_steps": 1},
            "batch": {"sequences": 8, "micro_sequences": 8},
            "checkpoint": {"every_steps": 2},
            "evaluate": {"tokens": 64},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"prompts": []},
        }
        return parse_config(tree | sections)

    return build


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Give this processor instructions for bf16, and kept figures of them."""
    file = rates_file(CPU, kind="bf16")

    def give(*shares: float) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"tokens": precision._TOKENS, "sides": precision._SIDES, "shares": shares}
        file.write_text(json.dumps(kept))

    yield give
    file.unlink(missing_ok=True)


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the instructions for bf16 from this processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})


def wide(side: int) -> Callable[[], nn.Module]:
    """A model of one wide layer; its norm has a weight, too, which is no matrix."""
    return lambda: nn.Sequential(nn.Linear(side, side, device="meta"), nn.LayerNorm(side, device="meta"))


def not_asked() -> nn.Module:
    raise AssertionError("the model was opened where its shapes decide nothing")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


# What is taken where


@pytest.mark.usefixtures("without_bf16")
def test_a_processor_without_bf16_takes_fp32_at_once(configure: Configure) -> None:
    config, line = settle_dtype(configure(), CPU, not_asked)
    assert config == with_dtype(configure(), "fp32")
    assert line == "precision.dtype: auto takes fp32 (this processor has no instructions for bf16)"
    assert auto_on(CPU) == "fp32 (this processor has no instructions for bf16)"


@pytest.mark.parametrize(
    ("shares", "side", "taken", "share"),
    [
        ((0.9, 0.5, 0.5, 0.4), 1024, "bf16-mixed", "0.40"),
        ((0.9, 0.5, 0.5, 0.4), 4096, "bf16-mixed", "0.40"),  # wider than what was measured; 2,048 tokens
        ((0.9, 0.5, 0.5, 0.4), 192, "bf16-mixed", "0.70"),  # between two measured sides
        ((0.9, 0.5, 0.5, 0.4), 128, "fp32", "0.90"),
        ((0.1, 0.1, 0.1, 0.1), 64, "fp32", "1.00"),  # narrower than what was measured
        ((0.81, 0.81, 0.81, 0.81), 1024, "fp32", "0.81"),
        ((0.8, 0.8, 0.8, 0.8), 1024, "bf16-mixed", "0.80"),
        ((3.0, 3.0, 3.0, 3.0), 1024, "fp32", "3.00"),  # instructions that are slow, as in a virtual machine
    ],
)
def test_a_processor_with_bf16_takes_what_was_measured_to_be_faster_at_the_shapes_of_the_model(
    configure: Configure, with_bf16: Callable[..., None], shares: tuple[float, ...], side: int, taken: str, share: str
) -> None:
    with_bf16(*shares)
    wide_batch = configure(batch={"sequences": 64, "micro_sequences": 64})
    config, line = settle_dtype(wide_batch, CPU, wide(side))
    assert config.precision.dtype == taken
    assert line == (
        f"precision.dtype: auto takes {taken} (in bf16-mixed the layers of this model take {share} of the time of fp32 "
        "here)"
    )
    assert "0.80 at" in auto_on(CPU) or str(shares[0]) in auto_on(CPU)


def test_few_tokens_are_a_narrow_side(configure: Configure, with_bf16: Callable[..., None]) -> None:
    with_bf16(0.9, 0.5, 0.5, 0.4)
    few = configure(batch={"sequences": 4, "micro_sequences": 4})  # 128 tokens
    assert settle_dtype(few, CPU, wide(1024))[0].precision.dtype == "fp32"


def test_layers_count_by_their_operations(configure: Configure, with_bf16: Callable[..., None]) -> None:
    with_bf16(1.0, 1.0, 1.0, 0.5)
    batch = configure(batch={"sequences": 64, "micro_sequences": 64})

    def taken(narrow_layers: int) -> str:
        narrow = [nn.Linear(1024, 512, device="meta") for _ in range(narrow_layers)]
        model = nn.Sequential(nn.Linear(1024, 1024, device="meta"), *narrow)
        return settle_dtype(batch, CPU, lambda: model)[0].precision.dtype

    assert taken(1) == "bf16-mixed"  # (1 * 0.5 + 0.5 * 1.0) / 1.5 = 0.67
    assert taken(4) == "fp32"  # (1 * 0.5 + 2 * 1.0) / 3 = 0.83


@pytest.mark.parametrize(("capability", "has_bf16"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_a_gpu_takes_bf16_if_it_has_it(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_bf16: bool
) -> None:
    """Of the GPU, torch's own answers are stood in for; what a real one answers was not run here."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, line = settle_dtype(configure(), cuda, not_asked)
    assert config.precision.dtype == ("bf16-mixed" if has_bf16 else "fp32")
    assert line.endswith("(NVIDIA H100 multiplies in bf16)" if has_bf16 else "(NVIDIA H100 has no bf16)")


def test_other_devices_take_fp32(configure: Configure) -> None:
    assert settle_dtype(configure(), torch.device("mps"), not_asked)[0].precision.dtype == "fp32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-mixed"])
def test_a_named_dtype_stays(configure: Configure, with_bf16: Callable[..., None], dtype: str) -> None:
    with_bf16(0.4, 0.4, 0.4, 0.4)
    config = configure(precision={"dtype": dtype})
    assert settle_dtype(config, CPU, not_asked) == (config, "")


def test_frozen_products_in_fp32_leave_nothing_to_choose(configure: Configure, with_bf16: Callable[..., None]) -> None:
    with_bf16(0.4, 0.4, 0.4, 0.4)
    config, line = settle_dtype(configure(precision={"frozen": "fp32"}), CPU, not_asked)
    assert config.precision.dtype == "fp32" and line.endswith("(as precision.frozen)")


def test_the_shares_are_measured_once_and_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_SIDES", (16, 32))
    before = torch.random.get_rng_state()
    with torch.no_grad():  # in which runs are prepared
        first = bf16_shares(CPU, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(first) == len(precision._SIDES) and all(share > 0 for share in first)
    assert bf16_shares(CPU, tmp_path) == first
    (file,) = tmp_path.iterdir()
    for damaged in ("", "[]", "{}", '{"shares": [1]}', file.read_text().replace("512", "5")):
        file.write_text(damaged)
        assert precision._read(file) is None
    again = bf16_shares(CPU, tmp_path)
    assert again == precision._read(file) != first


# What a run does with it


@pytest.mark.usefixtures("without_bf16")
def test_where_auto_takes_fp32_a_run_has_the_bits_of_fp32(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    auto, named = configure("auto"), configure("named", precision={"dtype": "fp32"})
    pretrain(auto)
    said = capsys.readouterr().out + capsys.readouterr().err
    pretrain(named, quiet=True)
    assert losses(Path(auto.output_dir)) == losses(Path(named.output_dir))
    weights = [(Path(one.output_dir) / "model" / "model.safetensors").read_bytes() for one in (auto, named)]
    assert weights[0] == weights[1]
    assert said.count("precision.dtype: auto takes fp32") == 1
    assert load_config(Path(auto.output_dir) / "config.yaml").precision.dtype == "fp32"
    (settings,) = {json.dumps(one.manifest.settings["dtype"]) for one in opened(auto)}
    assert settings == '"fp32"'


def opened(config: RunConfig) -> list[Any]:
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints")
    return [checkpoints.open(step) for step in checkpoints.steps()]


def test_a_run_goes_on_with_what_it_began_with_on_whatever_machine(
    configure: Configure,
    with_bf16: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It begins where bf16 is faster, is stopped, and goes on where it is not: as if it had never been stopped."""
    monkeypatch.setattr(precision, "_SIDES", (8, 16, 24, 32))  # that the layers of a tiny model are wide enough
    with_bf16(0.4, 0.4, 0.4, 0.4)
    through = configure("through")
    pretrain(through, quiet=True)
    stopped = configure("stopped")
    pretrain(stopped, quiet=True, until=3)
    assert load_config(Path(stopped.output_dir) / "config.yaml").precision.dtype == "bf16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    capsys.readouterr()
    pretrain(stopped)
    captured = capsys.readouterr()
    assert "auto takes bf16-mixed (with which this run began)" in captured.out + captured.err
    assert losses(Path(stopped.output_dir)) == losses(Path(through.output_dir))
    fp32 = configure("fp32", precision={"dtype": "fp32"})
    pretrain(fp32, quiet=True)
    assert losses(Path(fp32.output_dir)) != losses(Path(through.output_dir))
    pretrain(stopped, quiet=True, fresh=True)  # now it begins here
    assert losses(Path(stopped.output_dir)) == losses(Path(fp32.output_dir))


def test_a_run_killed_before_its_first_checkpoint_begins_again_as_before(
    configure: Configure, with_bf16: Callable[..., None]
) -> None:
    with_bf16(0.4, 0.4, 0.4, 0.4)
    folder = Path(configure().output_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(configure(precision={"dtype": "fp32"})))
    for fresh, taken in ((False, "fp32"), (True, "bf16-mixed")):
        config, _ = settle_dtype_of_run(
            configure(batch={"sequences": 64, "micro_sequences": 64}), CPU, wide(1024)(), fresh=fresh
        )
        assert config.precision.dtype == taken


def test_a_folder_that_names_no_dtype_is_of_a_version_that_had_fp32(
    configure: Configure, with_bf16: Callable[..., None]
) -> None:
    config = configure()
    named = with_dtype(config, "fp32")
    pretrain(named, quiet=True, until=3)
    file = Path(config.output_dir) / "config.yaml"
    assert "  dtype: fp32\n" in file.read_text()
    file.write_text(file.read_text().replace("  dtype: fp32\n", ""))
    with_bf16(0.4, 0.4, 0.4, 0.4)
    assert settle_dtype_of_run(config, CPU, wide(1024)(), fresh=False)[0] == named
    pretrain(config, quiet=True)
    whole = configure("whole", precision={"dtype": "fp32"})
    pretrain(whole, quiet=True)
    assert losses(Path(config.output_dir)) == losses(Path(whole.output_dir))


@pytest.mark.usefixtures("without_bf16")
def test_what_reads_a_configuration_before_a_run_says_what_it_takes(configure: Configure) -> None:
    config, line = configure(), "precision.dtype: auto takes fp32 (this processor has no instructions for bf16)"
    assert timetable_of(config).notes.count(line) == make_plan(config, alternatives=False).notes.count(line) == 1
    named = with_dtype(config, "fp32")
    assert line not in timetable_of(named).notes
    assert diagnose().auto.startswith("fp32")


def test_a_plan_reckons_with_what_the_run_will_take(configure: Configure, with_bf16: Callable[..., None]) -> None:
    shape = {"preset": "llama-9m", "vocab_size": 512, "num_hidden_layers": 1}
    of = {"model": shape, "batch": {"sequences": 8, "micro_sequences": 8}, "data": configure().data.model_dump()}
    with_bf16(0.4, 0.4, 0.4, 0.4)

    def memory(dtype: str) -> list[dict[str, int]]:
        plan = make_plan(configure(**of, precision={"dtype": dtype}), alternatives=False)
        return [phase.figures.memory for phase in plan.phases]

    assert memory("auto") == memory("bf16-mixed") != memory("fp32")


def test_finetuning_takes_it_too(
    configure: Configure, tmp_path: Path, with_bf16: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_SIDES", (8, 16, 24, 32))
    base = configure("base", precision={"dtype": "fp32"})
    pretrain(base, quiet=True)
    records = [{"instruction": f"Count to {number}.", "output": "one two three"} for number in range(12)]
    (tmp_path / "records.json").write_text(json.dumps(records))

    def tuned(folder: str, **sections: Any) -> FinetuneConfig:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "task": "instruct",
            "method": "lora",
            "device": "cpu",
            "model": {"path": str(Path(base.output_dir) / "model")},
            "data": {"train": str(tmp_path / "records.json"), "validation_share": 0.2, "sequence_length": 128},
            "batch": {"sequences": 4, "micro_sequences": 4},
            "lowrank": {"r": 4},
            "schedule": {"total_steps": 2},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"examples": 0},
        }
        return parse_finetune_config(tree | sections)

    with_bf16(0.4, 0.4, 0.4, 0.4)
    for folder, sections in (("auto", {}), ("mixed", {"precision": {"dtype": "bf16-mixed"}})):
        finetune(tuned(folder, **sections), quiet=True)
    assert losses(tmp_path / "auto") == losses(tmp_path / "mixed")
    assert "dtype: bf16-mixed" in (tmp_path / "auto" / "config.yaml").read_text()
