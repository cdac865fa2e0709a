"""Fine-tuning runs: what each method trains and leaves, continued to the same bytes, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from relora.adapters.save_load import load_adapter
from relora.config import FinetuneConfig, parse_finetune_config
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.measure import evaluate
from relora.model import open_model
from relora.model.classifier import open_classifier
from relora.model.load import build_model
from relora.model.save import save_model
from relora.planning.examples import show_examples
from relora.recipes import finetune as recipe
from relora.recipes.finetune import finetune
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.report.metrics import read_json_lines

Configure = Callable[..., FinetuneConfig]
TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}
WORDS = ("old house", "garden wall", "small boat", "kind word", "long road", "red door", "warm fire", "new day")


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def base(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with the tokenizer of the prepared folder, untrained."""
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = build_model("llama-9m", shape, seed=0, eos_token_id=tokenizer.eos_token_id)
    return save_model(model, tmp_path_factory.mktemp("base") / "model", tokenizer)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests to repeat words: 64 records in Alpaca's columns."""
    file = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    records = [
        {"instruction": f"Say {WORDS[n % 8]} and {WORDS[n // 8]}.", "output": f"{WORDS[n % 8]}, {WORDS[n // 8]}"}
        for n in range(64)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def configure(base: Path, examples: Path, tmp_path: Path) -> Configure:
    """A run of 8 steps; overrides by dotted key."""

    def build(name: str = "run", **overrides: object) -> FinetuneConfig:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "task": "instruct",
            "model": {"path": str(base)},
            "data": {
                "train": str(examples),
                "validation_share": 0.2,
                "template": "plain",
                "sequence_length": 48,
            },
            "lowrank": {"r": 4, "lora_alpha": 8},
            "prompts": {"length": 4},
            "restart": {"every_steps": 3, "warmup_steps": 1},
            "schedule": {"total_steps": 8, "warmup_steps": 1},
            "optimizer": {"lr": 1e-2, "lowrank_lr": 2e-2},
            "batch": {"sequences": 8, "micro_sequences": 4},
            "checkpoint": {"every_steps": 3},
            "evaluate": {"every_steps": 4},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"examples": 1, "max_new_tokens": 4},
        }
        for key, value in overrides.items():
            section, _, last = key.rpartition("__")
            target = tree.setdefault(section, {}) if section else tree
            target[last] = value
        return parse_finetune_config(tree)

    return build


VARIANTS: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {"lowrank__dora": True},
    "pissa": {"lowrank__init": "pissa"},
    "gradient-svd": {"lowrank__init": "gradient-svd"},
    "patterns": {"lowrank__rank_pattern": {"mlp.*": 2}, "lowrank__trained_modules": ["norm"], "lowrank__rslora": True},
    "packed": {"data__packing": True, "batch__sequences": 4},
    "relora": {"method": "relora"},
    "adaptive": {"method": "relora", "restart__adaptive": True, "restart__rank_share": 0.01},
    "full": {"method": "full"},
    "llama-adapter": {"method": "llama-adapter"},
}


def held_out(folder: Path) -> list[float]:
    return [r["validation_loss"] for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == "evaluation"]


def without_times(folder: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in record.items() if key not in TIMINGS}
        for record in read_json_lines(folder / "metrics.jsonl")
    ]


def result(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of what a run left."""
    files = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    assert len(files) == 1
    return load_file(files[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_learns_and_is_continued_to_the_same_bytes(
    configure: Configure, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = VARIANTS[variant]
    whole = finetune(configure("whole", **overrides), quiet=True).folder
    losses = held_out(whole)
    assert losses[-1] < losses[0]

    job_of = recipe.job_of

    def killed(*arguments: Any) -> Any:
        job = job_of(*arguments)
        batch_at = job.task.batch_at

        def batch(number: int) -> Any:
            if number == 5:
                raise Killed
            return batch_at(number)

        return dataclasses.replace(job, task=dataclasses.replace(job.task, batch_at=batch))

    config = configure("killed", **overrides)
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "job_of", killed)
        with pytest.raises(Killed):
            finetune(config, quiet=True)
    folder = finetune(config, quiet=True).folder
    assert without_times(folder) == without_times(whole)
    ours, theirs = result(folder), result(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_leaves_an_adapter_that_peft_reads_and_nothing_of_the_base(configure: Configure, base: Path) -> None:
    config = configure()
    found = finetune(config, quiet=True)
    assert not (found.folder / "model").exists()
    names = {file.name for file in (found.folder / "checkpoints").rglob("*.safetensors")}
    assert names == {"weights.safetensors", "optimizer.safetensors"}
    for file in (found.folder / "checkpoints").rglob("weights.safetensors"):
        assert all("lora_" in name or name.endswith("inv_freq") for name in load_file(file))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found.folder / "adapter")
    parts = gather_finetuning(config)
    assert evaluate(model, parts.held_out).loss == pytest.approx(found.evaluation.loss, abs=1e-5)


def test_pissa_leaves_an_adapter_of_the_original_base(configure: Configure, base: Path) -> None:
    config = configure(lowrank__init="pissa")
    found = finetune(config, quiet=True)
    model = open_model(base)
    load_adapter(model, found.folder / "adapter")
    assert evaluate(model, gather_finetuning(config).held_out).loss == pytest.approx(found.evaluation.loss, abs=1e-5)


def test_relora_leaves_a_model_whose_update_has_more_than_the_rank_of_its_factors(
    configure: Configure, base: Path
) -> None:
    found = finetune(configure(method="relora"), quiet=True)
    name = "model.layers.0.mlp.up_proj.weight"
    update = load_file(found.folder / "model" / "model.safetensors")[name] - load_file(base / "model.safetensors")[name]
    singular = torch.linalg.svdvals(update.double())
    assert int((singular > 1e-3 * singular[0]).sum()) > 4
    assert len(read_json_lines(found.folder / "restarts.jsonl")) == 2


def test_a_quantized_base_is_trained_on(configure: Configure) -> None:
    found = finetune(configure(lowrank__base="nf4"), quiet=True)
    losses = held_out(found.folder)
    assert losses[-1] < losses[0]


def test_another_base_is_refused(configure: Configure, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = configure(model__path=str(other), schedule__total_steps=4)
    finetune(config, quiet=True)
    model = open_model(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    shutil.rmtree(other)
    save_model(model, other, AutoTokenizer.from_pretrained(base))
    with pytest.raises(UserError, match=r"model\.path: its weights are others"):
        finetune(configure(model__path=str(other)), quiet=True)


def test_a_run_folder_is_a_base(configure: Configure) -> None:
    first = finetune(configure("first", method="full"), quiet=True)
    second = finetune(configure("second", model__path=str(first.folder)), quiet=True)
    assert second.evaluation.loss < first.evaluation.loss


def test_answers_to_held_out_prompts_are_kept(configure: Configure) -> None:
    folder = finetune(configure(), quiet=True).folder
    (sample,) = json.loads((folder / "samples.json").read_text())
    assert sample["prompt"].startswith("Say ") and ", " in sample["reference"]
    assert (folder / "report.html").is_file()


def test_examples_are_shown_with_what_is_scored(configure: Configure) -> None:
    shown = show_examples(configure(), 2)
    assert "layout alpaca" in shown and shown.count("⟦") == 2 and "Say " in shown


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_classifier_learns_and_opens_in_transformers(
    configure: Configure, tmp_path: Path, base: Path, method: str
) -> None:
    file = tmp_path / "classes.csv"
    rows = [
        f"{'the good house' if n % 2 else 'a bad boat'} {WORDS[n % 8]},{'good' if n % 2 else 'bad'}" for n in range(64)
    ]
    file.write_text("sentence,label\n" + "\n".join(rows) + "\n")
    overrides = {"data__train": str(file), "schedule__total_steps": 20, "optimizer__lr": 5e-3}
    found = finetune(configure(task="classification", method=method, **overrides), quiet=True)
    assert found.evaluation.scores["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(found.folder / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    drawn = open_classifier(base, ("bad", "good"), pad_token_id=0, seed=0).score.weight
    assert not torch.equal(model.score.weight, drawn)  # its head is new, so it trains beside factors, too


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__layout": "dolly"}, "layout dolly also needs `response`"),
        ({"data__train": "absent.jsonl"}, r"absent\.jsonl"),
        ({"model__path": "absent"}, "absent"),
        ({"data__template": "chat"}, "no chat template"),
        ({"batch__sequences": 128}, r"one batch needs 128"),
        ({"schedule__warmup_steps": 9}, r"schedule\.warmup_steps \(9\) must be shorter than the run \(8 steps\)"),
        ({"lowrank__target_modules": ["nothing"]}, "nothing"),
        ({"data__sequence_length": 4096}, "4,096"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    configure: Configure, overrides: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        finetune(configure(**overrides), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_is_not_read_of_the_sources_is_noted(configure: Configure, examples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "TRAIN.JSONL").write_text(examples.read_text() + "\nbroken\n")
    (folder / "licence.txt").write_text("do as you like")
    config = configure(data__train=str(folder), data__skip_bad=True)
    expected = [f"{folder}: not read: 1 .txt (14 bytes); ", "left out: 1 bad records (1 not valid JSON)"]
    for notes in (gather_finetuning(config).notes, show_examples(config, 1).splitlines()):
        assert [note[: len(start)] for note, start in zip(notes, expected, strict=False)] == expected


def test_separators_part_the_completions_of_a_text_file(configure: Configure, tmp_path: Path) -> None:
    text = "".join(f"Say {word}.\n<|endoftext|>\n" for word in WORDS * 8)
    (tmp_path / "texts.txt").write_text(text + "the end")
    config = configure(data__train=str(tmp_path / "texts.txt"))
    inputs = gather_finetuning(config)
    assert inputs.notes[0] == "documents parted at 64 separators (`<|endoftext|>`)"
    assert len(inputs.batches.examples) + len(inputs.held_out_records) == 65


def test_what_is_not_used_of_the_records_is_noted_and_shown(configure: Configure, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Say so."}, {"role": "assistant", "content": "So.", "weight": 0}]
    turns += [{"role": "user", "content": "Again."}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": turns, "number": number} for number in range(40)]
    (tmp_path / "chats.json").write_text(json.dumps({"data": rows}, indent=1))
    config = configure(data__train=str(tmp_path / "chats.json"))
    train = len(gather_finetuning(config).batches.examples)
    for notes, number in ((gather_finetuning(config).notes, train), (show_examples(config, 2).splitlines(), 2)):
        assert f"not used: column `number` ({number} records)" in notes
        for what in (
            "records read from the list under `data` of a file",
            "responses seen and not scored, by their `weight`, `train` or `loss`, or since they stand in the prompt",
        ):
            assert any(note.startswith(f"{what}: {number}, first in") for note in notes)
    assert show_examples(config, 1).count("⟦") == 1


@pytest.mark.parametrize("mark", [-1, "-1"])
def test_labels_of_minus_one_are_left_out_before_the_split_and_that_is_noted_and_shown(
    configure: Configure, tmp_path: Path, mark: object
) -> None:
    rows = [{"text": f"it is {number}", "label": number % 2 if number % 9 == 0 else mark} for number in range(360)]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = configure(
        task="classification", data__train=str(tmp_path / "c.jsonl"), data__validation_share=0.05, batch__sequences=4
    )
    inputs = gather_finetuning(config)
    assert inputs.model.config.id2label == {0: "0", 1: "1"}
    assert len(inputs.batches.examples) == 38 and len(inputs.held_out.examples) == 2
    what = "records left out, without a label (-1, which is no class beside labels from 0 on; "
    for notes in (inputs.notes, show_examples(config, 1).splitlines()):
        assert sum(note.startswith(what) and ": 320, first in" in note for note in notes) == 1
    kept = gather_finetuning(config.model_copy(update={"data": config.data.model_copy(update={"unlabelled": ()})}))
    assert kept.model.config.id2label == {0: "-1", 1: "0", 2: "1"}


def test_classes_that_the_held_out_part_lacks_are_named(configure: Configure, tmp_path: Path) -> None:
    rows = [{"text": f"it is {number}", "label": "rare" if number < 2 else "often"} for number in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = configure(task="classification", data__train=str(tmp_path / "c.jsonl"), data__validation_share=0.05)
    assert (
        "held out: no example of 1 of 2 classes (`rare`); raise data.validation_share, or give data.validation"
    ) in gather_finetuning(config).notes
