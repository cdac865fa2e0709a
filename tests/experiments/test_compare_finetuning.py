"""Fine-tuning methods side by side: each in its own process, the best rate of each, and the files that are left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora.config import FinetuneConfig, parse_finetune_config, to_yaml
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.experiments.compare_finetuning import candidates_of, compare_finetuning
from relora.model.load import build_model
from relora.model.save import save_model
from relora.report.history import read_history


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> FinetuneConfig:
    """Four steps on 24 records."""
    tokenizer = load_tokenizer(str(prepared / "train" / "tokenizer"))
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = build_model("llama-9m", shape, seed=0, eos_token_id=tokenizer.eos_token_id)
    records = [{"prompt": f"Count to {n}.", "response": ", ".join(map(str, range(n % 5)))} for n in range(1, 25)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    return parse_finetune_config(
        {
            "output_dir": str(tmp_path / "compared"),
            "task": "instruct",
            "model": {"path": str(save_model(model, tmp_path / "base", tokenizer))},
            "data": {"train": str(tmp_path / "records.json"), "validation_share": 0.2, "template": "plain"},
            "lowrank": {"r": 2},
            "schedule": {"total_steps": 4, "warmup_steps": 0},
            "batch": {"sequences": 4, "micro_sequences": 4},
            "samples": {"max_new_tokens": 4},
            "log": {"every_steps": 1, "trackers": []},
        }
    )


def test_the_best_rate_of_each_method_counts(config: FinetuneConfig) -> None:
    best = compare_finetuning(config, {"full": [1e-2], "lora": [1e-5, 2e-2]}, answers=2)
    assert [one.method for one in best] == ["full", "lora"]
    full, lora = best
    assert lora.lr == 2e-2  # the run with the lower rate hardly learns
    assert full.trainable_parameters > 10 * lora.trainable_parameters
    assert full.result_bytes > 10 * lora.result_bytes and full.checkpoint_bytes > 10 * lora.checkpoint_bytes
    assert full.tokens == lora.tokens and full.peak_memory_bytes > 0 < full.seconds
    folder = Path(config.output_dir)
    record = json.loads((folder / "comparison.json").read_text())
    assert len(record["best"]) == 2 and len(record["all"]) == 3
    assert "| lora | 0.02 |" in (folder / "comparison.md").read_text()
    page = (folder / "comparison.html").read_text()
    assert page.count("<blockquote>") == 2 and "reference" in page and "Count to" in page
    # seconds are those of training steps: evaluations, which took time as well, are not among them
    history = read_history(folder / "lora-0.02")
    evaluation_seconds = sum(one["seconds"] for one in history.evaluations)
    assert evaluation_seconds > 0.01 * lora.seconds
    assert lora.seconds == pytest.approx(sum(one["step_seconds"] for one in history.train))
    # a second call finds its runs finished and measures the same
    again = compare_finetuning(config, {"full": [1e-2]}, answers=2)
    assert again[0].loss == full.loss


def test_a_comparison_that_is_stopped_leaves_a_checkpoint(config: FinetuneConfig, tmp_path: Path) -> None:
    """SIGTERM reaches the comparison alone, as from a scheduler, and must be passed on to the run under way."""
    schedule = config.schedule.model_copy(update={"total_steps": 5000})
    (tmp_path / "config.yaml").write_text(to_yaml(config.model_copy(update={"schedule": schedule})))
    run = Path(config.output_dir) / "lora-0.001"
    command = [sys.executable, "-c", "from relora.cli import main; main()", "compare", str(tmp_path / "config.yaml")]
    command += ["--methods", "lora", "--lr", "lora=1e-3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("relora: SIGTERM: stopped, its runs with a checkpoint; the same command continues\n")
    assert any((run / "checkpoints").glob("step-*"))


def test_what_a_run_refuses_is_said_in_one_line(config: FinetuneConfig) -> None:
    with pytest.raises(UserError, match=r"lowrank\.r \(100\) exceeds"):
        compare_finetuning(
            config.model_copy(update={"lowrank": config.lowrank.model_copy(update={"r": 100})}),
            {"lora": [None]},
            answers=1,
        )
    with pytest.raises(UserError, match="`lor` is none of"):
        compare_finetuning(config, {"lor": [None]}, answers=1)


def test_the_command_line_names_methods_and_rates() -> None:
    assert candidates_of("full, lora", ["lora=1e-3,2e-3"]) == {"full": [None], "lora": [1e-3, 2e-3]}
    for methods, rates in (("", []), ("full", ["lora=1"]), ("full", ["full=high"])):
        with pytest.raises(UserError):
            candidates_of(methods, rates)
