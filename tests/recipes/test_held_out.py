"""Held-out figures of a run: in training of a keyed sample; of the result on the whole, as its evaluation gives it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import AutoModelForSequenceClassification

from relora.config import FinetuneConfig, RunConfig, parse_config, parse_finetune_config
from relora.data.finetuning.classification import HeldOutClasses
from relora.data.finetuning.examples import HeldOutExamples
from relora.data.pretraining.shards import PreparedFolder
from relora.data.tokenizer import load_tokenizer
from relora.evaluation.classification import evaluate_classes
from relora.evaluation.instructions import evaluate_instructions
from relora.evaluation.perplexity import evaluate_model
from relora.measure import Evaluation
from relora.model.load import build_model
from relora.model.save import save_model
from relora.recipes import finetune as finetune_recipe
from relora.recipes.finetune import finetune
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.recipes.job import RunResult
from relora.recipes.pretrain import pretrain
from relora.recipes.pretraining_inputs import gather_pretraining
from relora.report.console import Console
from relora.report.metrics import read_json_lines

WORDS = ("old house", "garden wall", "small boat", "kind word", "long road", "red door", "warm fire", "new day")
TINY = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
EQUAL = 1e-6
COMMON: dict[str, Any] = {
    "lowrank": {"r": 4, "lora_alpha": 8},
    "batch": {"sequences": 8, "micro_sequences": 4},
    "evaluate": {"every_steps": 3, "tokens": 200},
    "log": {"every_steps": 1, "trackers": []},
}


def with_overrides(tree: dict[str, Any], overrides: dict[str, object]) -> dict[str, Any]:
    """The tree with values for dotted keys; sections are copied."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in overrides.items():
        section, _, last = key.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    return tree


@pytest.fixture
def pretraining(prepared: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of 6 steps with a restart before step 4."""

    def build(name: str = "run", **overrides: object) -> RunConfig:
        data = {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 32}
        tree = COMMON | {
            "output_dir": str(tmp_path / name),
            "model": {"preset": "llama-9m", **TINY},
            "data": data,
            "warm_start": {"steps": 2},
            "restart": {"every_steps": 2, "warmup_steps": 1},
            "schedule": {"total_steps": 6, "warmup_steps": 1},
            "optimizer": {"lr": 5e-3},
            "checkpoint": {"every_steps": 2},
            "samples": {"prompts": ["The"], "max_new_tokens": 2},
        }
        return parse_config(with_overrides(tree, overrides))

    return build


@pytest.fixture(scope="module")
def base(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    model = build_model("llama-9m", TINY, seed=0, eos_token_id=tokenizer.eos_token_id)
    return save_model(model, tmp_path_factory.mktemp("base") / "model", tokenizer)


def write_records(file: Path, numbers: range) -> str:
    records = [
        {
            "instruction": f"Say {WORDS[n % 8]} and {WORDS[n // 8 % 8]}.",
            "output": ", ".join(WORDS[n % 8 : n % 8 + n % 5 + 1]),
        }
        for n in numbers
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


@pytest.fixture
def finetuning(base: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """A run of 6 steps on instructions; sequences are so short that some examples are cut."""

    def build(name: str = "run", **overrides: object) -> FinetuneConfig:
        data = {
            "train": write_records(tmp_path / "train.jsonl", range(64)),
            "validation": write_records(tmp_path / "validation.jsonl", range(64, 128)),
            "template": "plain",
            "sequence_length": 30,
        }
        tree = COMMON | {
            "output_dir": str(tmp_path / name),
            "task": "instruct",
            "model": {"path": str(base)},
            "data": data,
            "restart": {"every_steps": 3, "warmup_steps": 1},
            "schedule": {"total_steps": 6, "warmup_steps": 1},
            "optimizer": {"lr": 1e-2, "lowrank_lr": 2e-2},
            "checkpoint": {"every_steps": 2},
            "samples": {"examples": 1, "max_new_tokens": 2},
        }
        return parse_finetune_config(with_overrides(tree, overrides))

    return build


def lines(result: RunResult, kind: str) -> list[dict[str, Any]]:
    return [dict(line) for line in read_json_lines(result.folder / "metrics.jsonl") if line["kind"] == kind]


def check_records(result: RunResult, whole: int) -> None:
    """Every measurement in training is labelled as a sample; the last record is that of the result on the whole."""
    measured = lines(result, "evaluation")
    assert {(line["sample"], line["whole_tokens"]) for line in measured} == {(True, whole)}
    assert len({line["validation_tokens"] for line in measured}) == 1 and measured[0]["validation_tokens"] < whole
    [final] = lines(result, "final")
    assert read_json_lines(result.folder / "metrics.jsonl")[-1] == final
    assert (final["sample"], final["validation_tokens"], final["whole_tokens"]) == (False, whole, whole)
    assert (final["step"], final["validation_loss"]) == (result.steps, result.evaluation.loss)
    assert result.evaluation.tokens == whole and result.evaluation.whole_tokens is None


PRETRAINING: dict[str, dict[str, object]] = {
    "relora": {},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "bf16": {"precision__dtype": "bf16"},
    "bf16-mixed": {"precision__dtype": "bf16-mixed", "batch__micro_sequences": 2},
    "int8": {"precision__frozen": "int8", "lowrank__base": "int8"},
}


@pytest.mark.parametrize("variant", PRETRAINING)
def test_the_final_figure_of_pretraining_is_that_of_evaluate(
    pretraining: Callable[..., RunConfig], variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(**PRETRAINING[variant])
    result = pretrain(config)
    [score] = evaluate_model(result.folder, [config.data.validation])
    found = result.evaluation
    assert found.tokens == score.tokens == PreparedFolder.open(config.data.validation).tokens - 1
    assert found.tokens % 32, "the last window is a short one"
    for figure in ("loss", "perplexity", "bits_per_byte"):
        assert getattr(found, figure) == pytest.approx(getattr(score, figure), rel=EQUAL), figure
    check_records(result, score.tokens)
    said = capsys.readouterr().out
    assert f"held-out perplexity {score.perplexity:.2f} on all {score.tokens:,} tokens; model in" in said
    assert f"(sample of 192 of {score.tokens:,} tokens, " in said
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert f"<b>{score.perplexity:,.2f}</b> (all {score.tokens:,} tokens)" in page and "held-out (sample)" in page


FINETUNING: dict[str, dict[str, object]] = {
    "lora": {},
    "lora-bf16": {"precision__dtype": "bf16"},
    "qlora": {"lowrank__base": "nf4"},
    "pissa": {"lowrank__init": "pissa"},
    "dora": {"lowrank__dora": True, "lowrank__trained_modules": ["norm"]},
    "relora": {"method": "relora"},
    "full": {"method": "full", "precision__dtype": "bf16-mixed"},
    "llama-adapter": {"method": "llama-adapter"},
}


@pytest.mark.parametrize("variant", FINETUNING)
def test_the_final_figure_of_fine_tuning_is_that_of_evaluate(
    finetuning: Callable[..., FinetuneConfig], variant: str
) -> None:
    config = finetuning(**FINETUNING[variant])
    result = finetune(config, quiet=True)
    scores = evaluate_instructions(result.folder, str(config.data.validation), max_new_tokens=1)
    assert scores.cut > 0, "some examples fill their sequence"
    assert result.evaluation.loss == pytest.approx(scores.loss, rel=EQUAL)
    assert result.evaluation.tokens == scores.response_tokens
    check_records(result, scores.response_tokens)


def test_without_memory_for_the_fp32_base_the_figure_is_of_the_base_as_trained(
    finetuning: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = finetune(finetuning("exact", lowrank__base="nf4"))
    told = capsys.readouterr().out
    assert "the adapter is measured on its base in fp32; the figures above are of the base as it was trained on" in told
    assert "warning" not in told
    monkeypatch.setattr(finetune_recipe, "free_memory_bytes", lambda device: 1000)
    result = finetune(finetuning(lowrank__base="nf4"), quiet=True)
    assert "warning: the held-out figure is that of the base as it was trained on" in capsys.readouterr().out
    assert result.evaluation.tokens == exact.evaluation.tokens
    assert result.evaluation.loss != exact.evaluation.loss
    assert result.evaluation.loss == pytest.approx(exact.evaluation.loss, rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_final_figure_of_a_classifier_is_that_of_its_model(
    finetuning: Callable[..., FinetuneConfig], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{'the good' if n % 3 else 'a bad'} {WORDS[n % 8]},{'good' if n % 3 else 'bad'}" for n in range(120)]
    for name, part in (("train", rows[:64]), ("validation", rows[64:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["sentence,label", *part]) + "\n")
    files = {f"data__{name}": str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    config = finetuning(task="classification", method=method, precision__dtype="bf16-mixed", **files)
    result = finetune(config)
    held_out = gather_finetuning(config).held_out
    assert isinstance(held_out, HeldOutClasses)
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "model")
    score = evaluate_classes(model, HeldOutClasses(held_out.examples, sequences=8))
    assert score.examples == 56
    assert result.evaluation.loss == pytest.approx(score.loss, rel=EQUAL)
    assert result.evaluation.scores["accuracy"] == score.accuracy
    check_records(result, 56)
    assert lines(result, "final")[0]["accuracy"] == score.accuracy
    said = capsys.readouterr().out
    assert "on all 56 examples; " in said and " of 56 examples, " in said


def test_a_held_out_part_that_fits_is_the_whole_and_labelled_so(
    pretraining: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    result = pretrain(pretraining(evaluate__tokens=1_000_000))
    measured = lines(result, "evaluation")
    whole = result.evaluation.tokens
    assert {(line["sample"], line["validation_tokens"], line["whole_tokens"]) for line in measured} == {
        (False, whole, whole)
    }
    assert measured[-1]["validation_loss"] == pytest.approx(result.evaluation.loss, rel=EQUAL)
    assert f"(all {whole:,} tokens, " in capsys.readouterr().out
    assert "(sample)" not in (result.folder / "report.html").read_text(encoding="utf-8")


def test_the_sample_is_the_same_for_other_micro_batches_and_another_for_another_seed(
    pretraining: Callable[..., RunConfig], finetuning: Callable[..., FinetuneConfig]
) -> None:
    def measured(config: RunConfig | FinetuneConfig) -> Evaluation:
        inputs: Any = gather_pretraining(config) if isinstance(config, RunConfig) else gather_finetuning(config)
        return inputs.evaluate(config, inputs.model, lambda: None)

    for build in (pretraining, finetuning):
        one, other = (measured(build(batch__micro_sequences=size, precision__dtype="fp32")) for size in (1, 8))
        assert (one.tokens, one.whole_tokens) == (other.tokens, other.whole_tokens)
        assert one.loss == pytest.approx(other.loss, rel=EQUAL)
    inputs = [gather_pretraining(pretraining(seed=seed)).held_out for seed in (0, 1)]
    first, second = ({tuple(row) for batch in one for row in batch.input_ids.tolist()} for one in inputs)
    assert first != second
    examples = [gather_finetuning(finetuning(seed=seed)).held_out for seed in (0, 1)]
    assert all(isinstance(one, HeldOutExamples) for one in examples)
    assert len({tuple(sorted(example.where for example in one.examples)) for one in examples}) == 2


def test_a_continued_run_measures_the_same_sample_and_the_same_end(pretraining: Callable[..., RunConfig]) -> None:
    def figures(result: RunResult) -> list[tuple[Any, ...]]:
        keys = ("kind", "step", "validation_loss", "validation_tokens", "whole_tokens")
        return [tuple(line[key] for key in keys) for line in lines(result, "evaluation") + lines(result, "final")]

    whole = pretrain(pretraining("whole"), quiet=True)
    pretrain(pretraining("parts", schedule__total_steps=6), quiet=True)
    for checkpoint in (whole.folder.parent / "parts" / "checkpoints").glob("step-0000000[56]"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    continued = pretrain(pretraining("parts"), quiet=True)
    assert figures(continued) == figures(whole)
    again = pretrain(pretraining("parts"), quiet=True)  # trains nothing, and measures once more
    assert figures(again) == figures(whole)


def test_losses_around_a_restart_are_of_the_sample(pretraining: Callable[..., RunConfig]) -> None:
    result = pretrain(pretraining(), quiet=True)
    [restart] = read_json_lines(result.folder / "restarts.jsonl")
    before = next(line for line in lines(result, "evaluation") if line["step"] == restart["step"])
    assert restart["loss_before"] == before["validation_loss"]
    assert restart["loss_after"] == pytest.approx(restart["loss_before"], abs=1e-5)


def test_a_run_interrupted_while_its_result_is_measured_is_finished_by_the_same_command(
    pretraining: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(pretraining("whole"), quiet=True)

    def pressed(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Console, "measuring", pressed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(pretraining(), quiet=True)
    folder = Path(pretraining().output_dir)
    assert (folder / "model" / "config.json").is_file() and not (folder / "report.html").exists()
    assert all(line["kind"] != "final" for line in read_json_lines(folder / "metrics.jsonl"))
    result = pretrain(pretraining(), quiet=True)
    assert result.evaluation == whole.evaluation
    check_records(result, whole.evaluation.tokens)
