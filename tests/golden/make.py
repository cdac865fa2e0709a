"""Make a golden run folder with the relora that is installed: `python make.py format-N`, from this folder.

A run of 14 steps, cut off after step 8: past the restart before step 6, so that its checkpoint holds factors that have
moved, their moments and a base that was merged into; the restart before step 10 is still to come.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from relora import pretrain
from relora.config import parse_config
from relora.data.pretraining.prepare import prepare

KEPT = 8
"""The step of the checkpoint that is kept."""
FIGURES = ("loss", "grad_norm", "validation_loss", "loss_before", "loss_after")


def settings(name: str) -> dict[str, object]:
    """The configuration; paths are relative to the folder that the run is started in."""
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "output_dir": name,
        "device": "cpu",
        "model": {"preset": "llama-9m", "vocab_size": 300, "max_position_embeddings": 16, **shape},
        "data": {"train": "data/train", "validation": "data/validation", "sequence_length": 16},
        "lowrank": {"r": 2, "lora_alpha": 2},
        "warm_start": {"steps": 2},
        "restart": {"every_steps": 4, "warmup_steps": 1},
        "schedule": {"total_steps": 14, "warmup_steps": 1},
        "optimizer": {"lr": 5e-3},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "checkpoint": {"every_steps": KEPT},
        "evaluate": {"every_steps": 3, "tokens": 200},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 2},
    }


def make_data() -> None:
    """Ten half pages of the packaged corpus in 300 ids, in `data/`; all golden runs share it."""
    book = sorted((Path(__file__).parents[2] / "corpus").glob("*.txt"))[0].read_text(encoding="utf-8")
    Path("pages").mkdir()
    for page in range(10):
        Path("pages", f"{page}.txt").write_text(book[page * 1000 : (page + 1) * 1000], encoding="utf-8")
    prepare(["pages"], Path("data"), tokenizer=None, train_tokenizer=300, validation=0.2, workers=1)
    shutil.rmtree("pages")


def make(name: str) -> None:
    """Run to the end, note the figures after step `KEPT` in `expected.json`, and go back to that step."""
    folder = pretrain(parse_config(settings(name)), quiet=True).folder
    checkpoint = folder / "checkpoints" / f"step-{KEPT:08d}"
    positions = json.loads((checkpoint / "state.json").read_text())["positions"]
    expected = {}
    for file, length in positions.items():
        content = (folder / file).read_bytes()
        later = [json.loads(line) for line in content[length:].splitlines()]
        expected[file] = [{key: line[key] for key in ("step", *FIGURES) if key in line} for line in later]
        (folder / file).write_bytes(content[:length])
    for path in folder.iterdir():
        if path.name not in ("config.yaml", "checkpoints", *positions):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for other in checkpoint.parent.iterdir():
        if other != checkpoint:
            shutil.rmtree(other)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not Path("data").exists():
        make_data()
    make(sys.argv[1])
