"""Figures on local tasks equal those of a plain loop over the records, and untrusted task files run no code."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import lora
from tests.paths import DATA

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.evaluation.lm_eval import evaluate_tasks
from relora.inference.loading import load_model_or_run
from relora.model import open_model

STORIES = DATA / "models" / "stories260K-llama-hf"
TASKS = Path(__file__).parent / "configs" / "tasks"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared test data is not here")

CHOICE = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
RECORDS = [
    {
        "question": "Once upon a time, there was a",
        "options": ["little girl named Lily.", "purple of sums."],
        "right": 0,
    },
    {"question": "The dog was very happy and", "options": ["quarter revenue", "wagged his tail."], "right": 1},
    {"question": "Lily went to the park to", "options": ["xylem", "play with her friends."], "right": 0},
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of the `datasets` library out of the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one task over three records."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    write_task(tmp_path / "tasks")
    return tmp_path / "tasks"


def write_task(folder: Path, text: str = "{{question}}", more: str = "", name: str = "colours.yaml") -> Path:
    (folder / name).write_text(CHOICE.format(data=folder.parent / "colours.jsonl", text=text) + more)
    return folder / name


@torch.no_grad()
def likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Log-likelihood of the continuation after the context, in nats."""
    whole = tokenizer(context + continuation).input_ids
    start = len(tokenizer(context).input_ids)
    scores = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
    return sum(scores[at - 1, whole[at]].item() for at in range(start, len(whole)))


def test_the_chosen_answer_is_the_likeliest_continuation(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (score,) = evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, out=out, batch=2)
    model, tokenizer = open_model(STORIES).eval(), load_tokenizer(str(STORIES))
    expected = [[likelihood(model, tokenizer, r["question"], " " + o) for o in r["options"]] for r in RECORDS]
    right = [max((0, 1), key=pair.__getitem__) == r["right"] for pair, r in zip(expected, RECORDS, strict=True)]
    assert right == [True, True, False]
    assert score.value == pytest.approx(2 / 3)
    assert (score.task, score.metric, score.examples, score.shots) == ("colours", "acc", 3, 0)
    assert score.higher_is_better is True
    assert score.stderr is not None
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["acc"] for sample in samples] == right
    assert [sample["doc"] for sample in samples] == RECORDS
    for sample, pair in zip(samples, expected, strict=True):
        assert [found[0] for found in sample["filtered_resps"]] == pytest.approx(pair, abs=1e-3)
    kept = json.loads((out / "scores.json").read_text())
    assert kept["scores"][0]["value"] == score.value
    assert kept["lm_eval"]


def test_an_adapter_is_scored_in_place_of_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", seed=1)
    for name, settings in (("base", {}), ("beside", {"adapter": str(adapter)})):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, out=tmp_path / name, **settings)
    base, beside = (
        [
            json.loads(line)["filtered_resps"][0][0]
            for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()
        ]
        for name in ("base", "beside")
    )
    loaded = load_model_or_run(STORIES, adapters=[str(adapter)])
    loaded.adapters.use(loaded.adapters.names[0])
    expected = [likelihood(loaded.model, loaded.tokenizer, r["question"], " " + r["options"][0]) for r in RECORDS]
    assert beside == pytest.approx(expected, abs=1e-3)
    assert base != pytest.approx(expected, abs=1e-1)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("arc_easy_local", ["acc", "acc_norm"]),
        ("blimp_local", ["acc"]),
        ("boolq_local", ["acc"]),
        ("copa_local", ["acc"]),
        ("openbookqa_local", ["acc", "acc_norm"]),
        ("piqa_local", ["acc", "acc_norm"]),
    ],
)
def test_the_sample_tasks_run(task: str, metrics: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evals").mkdir()
    lines = (TASKS / f"{task}.yaml").read_text().splitlines()
    (file,) = (line.split()[-1].rstrip("}") for line in lines if "data_files" in line)
    with gzip.open(DATA / file, "rb") as whole, gzip.open(tmp_path / file, "wb") as part:
        part.writelines(line for line, _ in zip(whole, range(12), strict=False))
    monkeypatch.chdir(tmp_path)
    scores = evaluate_tasks(STORIES, [task], tasks_folder=TASKS, limit=10)
    assert [score.metric for score in scores] == metrics
    assert all(score.examples == 10 and 0 <= score.value <= 1 for score in scores)


def test_it_is_silent_and_leaves_the_random_streams(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    evaluate_tasks(STORIES, ["colours"], tasks_folder=folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("{{question}}", "process_docs: !function evil.run\n", "`!function` asks for code, which is not run"),
        ("{{question}}", "class: evil.Task\n", "`class` asks for code"),
        ("{{question}}", "use_prompt: promptsource:x\n", "`use_prompt` asks for code"),
        ("{{question}}", "fewshot_config: {metric: owner/evil}\n", "`metric` 'owner/evil' is none of the harness's"),
        ("{{question}}", "include: ../../evil.yaml\n", "which is not a file of this folder"),
        ("{{question}}", "include: missing.yaml\n", r"missing\.yaml: cannot be read"),
        ("{{question}}", "include: evil.inc\n", r"evil\.inc: `!function` asks for code"),
        ("{{question}}", "a: {dataset_path: owner/evil}\n", "`dataset_path` 'owner/evil' is none of arrow, csv, json"),
        ("{{question}}", "a: {dataset_kwargs: {data_files: 'https://x/y'}}\n", "`dataset_kwargs` names a web address"),
    ],
)
def test_task_files_that_name_code_are_refused(folder: Path, text: str, more: str, message: str) -> None:
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n\ndef run(docs):\n    return docs\n")
    (folder / "evil.inc").write_text("process_docs: !function evil.run\n")
    write_task(folder, text, more)
    with pytest.raises(UserError, match=message):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder)
    assert not mark.exists()


def test_code_runs_if_the_folder_is_trusted(folder: Path) -> None:
    (folder / "good.py").write_text("def first_two(docs):\n    return docs.select(range(2))\n")
    write_task(folder, more="process_docs: !function good.first_two\n")
    (score,) = evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, trust_remote_code=True)
    assert score.examples == 2


def test_templates_cannot_reach_python_internals(folder: Path) -> None:
    write_task(folder, "{{''.__class__.__mro__[1].__subclasses__()|length}}")
    with pytest.raises(UserError, match=r"colours: the harness cannot use it: .*unsafe"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder)


def test_tasks_that_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task hellaswag: not known; there are colours$"):
        evaluate_tasks(STORIES, ["hellaswag"], tasks_folder=folder)
    with pytest.raises(UserError, match="not known"):  # a path in place of a name would bypass the check of the folder
        evaluate_tasks(STORIES, [str(folder / "colours.yaml")], tasks_folder=folder)
    with pytest.raises(UserError, match="no task given; there are colours"):
        evaluate_tasks(STORIES, [], tasks_folder=folder)
    with pytest.raises(UserError, match="no such folder of task files"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=tmp_path / "none")
    with pytest.raises(UserError, match="no task file in it"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=lora(tmp_path / "lora", seed=1))
    with pytest.raises(UserError, match="limit is 0"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, limit=0)
    with pytest.raises(UserError, match="exists, and was left as it is"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, out=folder)
    write_task(folder, "{{no_such_field}}")
    with pytest.raises(UserError, match=r"colours: the harness cannot use it: .*no_such_field"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, out=tmp_path / "out")
    shutil.move(tmp_path / "colours.jsonl", tmp_path / "moved.jsonl")
    with pytest.raises(UserError, match=r"colours: the harness cannot use it: .*colours\.jsonl"):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_requests_that_are_cut_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate_tasks(STORIES, ["colours"], tasks_folder=folder)
    assert not caplog.messages
    tokenizer = load_tokenizer(str(STORIES))
    lengths = [len(tokenizer(f"{one['question']} {end}").input_ids) for one in RECORDS for end in one["options"]]
    at_most = sorted(lengths)[3] - 1  # the last token is not given to the model
    evaluate_tasks(STORIES, ["colours"], tasks_folder=folder, sequence_length=at_most)
    longer = sum(length > at_most + 1 for length in lengths)
    assert 0 < longer < 6
    assert [
        f"{longer} of 6 requests are, with their answers, longer than {at_most} tokens" in one
        for one in caplog.messages
    ] == [True]


def test_a_tokenizer_of_more_ids_than_the_model(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(STORIES, tmp_path / "model"))
    tokenizer = load_tokenizer(str(STORIES))
    tokenizer.add_tokens(["Once"])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="the tokenizer has 513 ids and the model 512; they do not belong together"):
        evaluate_tasks(model, ["colours"], tasks_folder=folder)


def test_a_missing_library_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    message = r"^tasks need lm_eval, which is not installed; run: pip install 'relora\[eval\]'$"
    with pytest.raises(UserError, match=message):
        evaluate_tasks(STORIES, ["colours"], tasks_folder=folder)
