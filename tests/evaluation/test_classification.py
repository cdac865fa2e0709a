"""Held-out metrics of classifiers: a small one that learns, and the arithmetic over batches."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from relora.data.finetuning.classification import ClassBatches, ClassExamples, HeldOutClasses, encode_classes
from relora.data.finetuning.records import Record
from relora.data.tokenizer import train_tokenizer
from relora.errors import UserError
from relora.evaluation import label_metrics
from relora.evaluation.classification import ClassEvaluation, evaluate_classes
from relora.model.classifier import class_logits, class_loss, open_classifier

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "dog", "lay", "by", "some", "log"]
MOODS = {"bad": ["awful", "dull", "grim"], "good": ["lovely", "bright", "fun"]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([" ".join([*WORDS, *MOODS["bad"], *MOODS["good"]])] * 20, 400)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64)).save_pretrained(folder)
    return folder


def reviews(number: int, seed: int) -> list[Record]:
    """Sentences with one word that decides the label, among neutral words."""
    draw = random.Random(seed)
    rows = []
    for line in range(number):
        label = draw.choice(sorted(MOODS))
        words = draw.choices(WORDS, k=draw.randint(2, 9))
        words.insert(draw.randrange(len(words)), draw.choice(MOODS[label]))
        rows.append(Record(f"line {line}", {"sentence": " ".join(words), "label": label}))
    return rows


def ratings(number: int, seed: int) -> list[Record]:
    """Sentences labelled with the share of good words in them."""
    draw = random.Random(seed)
    rows = []
    for line in range(number):
        good = draw.randint(0, 4)
        words = draw.choices(MOODS["good"], k=good) + draw.choices(MOODS["bad"], k=4 - good)
        draw.shuffle(words)
        rows.append(Record(f"line {line}", {"sentence": " ".join(words), "label": good / 4}))
    return rows


def learn(model: PreTrainedModel, train: ClassExamples, steps: int) -> None:
    batches = ClassBatches(train, sequences=32, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        loss, number = class_loss(model, *batches.batch(step))
        (loss / number).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_separable_task_is_learnt(llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = encode_classes(reviews(600, seed=1), tokenizer, sequence_length=32)
    held_out = HeldOutClasses(
        encode_classes(reviews(200, seed=2), tokenizer, sequence_length=32, like=train), sequences=50
    )
    model = open_classifier(llama, train.names, pad_token_id=train.pad_token_id, seed=0)
    before = evaluate_classes(model, held_out)
    learn(model, train, steps=60)
    after = evaluate_classes(model, held_out)
    assert before.accuracy < 0.8
    assert after.accuracy > 0.95
    assert after.matthews > 0.9 and after.f1 > 0.95
    assert after.loss < 0.3 < before.loss
    assert after.examples == 200
    assert (after.pearson, after.spearman) == (None, None)


def test_numbers_are_learnt(llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = encode_classes(ratings(600, seed=1), tokenizer, sequence_length=32)
    held_out = HeldOutClasses(
        encode_classes(ratings(100, seed=2), tokenizer, sequence_length=32, like=train), sequences=50
    )
    model = open_classifier(llama, train.names, pad_token_id=train.pad_token_id, seed=0)
    learn(model, train, steps=80)
    after = evaluate_classes(model, held_out)
    assert after.pearson > 0.9 and after.spearman > 0.9
    assert after.loss < 0.03  # the variance is 1/8
    assert (after.accuracy, after.f1, after.matthews) == (None, None, None)


def test_batches_are_scored_as_all_examples_at_once(llama: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [
        Record(record.where, {**record.fields, "label": number % 3})
        for number, record in enumerate(reviews(50, seed=3))
    ]
    examples = encode_classes(records, tokenizer, sequence_length=32)
    model = open_classifier(llama, examples.names, pad_token_id=examples.pad_token_id, seed=0)
    torch.manual_seed(0)
    model.score.weight.data.normal_(std=5)
    model.train()
    stream = torch.get_rng_state()
    results = [evaluate_classes(model, HeldOutClasses(examples, sequences=n)) for n in (7, 50)]
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())
    (ids, labels, lengths) = next(iter(HeldOutClasses(examples, sequences=50)))
    with torch.no_grad():
        predictions = class_logits(model, ids, lengths).argmax(dim=-1).tolist()
        loss, _ = class_loss(model, ids, labels, lengths)
    assert len(set(predictions)) > 1
    for result in results:
        assert result.loss == pytest.approx(loss.item() / 50, rel=1e-5)
        assert result.accuracy == label_metrics.accuracy(predictions, labels.tolist())
        assert result.f1 == label_metrics.macro_f1(predictions, labels.tolist())
        assert result.matthews == label_metrics.matthews(predictions, labels.tolist())


def test_f1_of_two_classes_is_that_of_class_1() -> None:
    predictions, labels = [1, 1, 0, 0], [1, 0, 0, 0]
    assert ClassEvaluation.of(2.0, predictions, labels, 2).f1 == pytest.approx(2 / 3)
    assert ClassEvaluation.of(2.0, predictions, labels, 3).f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert ClassEvaluation.of(2.0, predictions, labels, 2).loss == 0.5


def test_each_batch_is_called_for_and_an_empty_evaluation_is_refused(
    llama: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = encode_classes(reviews(10, seed=0), tokenizer, sequence_length=32)
    model = open_classifier(llama, examples.names, pad_token_id=examples.pad_token_id, seed=0)
    calls: list[int] = []
    evaluate_classes(model, HeldOutClasses(examples, sequences=4), each_batch=lambda: calls.append(1))
    assert len(calls) == 3
    with pytest.raises(UserError, match="no example to score"):
        evaluate_classes(model, [])
