"""A causal LM becomes a classifier that plain transformers opens, with the same loss, gradients and labels."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    pipeline,
)

from relora.data.finetuning.classification import encode_classes, settle_padding
from relora.data.finetuning.records import Record
from relora.data.tokenizer import train_tokenizer
from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, low_rank_layers, merge
from relora.model import open_model, save_model
from relora.model.classifier import class_logits, class_loss, logits_loss, open_classifier

VOCABULARY = 300
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
SMALL = {**SHAPE, "intermediate_size": 24}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma3_text": Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, pad_token_id=0),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2),
    "opt": OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16),
}
PAD = 1
LENGTHS = torch.tensor([7, 3, 1])
IDS = torch.arange(2, 23).view(3, 7).masked_fill(torch.arange(7) >= LENGTHS[:, None], PAD)
LABELS = torch.tensor([0, 2, 1])
NAMES = ("bad", "good", "so so")
HEAD = "score.weight"


def folder_of(family: str, folder: Path) -> Path:
    """A random causal LM, saved by transformers."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
    return folder


@pytest.fixture(params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return folder_of(request.param, tmp_path / request.param)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder_of("llama", tmp_path / "llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["the cat sat on the mat, and the dog sat on the log\n"] * 4, VOCABULARY)


def reopened(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same model as plain transformers opens it."""
    return AutoModelForSequenceClassification.from_pretrained(save_model(model, folder, tokenizer))


# Opening


def test_the_body_is_the_models_own(family_folder: Path) -> None:
    before = open_model(family_folder).base_model.state_dict()
    after = open_classifier(family_folder, NAMES, pad_token_id=PAD, seed=0)
    body = after.base_model.state_dict()
    assert before.keys() == body.keys()
    assert all(torch.equal(before[name], body[name]) for name in before)
    others = after.state_dict().keys() - {f"{after.base_model_prefix}.{name}" for name in body}
    assert others == {"score.weight"}


def test_the_head_is_drawn_from_the_seed_alone(llama: Path) -> None:
    torch.manual_seed(1)
    first = open_classifier(llama, NAMES, pad_token_id=PAD, seed=5).score.weight
    torch.rand(3)
    stream = torch.get_rng_state()
    again = open_classifier(llama, NAMES, pad_token_id=PAD, seed=5).score.weight
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(first, again)
    assert not torch.equal(first, open_classifier(llama, NAMES, pad_token_id=PAD, seed=6).score.weight)
    wide = open_classifier(llama, [str(number) for number in range(300)], pad_token_id=PAD, seed=5).score.weight
    assert wide.shape == (300, 16)
    assert wide.std().item() == pytest.approx(0.02, rel=0.05)


def test_everything_trains_in_the_mode_of_an_opened_model(llama: Path) -> None:
    model = open_classifier(llama, NAMES, pad_token_id=PAD, seed=0, dtype=torch.bfloat16)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    assert model.base_model.config is model.config


def test_on_the_meta_device_only_the_shapes_are_there(llama: Path) -> None:
    with torch.device("meta"):
        model = open_classifier(llama, NAMES, pad_token_id=PAD, seed=0)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.score.weight.shape == (3, 16)


@pytest.mark.parametrize(
    ("labels", "pad", "message"),
    [
        (["one"], PAD, r"one class \(one\) leaves nothing to tell apart"),
        (NAMES, VOCABULARY, r"the model has 300 ids, the tokenizer pads with id 300"),
        ([f"a rather long name {number}" for number in range(10_000)], PAD, r"10,000 classes make a config\.json of"),
    ],
)
def test_what_makes_no_classifier_is_refused(labels: list[str], pad: int, message: str, llama: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_classifier(llama, labels, pad_token_id=pad, seed=0)


def test_a_model_without_such_a_head_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no classifier can be made of a bert model"):
        open_classifier(tmp_path, NAMES, pad_token_id=PAD, seed=0)


def test_the_checks_of_a_causal_lm_hold(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"its weights lack `model\.layers\.2"):
        open_classifier(llama, NAMES, pad_token_id=PAD, seed=0)
    with pytest.raises(UserError, match="no such folder"):
        open_classifier(llama / "none", NAMES, pad_token_id=PAD, seed=0)


# The same as in transformers


def test_plain_transformers_gives_the_same_logits(
    family_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = open_classifier(family_folder, NAMES, pad_token_id=PAD, seed=0)
    plain = reopened(model, tmp_path / "saved", tokenizer)
    assert plain.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    assert plain.config.label2id == {"bad": 0, "good": 1, "so so": 2}
    assert plain.config.problem_type == "single_label_classification"
    with torch.no_grad():
        torch.testing.assert_close(class_logits(model, IDS, LENGTHS), plain(IDS).logits)
        alone = [plain(row[:length][None]).logits for row, length in zip(IDS, LENGTHS.tolist(), strict=True)]
        torch.testing.assert_close(class_logits(model, IDS, LENGTHS), torch.cat(alone))


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([0.5, -2.0, 3.25])], ids=["classes", "numbers"])
def test_loss_and_gradients_are_those_of_transformers(
    labels: Tensor, llama: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    names = () if labels.is_floating_point() else NAMES
    model = open_classifier(llama, names, pad_token_id=PAD, seed=0).double()
    plain = reopened(model, tmp_path / "saved", tokenizer)
    loss, number = class_loss(model, IDS, labels, LENGTHS)
    assert (loss.dtype, number.item()) == (torch.float64, 3)
    wanted = plain(IDS, labels=labels.to(torch.float64) if not names else labels).loss
    torch.testing.assert_close(loss / number, wanted)
    loss.backward()
    (3 * wanted).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_a_bf16_loss_is_summed_in_fp32(llama: Path) -> None:
    logits = torch.tensor([[0.0, 1.0]]).repeat(4099, 1).bfloat16()
    loss, number = logits_loss(logits, torch.zeros(4099, dtype=torch.int64))
    assert (loss.dtype, number.item()) == (torch.float32, 4099)
    assert loss.item() == pytest.approx(4099 * np.log1p(np.e), rel=1e-5)
    loss, _ = logits_loss(logits[:, :1], torch.full((4099,), 1.5))
    assert loss.item() == pytest.approx(4099 * 2.25, rel=1e-6)


def test_what_is_not_scored_does_not_count() -> None:
    logits = torch.tensor([[2.0, 0.0], [5.0, -5.0]])
    loss, number = logits_loss(logits, torch.tensor([0, -100]))
    assert number.item() == 1
    assert loss.item() == pytest.approx(np.log1p(np.exp(-2)), rel=1e-6)


def test_padding_changes_nothing(family_folder: Path) -> None:
    model = open_classifier(family_folder, NAMES, pad_token_id=PAD, seed=0)
    longer = torch.cat([IDS, torch.full((3, 5), PAD)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(class_logits(model, longer, LENGTHS), class_logits(model, IDS, LENGTHS))
        other = longer.masked_fill(torch.arange(12) >= LENGTHS[:, None], 9)
        torch.testing.assert_close(class_logits(model, other, LENGTHS), class_logits(model, IDS, LENGTHS))


def test_the_head_computes_in_its_own_dtype_under_autocast(llama: Path) -> None:
    model = open_classifier(llama, (), pad_token_id=PAD, seed=0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = class_logits(model, IDS, LENGTHS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, class_logits(model, IDS, LENGTHS).detach(), rtol=0.1, atol=1e-3)


def test_low_rank_layers_go_into_the_body_and_out_again(llama: Path) -> None:
    model = open_classifier(llama, NAMES, pad_token_id=PAD, seed=0)
    before = class_logits(model, IDS, LENGTHS)
    inject(model, LowRankConfig(r=2, lora_alpha=4))
    assert len(low_rank_layers(model)) == 14
    assert not any(name.startswith("score") for name in low_rank_layers(model))
    assert model.score.weight.requires_grad
    torch.testing.assert_close(class_logits(model, IDS, LENGTHS), before)
    class_loss(model, IDS, LABELS, LENGTHS)[0].backward()
    assert all(layer.lora_B.grad.any() for layer in low_rank_layers(model).values())
    merge(model)
    torch.testing.assert_close(class_logits(model, IDS, LENGTHS), before)


def test_beside_a_frozen_body_the_head_can_train(llama: Path) -> None:
    model = open_classifier(llama, NAMES, pad_token_id=PAD, seed=0)
    inject(model, LowRankConfig(r=2, lora_alpha=4, rest="frozen", trained_modules=("score",)))
    class_loss(model, IDS, LABELS, LENGTHS)[0].backward()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and name != HEAD}
    assert moved == {"lora_A", "lora_B"}
    assert model.score.weight.grad.any()


# The pipeline


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_pipeline_gives_the_same_labels(
    pad_is_end: bool, llama: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Texts and pairs, with a template that ends every text with the token that may be the padding, too."""
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=None if pad_is_end else tokenizer.pad_token,
    )
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    pad = settle_padding(tokenizer)
    assert (pad == tokenizer.eos_token_id) == pad_is_end
    words = ["the cat", "the dog sat", "on the mat", "log", "and, and"]
    singles = [{"text": text, "label": number % 3} for number, text in enumerate(words)]
    pairs = [
        {"text1": one, "text2": other, "label": number % 3}
        for number, (one, other) in enumerate(itertools.permutations(words, 2))
    ]
    model = open_classifier(llama, NAMES, pad_token_id=pad, seed=0)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.5)  # wide enough for all labels to be given
    save_model(model, tmp_path / "saved", tokenizer)
    classify = pipeline("text-classification", str(tmp_path / "saved"))
    given = set()
    for rows, inputs in (
        (singles, words),
        (pairs, [{"text": row["text1"], "text_pair": row["text2"]} for row in pairs]),
    ):
        records = [Record(f"row {number}", row) for number, row in enumerate(rows)]
        examples = encode_classes(records, tokenizer, sequence_length=64)
        input_ids, _, lengths = examples.take(np.arange(len(examples)))
        with torch.no_grad():
            chances = class_logits(model, input_ids, lengths).softmax(dim=-1)
        found = [classify(text) for text in inputs]
        found = [one[0] if isinstance(one, list) else one for one in found]
        assert [one["label"] for one in found] == [NAMES[number] for number in chances.argmax(dim=-1).tolist()]
        assert [one["score"] for one in found] == pytest.approx(chances.amax(dim=-1).tolist(), rel=1e-4)
        given |= {one["label"] for one in found}
    assert len(given) > 1


def test_what_is_saved_is_a_plain_folder(llama: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_model(open_classifier(llama, (), pad_token_id=PAD, seed=0), tmp_path / "saved", tokenizer)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert weights["score.weight"].shape == (1, 16)
    assert "lm_head.weight" not in weights
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["architectures"], config["problem_type"]) == (["LlamaForSequenceClassification"], "regression")
