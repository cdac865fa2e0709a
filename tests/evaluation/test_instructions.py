"""Answers in a batch equal answers one by one, the loss is that of the responses, and nothing is overwritten."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import factors, lora, needs_data
from tests.adapters.adapted import prompts as prompts_of
from tests.paths import DATA
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from relora.data.finetuning.instruct import InstructionForm
from relora.data.finetuning.records import Record
from relora.data.tokenizer import load_tokenizer, train_tokenizer
from relora.errors import UserError
from relora.evaluation.instructions import Answer, answer_greedily, evaluate_instructions, score_records
from relora.evaluation.text_metrics import TextScorer
from relora.inference.loading import load_model_or_run
from relora.model import build_model, open_model, save_model

STORIES = DATA / "models" / "stories260K-llama-hf"
TEXT = "The cat sat on the mat. A dog barked at the cat; the cat did not move. " * 4
RECORDS = [
    {"prompt": "What did the cat do?", "response": "It sat on the mat."},
    {"prompt": "Who barked?", "response": "A dog."},
    {"prompt": "Did the cat move at the bark of a dog?", "response": "No; the cat did not move at all."},
    {"prompt": "the", "response": "cat"},
]
PLAIN = InstructionForm(template="plain")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, whose large weights make its predictions far from uniform, and a byte-level tokenizer."""
    tokenizer = train_tokenizer([TEXT], 300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_model("llama-9m", {**shape, "vocab_size": 300, "max_position_embeddings": 64}, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture
def model(model_folder: Path) -> PreTrainedModel:
    """The model in fp64, in which the rounding of a batch is too small to change the likeliest token."""
    return open_model(model_folder).double()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(model_folder))


@pytest.fixture
def tokenizer_with_chat(model_folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template that ends responses with a token other than EOS."""
    tokenizer = load_tokenizer(str(model_folder))
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{{ '<|endoftext|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture
def records_file(tmp_path: Path) -> str:
    return write(tmp_path / "set.jsonl", RECORDS)


def write(file: Path, records: list[dict]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def as_records(records: list[dict]) -> list[Record]:
    return [Record(f"record {number}", fields) for number, fields in enumerate(records, start=1)]


def prompt_ids(tokenizer, record: dict) -> list[int]:
    return tokenizer(record["prompt"] + "\n").input_ids


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, ids: list[int], most: int) -> list[int]:
    """Append the likeliest next token `most` times, without a cache, and return the new tokens."""
    ids = list(ids)
    model.eval()
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-most:]


def slow_loss(model: PreTrainedModel, tokenizer, records: list[dict]) -> tuple[float, int]:
    """Score each token of each response by itself; return the sum in nats and the number of tokens."""
    total, number = 0.0, 0
    model.eval()
    for record in records:
        prompt = prompt_ids(tokenizer, record)
        response = [*tokenizer(record["response"]).input_ids, tokenizer.eos_token_id]
        for at, token in enumerate(response):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response[:at]])).logits[0, -1]
            total -= torch.log_softmax(logits.double(), 0)[token].item()
        number += len(response)
    return total, number


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_in_a_batch_equal_answers_one_by_one(model, tokenizer, batch: int) -> None:
    asked = [prompt_ids(tokenizer, record) for record in RECORDS]
    assert len({len(ids) for ids in asked}) > 2
    answers = answer_greedily(model, tokenizer, asked, max_new_tokens=9, batch=batch)
    for ids, found in zip(asked, answers, strict=True):
        assert found == Answer(tokenizer.decode(greedy_tokens(model, ids, 9)).strip(), 9, False)


def test_an_answer_ends_at_an_end_token(model, tokenizer) -> None:
    asked = [prompt_ids(tokenizer, record) for record in RECORDS]
    first, *_ = written = [greedy_tokens(model, ids, 9) for ids in asked]
    model.generation_config.eos_token_id = [first[4], tokenizer.eos_token_id]
    answers = answer_greedily(model, tokenizer, asked, max_new_tokens=9, batch=4)
    for new, found in zip(written, answers, strict=True):
        end = new.index(first[4]) if first[4] in new else 9
        assert found.text == tokenizer.decode(new[:end]).strip()
        assert (found.tokens, found.ended) == ((end + 1, True) if end < 9 else (9, False))
    assert answers[0].ended


def test_an_answer_ends_where_the_template_ends_a_response(model, tokenizer_with_chat) -> None:
    """With a head of zeros the likeliest token is id 0, which is the special token that ends every response."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = tokenizer_with_chat.eos_token_id
    assert tokenizer_with_chat.eos_token_id != 0
    scores, samples = score_records(
        model,
        tokenizer_with_chat,
        as_records(RECORDS),
        InstructionForm(template="chat"),
        sequence_length=64,
        max_new_tokens=5,
        batch=3,
        scorer=TextScorer(),
    )
    assert scores.ended == scores.records == scores.answer_tokens == 4
    assert [sample.answer for sample in samples] == [Answer("", 1, True)] * 4
    assert samples[1].prompt == "user: Who barked?\nassistant: "


def test_the_generation_settings_of_the_model_are_not_used(model, tokenizer) -> None:
    asked = [prompt_ids(tokenizer, record) for record in RECORDS]
    plain = answer_greedily(model, tokenizer, asked, max_new_tokens=6, batch=4)
    likely = greedy_tokens(model, asked[0], 1)
    eos = model.generation_config.eos_token_id
    own = model.generation_config = GenerationConfig(
        eos_token_id=eos, num_beams=3, repetition_penalty=3.0, suppress_tokens=likely, min_new_tokens=4, do_sample=True
    )
    model.train()
    assert answer_greedily(model, tokenizer, asked, max_new_tokens=6, batch=4) == plain
    assert model.generation_config is own
    assert own.num_beams == 3
    assert model.training


def test_the_random_streams_are_not_used(model, tokenizer) -> None:
    state = torch.get_rng_state()
    answer_greedily(model, tokenizer, [[5, 6, 7]], max_new_tokens=3, batch=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_has_the_room_that_its_prompt_leaves(model, tokenizer) -> None:
    asked = [[7] * length for length in (70, 64, 62, 10, 61)]  # of 64 positions
    answers = answer_greedily(model, tokenizer, asked, max_new_tokens=5, batch=4)
    assert [one.tokens for one in answers] == [0, 0, 2, 5, 3]
    assert answers[0] == Answer("", 0, False)


def test_an_empty_prompt_is_replaced_by_the_start_token(model, tokenizer) -> None:
    (empty,) = answer_greedily(model, tokenizer, [[]], max_new_tokens=4, batch=1)
    assert (empty,) == tuple(answer_greedily(model, tokenizer, [[tokenizer.bos_token_id]], max_new_tokens=4, batch=1))


def test_the_loss_is_that_of_the_responses(model, tokenizer) -> None:
    total, number = slow_loss(model, tokenizer, RECORDS)
    for batch in (1, 3):
        scores, _ = score_records(
            model,
            tokenizer,
            as_records(RECORDS),
            PLAIN,
            sequence_length=64,
            max_new_tokens=2,
            batch=batch,
            scorer=TextScorer(),
        )
        assert scores.response_tokens == number
        assert scores.loss == pytest.approx(total / number, rel=1e-9)
        assert scores.perplexity == pytest.approx(math.exp(total / number), rel=1e-9)


def test_answers_equal_to_the_references_score_100(model, tokenizer) -> None:
    texts = answer_greedily(
        model, tokenizer, [prompt_ids(tokenizer, record) for record in RECORDS], max_new_tokens=12, batch=4
    )
    own = [record | {"response": one.text} for record, one in zip(RECORDS, texts, strict=True)]
    assert max(len(one.text.split()) for one in texts) > 3
    settings = {"sequence_length": 64, "max_new_tokens": 12, "batch": 2, "scorer": TextScorer()}
    scores, samples = score_records(model, tokenizer, as_records(own), PLAIN, **settings)
    assert scores.exact_match == scores.f1 == 100
    assert scores.bleu == pytest.approx(100)
    mixed, _ = score_records(model, tokenizer, as_records([*own[:2], *RECORDS[2:]]), PLAIN, **settings)
    assert mixed.exact_match == 50
    assert [sample.answer.text for sample in samples] == [one.text for one in texts]
    assert samples[0].prompt == "What did the cat do?\n"


def test_scores_and_samples_are_kept(model_folder: Path, records_file: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores"
    scores = evaluate_instructions(model_folder, records_file, template="plain", max_new_tokens=7, out=out)
    assert sorted(path.name for path in out.iterdir()) == ["samples.jsonl", "scores.json"]
    kept = json.loads((out / "scores.json").read_text())
    assert {key: kept[key] for key in asdict(scores)} == asdict(scores)
    assert (kept["model"], kept["instructions"]) == (str(model_folder), records_file)
    assert "torch" in kept["environment"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["reference"] for sample in samples] == [record["response"] for record in RECORDS]
    assert [sample["prompt"] for sample in samples] == [record["prompt"] + "\n" for record in RECORDS]
    assert sum(sample["answer_tokens"] for sample in samples) == scores.answer_tokens
    assert scores.f1 == pytest.approx(sum(sample["f1"] for sample in samples) / len(samples))
    assert scores.records == 4
    assert scores.template == "plain"


def test_nothing_is_overwritten(model_folder: Path, records_file: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link"):
        with pytest.raises(UserError, match=f"{name}: exists, and was left as it is; give a new folder"):
            evaluate_instructions(model_folder, records_file, out=tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "there").iterdir())


def test_limit_and_columns(model_folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "q.json", [{"ask": r["prompt"], "say": r["response"], "text": "x"} for r in RECORDS])
    scores = evaluate_instructions(
        model_folder,
        other,
        template="plain",
        prompt_column="ask",
        response_column="say",
        limit=3,
        max_new_tokens=2,
        dtype="fp32",
    )
    assert scores.records == 3
    plain = write(tmp_path / "plain.jsonl", RECORDS[:3])
    again = evaluate_instructions(model_folder, plain, template="plain", max_new_tokens=2)
    assert again.loss == scores.loss


def test_records_that_are_cut_or_leave_no_room_are_counted(model_folder: Path, tmp_path: Path) -> None:
    records = [RECORDS[0], {"prompt": TEXT, "response": "A cat."}, {"prompt": "empty", "response": " "}]
    file = write(tmp_path / "long.jsonl", records)
    scores = evaluate_instructions(model_folder, file, template="plain", max_new_tokens=2, sequence_length=30)
    assert (scores.records, scores.cut, scores.without_room) == (2, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"sequence_length": 65}, r"sequence_length \(65\) is more than the model's 64 positions"),
        ({"template": "vicuna"}, "template: `vicuna` is none of auto, alpaca, chat, plain"),
        ({"template": "chat"}, "has no chat template"),
        ({"prompt_column": "prompt"}, "name the responses' column, too"),
        ({"prompt_column": "nope", "response_column": "response"}, "also needs `nope`"),
        ({"adapter": "no-such-adapter"}, "no-such-adapter"),
    ],
)
def test_settings_that_do_not_fit(
    model_folder: Path, records_file: str, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_instructions(model_folder, records_file, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        evaluate_instructions(model_folder, str(tmp_path / "none.jsonl"))
    texts = write(tmp_path / "texts.jsonl", [{"text": "only text"}])
    with pytest.raises(UserError, match="completions have no prompt"):
        evaluate_instructions(model_folder, texts)


def test_a_tokenizer_with_more_ids_than_the_model(tokenizer) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = build_model("llama-9m", {**shape, "vocab_size": 64}, seed=0)
    with pytest.raises(UserError, match=r"gives id \d+ but the model has 64 ids"):
        score_records(
            small,
            tokenizer,
            as_records(RECORDS),
            PLAIN,
            sequence_length=64,
            max_new_tokens=2,
            batch=2,
            scorer=TextScorer(),
        )


@needs_data
def test_an_adapter_answers_in_place_of_its_base(tmp_path: Path) -> None:
    file = write(tmp_path / "set.jsonl", RECORDS)
    settings = {"template": "plain", "max_new_tokens": 8}
    base = evaluate_instructions(STORIES, file, **settings)
    adapter = lora(tmp_path / "lora", seed=1)
    beside = evaluate_instructions(STORIES, file, adapter=str(adapter), **settings)
    merged = open_model(STORIES).eval()
    with torch.no_grad():
        for path, update in factors(1).items():
            merged.get_submodule(path).weight += update.delta()
    save_model(merged, tmp_path / "merged", load_tokenizer(str(STORIES)))
    expected = evaluate_instructions(tmp_path / "merged", file, **settings)
    assert beside.loss == pytest.approx(expected.loss, rel=1e-4)
    assert abs(beside.loss - base.loss) > 1e-2
    by_itself = evaluate_instructions(adapter, file, **settings)  # opens the base that it names
    assert by_itself.loss == beside.loss
    prompted = evaluate_instructions(STORIES, file, adapter=str(prompts_of(tmp_path / "prompts")), **settings)
    assert abs(prompted.loss - base.loss) > 1e-4


@needs_data
def test_llama_adapter_answers_in_a_batch_as_one_by_one(tmp_path: Path) -> None:
    loaded = load_model_or_run(STORIES, adapters=[str(prompts_of(tmp_path / "prompts"))])
    asked = [loaded.encode(text) for text in ("Once upon a time", "The dog", "Lily went to the park and saw")]
    plain = answer_greedily(loaded.model, loaded.tokenizer, asked, max_new_tokens=10, batch=3)
    loaded.adapters.use("prompts")
    loaded.model.double()
    in_a_batch, one_by_one = (
        answer_greedily(loaded.model, loaded.tokenizer, asked, max_new_tokens=10, batch=batch) for batch in (3, 1)
    )
    assert in_a_batch == one_by_one != plain


@needs_data
def test_real_instructions(tmp_path: Path) -> None:
    source = str(DATA / "instruction" / "llms_from_scratch_1100.jsonl")
    scores = evaluate_instructions(STORIES, source, limit=12, max_new_tokens=16, out=tmp_path / "out")
    assert (scores.records, scores.template, scores.without_room) == (12, "alpaca", 0)
    assert 2 < scores.loss < 10  # the model was trained on stories only
    assert 0 < scores.rouge1 < 60
    assert scores.answer_tokens <= 12 * 16


def test_what_is_not_used_of_the_records_is_told(model, tokenizer) -> None:
    rows = [{**RECORDS[0], "id": 1}, {"prompt": "the cat", "response": " "}]
    scores, _ = score_records(
        model, tokenizer, as_records(rows), PLAIN, sequence_length=64, max_new_tokens=2, batch=2, scorer=TextScorer()
    )
    assert scores.notes == [
        "1 of 2 records used; 1 left out, with no response",
        "not used: column `id` (1 record)",
    ]
