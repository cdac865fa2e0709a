"""Run folders with the files that the training loop writes, with plausible figures and without training."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

TOKENS_PER_STEP = 8192
CONFIG = """\
output_dir: runs/shakespeare
seed: 0
model: {preset: llama-9m, vocab_size: 4096}
method: relora
lowrank: {r: 64, lora_alpha: 32.0}
warm_start: {steps: 500}
restart: {every_steps: 250, warmup_steps: 25, optimizer: zero}
schedule: {total_steps: 2000, warmup_steps: 100, min_lr_ratio: 0.1}
optimizer: {name: adamw, lr: 0.001, lowrank_lr: 0.002}
"""
ENVIRONMENT = {"python": "3.11.2", "torch": "2.13.0", "device": "cpu", "parameters": 9_437_184}
SAMPLES = [
    {
        "step": 2000,
        "prompt": "The",
        "text": "The morning was cold, and nobody in the house had slept. He went to the window\n"
        "and looked out at the road, where two men were walking slowly towards the bridge.",
    },
    {"step": 2000, "prompt": "It is a truth", "text": " that is not known to all, but she said nothing of it."},
]

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run() -> MakeRun:
    """Function `make_run(folder, steps=2000, method="relora")`, which writes the files of a run into `folder`."""
    return write_run


def write_run(folder: Path, steps: int = 2000, method: str = "relora") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    restarts = list(restart_records(steps)) if method == "relora" else []
    write_lines(folder / "metrics.jsonl", metric_records(steps, method))
    write_lines(folder / "restarts.jsonl", restarts)
    (folder / "config.yaml").write_text(CONFIG.replace("method: relora", f"method: {method}"))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "samples.json").write_text(json.dumps(SAMPLES))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]] | Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def place(step: int, method: str) -> dict[str, Any]:
    """Position of a record after `step` steps: a warm start of 500 steps, then cycles of 250."""
    if method == "full":
        return {"step": step, "tokens": step * TOKENS_PER_STEP, "phase": "full", "cycle": 0}
    phase = "warm_start" if step <= 500 else "low_rank"
    cycle = max(0, (step - 501) // 250)
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "phase": phase, "cycle": cycle}


def held_out_loss(step: int) -> float:
    return 3.05 + 5.3 * math.exp(-step / 130) + 0.9 * math.exp(-step / 900)


def learning_rate_factor(step: int, method: str) -> float:
    if step < 100:
        return step / 100
    since = (step - 500) % 250 if step >= 500 and method == "relora" else 25
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 100) / 1900))
    return cosine * min(1.0, since / 25)


def metric_records(steps: int, method: str) -> Iterator[dict[str, Any]]:
    random = Random(0)
    for step in range(0, steps + 1, 10):
        where = place(step, method)
        if step:
            factor = learning_rate_factor(step, method)
            low_rank = {"lowrank_lr": 2e-3 * factor} if where["phase"] == "low_rank" else {}
            speed = (31_000 if low_rank else 24_000) * random.gauss(1, 0.02)
            yield {
                "kind": "train",
                **where,
                "loss": held_out_loss(step) - 0.03 + random.gauss(0, 0.04),
                "lr": 1e-3 * factor,
                **low_rank,
                "grad_norm": 0.4 + 2 * math.exp(-step / 60) + abs(random.gauss(0, 0.08)),
                "tokens_per_second": speed,
                "step_seconds": TOKENS_PER_STEP / speed,
                "peak_memory_bytes": 1_400_000_000,
            }
        if step % 50 == 0:
            loss = held_out_loss(step)
            yield {
                "kind": "evaluation",
                **where,
                "validation_loss": loss,
                "perplexity": math.exp(loss),
                "bits_per_byte": loss / math.log(2) / 3.6,
                "validation_tokens": 200_000,
                "seconds": 2.4,
            }


def restart_records(steps: int) -> Iterator[dict[str, Any]]:
    random = Random(1)
    for cycle, step in enumerate(range(750, min(steps, 1999) + 1, 250), start=1):
        yield {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "cycle": cycle,
            "loss_before": held_out_loss(step),
            "loss_after": held_out_loss(step) + 2e-7,
            "optimizer": "zero",
            "moments_cleared": 2_359_296,
            "seconds": 0.31,
            "layers": [layer_record(f"model.layers.{index}.mlp.up_proj", cycle, random) for index in range(4)],
        }


def layer_record(name: str, cycle: int, random: Random) -> dict[str, Any]:
    decay = 7 + 3 * cycle + random.random()
    values = [2.1 * math.exp(-index / decay) + 0.02 for index in range(64)]
    shares = [value / sum(values) for value in values]
    return {
        "name": name,
        "shape": [1024, 256],
        "update_norm": math.sqrt(sum(value**2 for value in values)) / cycle,
        "weight_norm": 48.0 + cycle,
        "effective_rank": math.exp(-sum(share * math.log(share) for share in shares)),
        "singular_values": values,
    }
