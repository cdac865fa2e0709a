"""Cases that users met, through the real command on tiny models; each once failed or did something else in silence.

| what it shows | test that pins the right value |
|---|---|
| a class without SDPA opens with its own attention | here; `tests/model/test_attention.py` |
| a weight beyond fp16 is not written in it | `tests/export/test_checkpoint.py`, `tests/model/test_save.py` |
| a router with a forward pass of its own gets no factors | here; `tests/lowrank/test_targets.py` |
| a response of weight 0 is seen and not trained on | here; `tests/data/finetuning/test_messages.py` |
| tool calls are trained on or refused | here; `tests/data/finetuning/test_messages.py`, `test_chat_template.py` |
| a prompt has the ids that a model is asked with | `tests/data/finetuning/test_instruct.py` |
| what PEFT reads as the experts' is named | `tests/adapters/test_peft_reading.py` |
| a layer whose weight goes to fused kernels gets no factors | here; `tests/lowrank/test_usage.py` |
| a parallel block that adds in place is checkpointed | here; `tests/model/test_blocks.py` |
| a layer narrower than r is left out | here; `tests/lowrank/test_targets.py` |
| a layer whose weight is used directly is left out | here; `tests/lowrank/test_usage.py` |
| fused experts are named with what becomes of them | here; `tests/lowrank/test_targets.py` |
| an adapter of PEFT with factors on the head is merged | `tests/adapters/test_peft_kinds.py` |
| a label of -1 is no class beside those from 0 on | `tests/data/finetuning/test_labels.py`; `tests/recipes` |
| files with suffixes in capitals are read | `tests/data/test_sources.py` |
| separators part the documents of a text file | `tests/data/pretraining/test_prepare.py` |
| an object that holds a list of records is read | `tests/data/test_json_files.py` |
| tokens that were added to a tokenizer get rows and train | `tests/recipes/test_added_tokens.py` |
| another number of layers adapts lists of layers | here; `tests/model/test_shape.py` |
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.command import Ended, call
from tests.zoo.tiny_models import PREPARED, make_tiny_model

TINY = (
    *("lowrank.r=4", "lowrank.lora_alpha=8", "batch.sequences=4", "batch.micro_sequences=4", "log.trackers=[]"),
    *("schedule.total_steps=2", "device=cpu"),
)
EXPERTS = "get no factors: they "


def finetune(folder: Path, family: str, *settings: str, question: str = "What?") -> Ended:
    """Fine-tune a tiny model of a family for two steps on eight records."""
    make_tiny_model(family, folder / "model")
    records = [{"instruction": question, "output": f"It is {number}."} for number in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = folder / "run.yaml"
    config.write_text(
        f"task: instruct\noutput_dir: {folder / 'run'}\nmodel: {{path: {folder / 'model'}}}\n"
        "schedule: {epochs: null}\n"
        f"data: {{train: {folder / 'train.jsonl'}, template: plain, sequence_length: 96}}\n"
        "samples: {examples: 1, max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    return call("finetune", config, *TINY, *settings)


def pretrain(folder: Path, family: str, *settings: str) -> Ended:
    """Pretrain a tiny model of a family, with a switch before the last step."""
    if not (folder / "model").exists():
        make_tiny_model(family, folder / "model")
    config = folder / "run.yaml"
    config.write_text(
        f"output_dir: {folder / 'run'}\nmodel: {{path: {folder / 'model'}}}\n"
        f"data: {{train: {PREPARED / 'train'}, validation: {PREPARED / 'validation'}, sequence_length: 16}}\n"
        "warm_start: {steps: 1}\nrestart: {every_steps: 2}\n",
        encoding="utf-8",
    )
    return call("pretrain", config, *TINY, "schedule.warmup_steps=0", *settings)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt_neo", ""),  # without SDPA
        ("gemma2", ""),
        ("llama4_text", "has a forward pass of its own"),
        ("falcon_h1", "fused kernels take its weight and would pass its factors by"),
        ("qwen2_moe", "shared_expert_gate): r (4) exceeds its smaller side (1)"),
        ("gemma3n_text", "correction_coefs): the model uses its weight without calling it"),
        ("qwen3_moe", EXPERTS + "stay frozen"),
    ],
)
def test_the_defaults_train_and_say_which_layers_get_no_factors(tmp_path: Path, family: str, said: str) -> None:
    ended = finetune(tmp_path, family)
    assert ended.complaint(0) is None
    assert said in ended.out + ended.err and (tmp_path / "run" / "adapter").is_dir()


def test_experts_train_at_full_rank_in_pretraining_and_a_line_says_so(tmp_path: Path) -> None:
    ended = pretrain(tmp_path, "qwen3_moe")
    assert ended.complaint(0) is None and EXPERTS + "train at full rank" in ended.out + ended.err


@pytest.mark.parametrize("verb", [finetune, pretrain])
def test_a_parallel_block_that_adds_in_place_is_checkpointed(tmp_path: Path, verb: Callable[..., Ended]) -> None:
    assert verb(tmp_path, "falcon", "memory.activation_checkpointing=selective").complaint(0) is None


def test_another_number_of_layers_adapts_lists_of_layers(tmp_path: Path) -> None:
    config_path = make_tiny_model("smollm3", tmp_path / "model") / "config.json"
    four = {"num_hidden_layers": 4, "no_rope_layers": [1, 0] * 2, "layer_types": ["full_attention"] * 4}
    config_path.write_text(json.dumps(json.loads(config_path.read_text(encoding="utf-8")) | four), encoding="utf-8")
    ended = pretrain(tmp_path, "smollm3", "model.from_scratch=true", "model.num_hidden_layers=6")
    assert ended.complaint(0) is None
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == len(config["no_rope_layers"]) == len(config["layer_types"]) == 6
    assert config["no_rope_layers"] == [1, 0] * 3


@pytest.mark.parametrize("family", ["gptj", "gpt2", "mpt"])
def test_a_held_out_prompt_longer_than_the_model_gets_no_answer(tmp_path: Path, family: str) -> None:
    ended = finetune(tmp_path, family, question="What is it that is so long? " * 20)
    assert ended.complaint(0) is None and "leave no room in the model's 128 positions" in ended.out + ended.err
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_response_of_weight_0_is_seen_and_not_trained_on(tmp_path: Path) -> None:
    assert "⟦BAD" in shown(tmp_path, {"weight": 1})
    text = shown(tmp_path, {"weight": 0})
    assert "BAD" in text and "⟦BAD" not in text and "⟦good" in text


def test_a_tool_call_is_not_dropped_by_a_template_that_cannot_write_it(tmp_path: Path) -> None:
    call_of = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert "needs a chat template that writes tool calls" in shown(tmp_path, {"tool_calls": [call_of]}, status=2)


def shown(folder: Path, keys: dict[str, object], status: int = 0) -> str:
    """Show a training example whose first response has further keys: the output of `--show`, or the error."""
    turns = [("user", "q"), ("assistant", "BAD"), ("user", "again"), ("assistant", "good")]
    path = folder / "chat.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(6):
            messages: list[dict[str, object]] = [{"role": role, "content": f"{text}{number}"} for role, text in turns]
            messages[1].update(keys)
            file.write(json.dumps({"messages": messages}) + "\n")
    ended = finetune(folder, "llama", f"data.train={path}", "--show", "1")
    assert ended.complaint(status) is None
    return ended.out + ended.err
