"""Tokens added to a tokenizer: the model gets rows for them, these alone train, and PEFT reads what a run leaves."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from relora.adapters.merge import merge_adapter
from relora.config import FinetuneConfig, parse_finetune_config
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.inference.loading import load_model_or_run
from relora.model import build_model, open_model, save_model
from relora.model.load import quiet_transformers
from relora.recipes import finetune as recipe
from relora.recipes.finetune import finetune
from relora.recipes.finetuning_inputs import gather_finetuning

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Configure = Callable[..., FinetuneConfig]
ROWS = 512
ADDED = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDS = torch.tensor([[3, ROWS, 40, 41, ROWS + 1, 7]])
SHAPE = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(params=["untied", "tied", "bf16"])
def base(request: pytest.FixtureRequest, prepared: Path, tmp_path: Path) -> Path:
    """A tiny model whose tokenizer has two ids more than the model."""
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    if request.param == "tied":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, **heads, tie_word_embeddings=True))
    else:
        model = build_model("llama-9m", SHAPE, seed=0, eos_token_id=tokenizer.eos_token_id)
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    return save_model(model, tmp_path / "base", tokenizer, dtype)


@pytest.fixture
def configure(base: Path, tmp_path: Path) -> Configure:
    examples = tmp_path / "examples.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(24)
    ]
    examples.write_text("\n".join(map(json.dumps, records)))

    def build(name: str = "run", **overrides: Any) -> FinetuneConfig:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "task": "instruct",
            "model": {"path": str(base), "resize_vocabulary": "auto"},
            "data": {"train": str(examples), "sequence_length": 48},
            "lowrank": {"r": 4, "trainable_tokens": "new"},
            "schedule": {"total_steps": 6, "warmup_steps": 1},
            "optimizer": {"lr": 1e-2, "lowrank_lr": 1e-2},
            "batch": {"sequences": 4, "micro_sequences": 4},
            "checkpoint": {"every_steps": 2},
            "log": {"every_steps": 1, "trackers": []},
            "samples": {"examples": 1, "max_new_tokens": 4},
        }
        for key, value in overrides.items():
            section, _, last = key.rpartition("__")
            target = tree.setdefault(section, {}) if section else tree
            target[last] = value
        return parse_finetune_config(tree)

    return build


def plain(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def same(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def adapter_tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_unless_it_is_allowed_no_row_is_added(configure: Configure) -> None:
    with pytest.raises(UserError) as caught:
        gather_finetuning(configure(model__resize_vocabulary="never", lowrank__trainable_tokens=[]))
    message = "model: has 512 ids, the tokenizer 514; set `model.resize_vocabulary: auto` to add rows for the others"
    assert str(caught.value).startswith(message)


def test_added_rows_are_the_mean_and_old_logits_stay(configure: Configure, base: Path) -> None:
    inputs = gather_finetuning(configure(lowrank__trainable_tokens=[]))
    assert "vocabulary: 2 rows were added to the model's 512, each the mean of those" in inputs.notes
    assert "the added rows stay as they are; train them with `lowrank.trainable_tokens: new`" in inputs.notes
    before, model = open_model(base), inputs.model.cpu()
    old = torch.arange(3, 12)[None]
    assert torch.equal(model.eval()(input_ids=old).logits[..., :ROWS], before.eval()(input_ids=old).logits)
    for grown, small in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert torch.equal(grown.weight[:ROWS], small.weight)
        torch.testing.assert_close(grown.weight[ROWS:], small.weight.mean(0).expand(2, -1), atol=1e-4, rtol=1e-2)
    assert model.config.vocab_size == ROWS + 2


def test_the_rows_train_and_peft_and_merge_give_the_trained_model(configure: Configure, base: Path) -> None:
    run = finetune(configure(), quiet=True).folder
    assert open_model(run / "base", dtype="auto").dtype == open_model(base, dtype="auto").dtype
    start = plain(run / "base")
    tied = bool(start.config.tie_word_embeddings)
    stored = {name: tensor for name, tensor in adapter_tensors(run).items() if "token_adapter" in name}
    names = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert sorted(stored) == [f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in names]
    for tensor in stored.values():
        assert tensor.shape == (2, 32)
        assert (tensor - start.get_input_embeddings().weight[ROWS:]).abs().min(dim=1).values.max() > 0
    trained = logits(load_model_or_run(run).model)
    assert (trained - logits(start)).abs().max() > 1e-2
    same(logits(PeftModel.from_pretrained(plain(run / "base"), run / "adapter").eval()), trained)
    merge_adapter(run / "adapter", run / "merged")
    merged = plain(run / "merged")
    in_bf16 = open_model(base, dtype="auto").dtype == torch.bfloat16  # a merged model is stored as its base is
    same(logits(merged), trained, 5e-3 if in_bf16 else 2e-5)
    weight = merged.get_input_embeddings().weight
    assert torch.equal(weight[:ROWS], start.get_input_embeddings().weight[:ROWS])
    assert not torch.equal(weight[ROWS:], start.get_input_embeddings().weight[ROWS:])
    assert load_tokenizer(str(run / "merged")).convert_tokens_to_ids(ADDED) == [ROWS, ROWS + 1]


def test_in_peft_the_adapter_fits_the_given_base_with_its_rows_resized(configure: Configure, base: Path) -> None:
    """All added rows are in the adapter, so it does not matter what PEFT's user fills them with."""
    run = finetune(configure(), quiet=True).folder
    resized = plain(base)
    resized.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    same(logits(PeftModel.from_pretrained(resized, run / "adapter").eval()), logits(load_model_or_run(run).model))


def test_a_run_is_continued_to_the_same_bytes(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    job_of = recipe.job_of

    def killed(*arguments: Any) -> Any:
        job = job_of(*arguments)
        batch_at = job.task.batch_at

        def batch(number: int) -> Any:
            if number == 3:
                raise Killed
            return batch_at(number)

        return dataclasses.replace(job, task=dataclasses.replace(job.task, batch_at=batch))

    whole = finetune(configure("whole"), quiet=True).folder
    config = configure("killed")
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "job_of", killed)
        with pytest.raises(Killed):
            finetune(config, quiet=True)
    folder = finetune(config, quiet=True).folder
    ours, theirs = adapter_tensors(folder), adapter_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["relora", "full"])
def test_a_run_that_leaves_a_model_leaves_one_with_the_rows(configure: Configure, method: str) -> None:
    tokens = "new" if method == "relora" else []
    run = finetune(configure(method=method, lowrank__trainable_tokens=tokens), quiet=True).folder
    assert not (run / "base").exists()
    model = plain(run / "model")
    assert model.get_input_embeddings().weight.shape == (ROWS + 2, 32)
    assert not any("parametriz" in name for name in load_file(run / "model" / "model.safetensors"))
    same(logits(load_model_or_run(run).model), logits(model))


def test_gradients_of_the_rows_are_those_of_the_whole_weights(configure: Configure) -> None:
    """Against PEFT, on the same batch."""
    inputs = gather_finetuning(configure())
    ours = inputs.model.eval()
    theirs = plain(inputs.base)
    theirs.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    with torch.no_grad():
        for module in ("get_input_embeddings", "get_output_embeddings"):
            getattr(theirs, module)().weight.copy_(getattr(ours, module)().weight)
    tied = bool(theirs.config.tie_word_embeddings)
    ids = [ROWS, ROWS + 1]
    named = {"embed_tokens": ids} if tied else {"embed_tokens": ids, "lm_head": ids}
    peft = get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=named)).eval()
    labels = IDS.roll(-1, dims=1)
    total, number = inputs.loss(ours, IDS, labels)
    total.backward()
    peft_loss = torch.nn.functional.cross_entropy(peft(input_ids=IDS).logits.flatten(0, 1), labels.flatten())
    peft_loss.backward()
    same(total / number, peft_loss)
    found = {name: p.grad / number for name, p in ours.named_parameters() if name.endswith(".rows")}
    expected = {name: p.grad for name, p in peft.named_parameters() if "trainable_tokens_delta" in name}
    assert len(found) == len(expected) == (1 if tied else 2)
    for name, grad in found.items():
        like = next(g for other, g in expected.items() if ("lm_head" in other) == ("lm_head" in name))
        same(grad, like)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("base", ["untied"], indirect=True)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lowrank__trainable_tokens": ["<|nowhere|>"]}, "the tokenizer has no token '<|nowhere|>'"),
        ({"lowrank__trainable_tokens": [3, 9999]}, "the ids are 3 to 9999, the model has 514 rows"),
        ({"lowrank__trained_modules": ["lm_head"]}, "lm_head trains in full by lowrank.trained_modules; drop one"),
    ],
)
def test_tokens_that_cannot_train_are_named(configure: Configure, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        gather_finetuning(configure(**overrides))
    assert message in str(caught.value)


@pytest.mark.parametrize("base", ["untied"], indirect=True)
@pytest.mark.parametrize(
    "overrides",
    [
        {"method": "full"},
        {"method": "llama-adapter"},
        {"model__resize_vocabulary": "never"},
        {"task": "classification"},
    ],
)
def test_combinations_without_meaning_are_refused(configure: Configure, overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"trainable_tokens"):
        configure(**overrides)


@pytest.mark.parametrize("base", ["untied"], indirect=True)
def test_rows_of_tokens_that_were_there_train_by_their_text(configure: Configure, base: Path) -> None:
    save_tokens = {"lowrank__trainable_tokens": [ADDED[1], 5]}
    inputs = gather_finetuning(configure(**save_tokens))
    rows = inputs.model.get_parameter("model.embed_tokens.parametrizations.weight.0.rows")
    assert torch.equal(rows, inputs.model.get_input_embeddings().weight[[5, ROWS + 1]])


@pytest.mark.parametrize("base", ["untied"], indirect=True)
def test_a_batch_without_the_tokens_is_no_fault(configure: Configure) -> None:
    """The token that ends a document is in no input, so only its row of the head has a gradient."""
    end = load_tokenizer(str(configure().model.path)).eos_token
    run = finetune(configure(lowrank__trainable_tokens=[end], data__template="plain"), quiet=True).folder
    stored = {name.split(".")[2]: rows for name, rows in adapter_tensors(run).items() if "token_adapter" in name}
    start = plain(run / "base")
    number = load_tokenizer(str(run / "base")).eos_token_id
    assert torch.equal(stored["model"][0], start.get_input_embeddings().weight[number])
    assert not torch.equal(stored["lm_head"][0], start.get_output_embeddings().weight[number])
