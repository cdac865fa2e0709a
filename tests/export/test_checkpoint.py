"""A GGUF file from a run, from one of its checkpoints, and from a model folder."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file, save_file

from relora.config import parse_config
from relora.errors import UserError
from relora.export.checkpoint import export, export_gguf
from relora.recipes.pretrain import pretrain


def settings(prepared: Path, output: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Six steps, with checkpoints of steps 4 (factors not merged yet) and 6, and the model of the end."""
    return {
        "output_dir": str(output),
        "model": model,
        "data": {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 32},
        "lowrank": {"r": 2, "lora_alpha": 2},
        "warm_start": {"steps": 2},
        "restart": {"every_steps": 3, "warmup_steps": 1},
        "schedule": {"total_steps": 6, "warmup_steps": 1},
        "batch": {"sequences": 2, "micro_sequences": 2},
        "checkpoint": {"every_steps": 2},
        "evaluate": {"tokens": 100},
        "log": {"trackers": []},
        "samples": {"prompts": []},
    }


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `settings` from a new model."""
    model = {"preset": "llama-9m", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1}
    output = tmp_path_factory.mktemp("export") / "run"
    return pretrain(parse_config(settings(prepared, output, model)), quiet=True).folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_of_a_run_its_model(run: Path) -> None:
    before = names(run)
    file = export_gguf(run)
    assert file == run / "model-fp32.gguf" and names(run) == before | {file.name}
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} == {"F32"}
    with pytest.raises(UserError, match="exists and was left as it is"):
        export_gguf(run)
    file.unlink()


def test_a_checkpoint_is_merged_first(run: Path, tmp_path: Path) -> None:
    before = names(run)
    last = export_gguf(run, step=6)
    assert last == run / "model-6-fp32.gguf" and names(run) == before | {last.name}
    assert last.read_bytes() == export_gguf(run, out=tmp_path / "a.gguf").read_bytes()
    last.unlink()
    earlier = export_gguf(run, step=4, out=tmp_path / "b.gguf")
    folder = export(run, step=4, out=tmp_path / "at-4")
    assert earlier.read_bytes() == export_gguf(folder, out=tmp_path / "c.gguf").read_bytes()
    assert earlier.read_bytes() != (tmp_path / "a.gguf").read_bytes()
    assert names(tmp_path) == {"a.gguf", "b.gguf", "c.gguf", "at-4"}


def test_a_run_without_a_model_gives_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model")))
    file = export_gguf(unfinished, dtype="bf16")
    assert file == unfinished / "model-bf16.gguf"
    assert file.read_bytes() == export_gguf(run, out=tmp_path / "a.gguf", dtype="bf16").read_bytes()


def test_a_model_folder_gets_a_file_beside_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(run / "model", tmp_path / "small"))
    assert export_gguf(folder, dtype="fp16") == tmp_path / "small-fp16.gguf"
    monkeypatch.chdir(folder)
    assert export_gguf(".", dtype="bf16") == tmp_path / "small-bf16.gguf"
    assert names(folder) == names(run / "model")


def test_mistakes_leave_nothing(run: Path, tmp_path: Path) -> None:
    before = {path: names(path) for path in (run, tmp_path)}
    model = run / "model"
    with pytest.raises(UserError, match=r"--checkpoint 4: .* is not a run folder"):
        export_gguf(model, step=4, out=tmp_path / "a.gguf")
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 4, 6"):
        export_gguf(run, step=5, out=tmp_path / "a.gguf")
    with pytest.raises(UserError, match="`q4_0` is none of fp32, fp16, bf16, q8_0"):
        export_gguf(run, dtype="q4_0")
    with pytest.raises(UserError, match="not a model folder"):
        export_gguf(tmp_path, out=tmp_path / "a.gguf")
    assert {path: names(path) for path in (run, tmp_path)} == before


@pytest.mark.parametrize(
    ("result", "remedy"),
    [
        ("adapter", "relora adapters merge .*/adapter --out MODEL"),
        ("model", "its model is .*/model"),
        (None, "finish it"),
    ],
)
def test_of_a_fine_tuning_run_the_line_says_where_its_result_is(
    result: str | None, remedy: str, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.yaml").write_text("output_dir: x\ntask: instruct\nmodel: {path: y}\ndata: {train: z.jsonl}\n")
    if result:
        (tuned / result).mkdir()
    with pytest.raises(UserError, match=f"a fine-tuning run.*{remedy}"):
        export(tuned, out=tmp_path / "out")
    if result != "model":  # of one that has a model, a GGUF file is written
        with pytest.raises(UserError, match=f"a fine-tuning run.*{remedy}"):
            export_gguf(tuned, out=tmp_path / "out.gguf")
    assert names(tmp_path) == {"tuned"}


def test_prompts_of_llama_adapter_are_not_sent_to_be_merged(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    (tuned / "adapter").mkdir(parents=True)
    (tuned / "config.yaml").write_text("output_dir: x\ntask: instruct\nmodel: {path: y}\ndata: {train: z.jsonl}\n")
    (tuned / "adapter" / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    with pytest.raises(UserError, match="its prompts are used beside their base"):
        export(tuned)


def test_a_weight_beyond_fp16_is_refused_in_each_format(run: Path, prepared: Path, tmp_path: Path) -> None:
    """A model folder and a GGUF file alike: the weight is named, nothing is written, and bf16 holds it."""
    large = Path(shutil.copytree(run / "model", tmp_path / "large"))
    weights = load_file(large / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    config = settings(prepared, tmp_path / "run", {"path": str(large)})
    folder = pretrain(parse_config(config), quiet=True).folder
    before = names(tmp_path)
    line = r"mlp\.down_proj\.weight holds (100000|99999.*), which float16 cannot hold .*65,504\); nothing was.*bf16"
    with pytest.raises(UserError, match=line):
        export(folder, out=tmp_path / "half", dtype="fp16")
    with pytest.raises(UserError, match=r"not all of its numbers are finite in fp16 \(the largest is .*\).* try bf16"):
        export_gguf(folder, out=tmp_path / "half.gguf", dtype="fp16")
    assert names(tmp_path) == before
    for dtype in ("bf16", "fp32"):
        saved = load_file(export(folder, out=tmp_path / dtype, dtype=dtype) / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())
