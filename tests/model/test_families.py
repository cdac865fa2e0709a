"""Whole ReLoRA runs on other people's architectures: what comes out is again a plain model of the same family."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from relora.config import RunConfig, parse_config
from relora.data.pretraining.batches import HeldOut
from relora.data.pretraining.shards import PreparedFolder
from relora.measure import evaluate
from relora.recipes.job import RunResult
from relora.recipes.pretrain import pretrain
from relora.report.metrics import read_json_lines

SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
FAMILIES: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (LlamaConfig(**SHAPE, **ENDS, intermediate_size=64, num_key_value_heads=2), 7),
    "gpt_neox": (GPTNeoXConfig(**SHAPE, **ENDS, intermediate_size=64, tie_word_embeddings=False), 4),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=64, **ENDS), 4),
    "qwen2": (
        Qwen2Config(**SHAPE, **ENDS, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True),
        7,
    ),
}
"""A tiny configuration, and how many linear layers a block has."""

Configure = Callable[..., RunConfig]


def saved_model(family: str, folder: Path) -> Path:
    """Random weights of a family as `transformers` writes them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family][0]).save_pretrained(folder)
    return folder


@pytest.fixture
def configure(prepared: Path, tmp_path: Path) -> Configure:
    """Eight steps on the model in a folder: warm start 3, one restart before step 6."""

    def build(path: Path, name: str = "run", **changes: object) -> RunConfig:
        return parse_config(
            {
                "output_dir": str(tmp_path / name),
                "model": {"path": str(path)},
                "data": {
                    "train": str(prepared / "train"),
                    "validation": str(prepared / "validation"),
                    "sequence_length": 32,
                },
                "lowrank": {"r": 4, "lora_alpha": 8},
                "warm_start": {"steps": 3},
                "restart": {"every_steps": 3, "warmup_steps": 1},
                "schedule": {"total_steps": 8, "warmup_steps": 1},
                "optimizer": {"lr": 5e-3},
                "batch": {"sequences": 4, "micro_sequences": 4},
                "evaluate": {"tokens": 100_000},  # all there are
                "log": {"trackers": []},
                "samples": {"prompts": ["The"], "max_new_tokens": 4},
            }
            | changes
        )

    return build


def reopened(result: RunResult) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(result.folder / "model")


def perplexity(model: PreTrainedModel, config: RunConfig) -> float:
    """Perplexity of the model on the run's held-out tokens."""
    held_out = HeldOut(PreparedFolder.open(config.data.validation), 32, config.evaluate.tokens, 4)
    return evaluate(model, held_out).perplexity


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_a_plain_model_of_the_same_family(configure: Configure, tmp_path: Path, family: str) -> None:
    start = saved_model(family, tmp_path / "start")
    config = configure(start)
    result = pretrain(config, quiet=True)
    before = load_file(start / "model.safetensors")
    after = load_file(result.folder / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert not any("lora_" in name for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in after.values())

    settings, linear_layers = FAMILIES[family]
    [restart] = read_json_lines(result.folder / "restarts.jsonl")
    assert restart["step"] == 6 and len(restart["layers"]) == 2 * linear_layers
    for layer in restart["layers"]:
        assert layer["update_norm"] > 0
        assert not torch.equal(before[f"{layer['name']}.weight"], after[f"{layer['name']}.weight"])
    assert restart["loss_after"] == pytest.approx(restart["loss_before"], abs=1e-5)

    model = reopened(result)
    assert model.config.model_type == settings.model_type
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == settings.tie_word_embeddings == (family in ("gpt2", "qwen2"))
    assert perplexity(model, config) == pytest.approx(result.evaluation.perplexity, rel=1e-4)
    evaluations = [line for line in read_json_lines(result.folder / "metrics.jsonl") if line["kind"] == "evaluation"]
    first = AutoModelForCausalLM.from_pretrained(start)
    assert perplexity(first, config) == pytest.approx(evaluations[0]["perplexity"], rel=1e-4)
    assert result.evaluation.perplexity < evaluations[0]["perplexity"] * 0.95

    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    text = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert text.shape[1] <= tokenizer("The", return_tensors="pt").input_ids.shape[1] + 3


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_the_tie_holds_while_the_run_goes_on(configure: Configure, tmp_path: Path, family: str) -> None:
    """Embeddings and head are one tensor, trained as one: it is stored once, in checkpoints too."""
    result = pretrain(configure(saved_model(family, tmp_path / "start")), quiet=True)
    [checkpoint] = (result.folder / "checkpoints").iterdir()
    names = load_file(checkpoint / "weights.safetensors").keys()
    assert "lm_head.weight" not in names
    assert "lm_head.weight" not in load_file(result.folder / "model" / "model.safetensors")


def test_from_scratch_takes_the_architecture_alone(configure: Configure, tmp_path: Path) -> None:
    """Other weights than those in the folder, decided by the seed; shape keys may change."""
    start = saved_model("gpt_neox", tmp_path / "start")
    drawn = {"path": str(start), "from_scratch": True, "num_hidden_layers": 1}
    results = [
        pretrain(configure(start, name, model=drawn, seed=seed), quiet=True)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    first, again, other = [(result.folder / "model" / "model.safetensors").read_bytes() for result in results]
    assert first == again and first != other
    model = reopened(results[0])
    assert (model.config.model_type, model.config.num_hidden_layers) == ("gpt_neox", 1)
    evaluations = [
        line for line in read_json_lines(results[0].folder / "metrics.jsonl") if line["kind"] == "evaluation"
    ]
    assert evaluations[0]["perplexity"] == pytest.approx(512, rel=0.2)  # knows nothing of 512 ids
    trained = perplexity(AutoModelForCausalLM.from_pretrained(start), configure(start))
    assert not math.isclose(evaluations[0]["perplexity"], trained, rel_tol=1e-4)


def test_the_folder_that_was_opened_stays_as_it_was(configure: Configure, tmp_path: Path) -> None:
    start = saved_model("llama", tmp_path / "start")
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    pretrain(configure(start), quiet=True)
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_no_bit_of_a_run(configure: Configure, tmp_path: Path, family: str) -> None:
    """Across the switch, a restart, evaluations and the samples; gpt2 draws dropout."""
    start = saved_model(family, tmp_path / "start")
    models = []
    for kind in ("none", "selective", "full"):
        config = configure(start, kind, memory={"activation_checkpointing": kind})
        folder = pretrain(config, quiet=True).folder
        models.append((folder / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]
