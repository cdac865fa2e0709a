"""Whole optimizer steps: time and peak memory of full-rank training, PEFT, a plain module, LitGPT and ours.

    python benchmarks/steps.py --hidden 1024 --ranks 64 256 --tokens 2048 --layers 6 --threads 2 --json steps.json

Every side trains the same LLaMA (a preset's width and feed-forward size) from the same weights on the same random
tokens: forward, backward, clipping, fused AdamW, gradients dropped, as one micro-batch of sequences of 256, in fp32 or,
with `--bf16`, under autocast. The low-rank sides train the same parameters: factors of every linear layer in the
blocks, embedding, norms and head. That they compute the same is checked by the losses of their first steps.

Each side is a process of its own, and only one works at a time: a round is one step of every side. `speed` is the time
of full rank (of PEFT) over that of the side within the same round: median (quartiles). `peak` is the largest resident
set of the side's process, libraries included; with `--device cuda` what its tensors took on the GPU. Where the main
memory does not hold all sides, they are started anew for every round.

LitGPT is found in an environment of its own, since it wants an older huggingface-hub:

    python -m venv .venv-litgpt
    .venv-litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sides.machine import machine
from sides.processes import LITGPT_PYTHON, SIDES, Setting, side_by_side
from sides.shape import Place, Shape, shape_that_fits

from relora.model.presets import PRESETS

GB = 1e9
USUAL = ("full", "peft", "plain", "litgpt", "ours", "ours-int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048], help="widths of presets")
    parser.add_argument("--ranks", nargs="+", default=["16", "64", "d/8", "d/4"], help="a number, or d/N")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="of a step; times of 256")
    parser.add_argument("--sides", nargs="+", default=USUAL, choices=SIDES)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="products under autocast in bf16, on every side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all figures there")
    add_common(parser)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    place = Place(arguments.device, arguments.bf16)
    print(machine(arguments.threads, place.device))
    print_head()
    for hidden in arguments.hidden:
        for tokens in arguments.tokens:
            shape = shape_of(hidden, tokens, arguments.layers, arguments.vocabulary)
            for rank in dict.fromkeys(rank_of(rank, hidden) for rank in arguments.ranks):
                setting = Setting(shape, rank, tokens, arguments.threads, place, arguments.litgpt)
                rows += compare(setting, list(arguments.sides), arguments.rounds)
                if arguments.json:
                    record = {"machine": machine(arguments.threads, place.device), "rows": rows}
                    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every comparison."""
    parser.add_argument("--layers", type=int, help="by default as many as the preset has, or as fit at full rank")
    parser.add_argument("--vocabulary", type=int, default=32100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--litgpt", default=LITGPT_PYTHON, metavar="PYTHON", help="an interpreter that imports litgpt")


def shape_of(hidden: int, tokens: int, layers: int | None, vocabulary: int) -> Shape:
    """The proportions of the first preset of that width."""
    preset = next((preset for preset in PRESETS.values() if preset.hidden_size == hidden), None)
    if preset is None:
        sys.exit(f"--hidden: no preset is {hidden} wide; {sorted({p.hidden_size for p in PRESETS.values()})}")
    if layers:
        return Shape(hidden, preset.intermediate_size, layers, vocabulary)
    return shape_that_fits(hidden, preset.intermediate_size, preset.num_hidden_layers, vocabulary, tokens)


def rank_of(rank: str, hidden: int) -> int:
    return hidden // int(rank.removeprefix("d/")) if rank.startswith("d/") else int(rank)


def compare(setting: Setting, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One setting: measures, prints and returns its rows."""
    with side_by_side(names, setting) as sides:
        seconds = sides.step_seconds(rounds)
    rows = []
    for name, times in seconds.items():
        row: dict[str, Any] = asdict(setting) | {"side": name, "seconds": times}
        row["peak_bytes"] = sides.workers[name].peak_bytes
        for other in ("full", "peft"):
            if other in seconds:
                row[f"speed_{other}"] = quartiles([a / b for a, b in zip(seconds[other], times, strict=True)])
                row[f"memory_{other}"] = row["peak_bytes"] / sides.workers[other].peak_bytes
        rows.append(row)
        print_row(setting, row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def print_head() -> None:
    print("| d | layers | tokens | r | side | step, s | speed to full | to PEFT | peak, GB | of full | of PEFT |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)


def print_row(setting: Setting, row: dict[str, Any]) -> None:
    def speed(other: str) -> str:
        if f"speed_{other}" not in row:
            return "-"
        low, middle, high = row[f"speed_{other}"]
        return f"{middle:.3f} ({low:.3f} - {high:.3f})"

    def memory(other: str) -> str:
        return f"{row[f'memory_{other}']:.2f}" if f"memory_{other}" in row else "-"

    shape = setting.shape
    middle, peak = statistics.median(row["seconds"]), row["peak_bytes"] / GB
    cells = [shape.hidden, shape.layers, setting.tokens, setting.rank, row["side"], f"{middle:.3f}"]
    cells += [speed("full"), speed("peft"), f"{peak:.2f}", memory("full"), memory("peft")]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
