"""`relora prepare` beside the usual script: `datasets.map` with the tokenizer, blocks of one length, `save_to_disk`.

    python benchmarks/prepare.py corpus --tokenizer gpt2 --workers 1 2

A source is a folder of .txt or .jsonl(.gz) files; its documents are written to one JSONL file, again and again until it
has `--megabytes` of text, and both sides start from that file. Each side is a process of its own, held to as many cores
as it has workers, and takes its turn; ratios are medians over the rounds, of wall-clock time and of the CPU time of
the process with all that it started. Repeated text flatters a side that remembers words: give more text than it takes.
Before anything is timed, the tokens of both sides are compared, all of them.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np

from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.shards import PreparedFolder

SEQUENCE_LENGTH = 256
CHECKED_MEGABYTES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        check(arguments, folder)
        megabytes = write_text(arguments.sources, folder / "text.jsonl", arguments.megabytes)
        print(f"{arguments.tokenizer}, {megabytes:.1f} MB of text, blocks of {SEQUENCE_LENGTH}")
        for workers in arguments.workers:
            compare(arguments.tokenizer, folder, workers, arguments.rounds, megabytes)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")


def write_text(sources: list[str], file: Path, megabytes: float) -> float:
    """The documents of the sources as JSONL, repeated up to `megabytes`; how many it became."""
    texts = list(Corpus(sources).documents())
    written = 0
    with file.open("w", encoding="utf-8") as out:
        for text in cycle(texts):
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= megabytes * 1e6:
                return written / 1e6
    raise AssertionError  # a cycle has no end


def check(arguments: argparse.Namespace, folder: Path) -> None:
    """Both sides give the same tokens: ours as they lie, theirs before they are cut into blocks."""
    write_text(arguments.sources, folder / "text.jsonl", CHECKED_MEGABYTES)
    ours(arguments.tokenizer, folder, 1)
    usual(arguments.tokenizer, folder, 1, 0)
    from datasets import load_from_disk

    theirs = np.fromiter(chain.from_iterable(load_from_disk(str(folder / "usual"))["input_ids"]), dtype=np.int64)
    prepared = PreparedFolder.open(folder / "ours" / "train")
    if not np.array_equal(prepared.window(0, prepared.tokens), theirs):
        raise SystemExit("the two sides give different tokens")
    print(f"{prepared.tokens:,} tokens of {CHECKED_MEGABYTES} MB: the same on both sides")


def compare(tokenizer: str, folder: Path, workers: int, rounds: int, megabytes: float) -> None:
    """The two sides by turns; prints rates and the medians of the ratios."""
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "usual": []}
    for _ in range(rounds):
        times["ours"].append(ours(tokenizer, folder, workers))
        times["usual"].append(usual(tokenizer, folder, workers, SEQUENCE_LENGTH))
    for name, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"  {workers} workers, {name:5}: {wall:6.1f} s ({megabytes / wall:.2f} MB/s), {cpu:6.1f} s of CPU")
    wall, cpu = (
        statistics.median(b[column] / a[column] for a, b in zip(times["ours"], times["usual"], strict=True))
        for column in (0, 1)
    )
    print(f"  {workers} workers: {wall:.2f} times as fast, {cpu:.2f} times by CPU time")


def ours(tokenizer: str, folder: Path, workers: int) -> tuple[float, float]:
    command = [
        "-c",
        "from relora.cli import main; main()",
        "prepare",
        str(folder / "text.jsonl"),
        "--out",
        str(folder / "ours"),
    ]
    options = ["--tokenizer", tokenizer, "--validation", "0", "--workers", str(workers)]
    shutil.rmtree(folder / "ours", ignore_errors=True)
    return timed([*command, *options], workers, folder)


def usual(tokenizer: str, folder: Path, workers: int, block: int) -> tuple[float, float]:
    shutil.rmtree(folder / "usual", ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    text, out = str(folder / "text.jsonl"), str(folder / "usual")
    script = (
        f"from benchmarks.prepare import usual_script as run; run({tokenizer!r}, {text!r}, {out!r}, {workers}, {block})"
    )
    return timed(["-c", script], workers, folder)


def timed(arguments: list[str], workers: int, folder: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a Python process on as many cores as it has workers."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": search_path()}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def search_path() -> str:
    """This repository and what the caller's Python finds: a process started in any folder sees the same modules."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])


def usual_script(tokenizer_name: str, text: str, out: str, workers: int, block: int) -> None:
    """What the examples of `transformers` do (`run_clm.py`), with an EOS after every document; 0: no blocks."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[at : at + block] for at in range(0, len(ids) - block + 1, block)]}

    processes = workers if workers > 1 else None
    dataset = load_dataset("json", data_files=text, split="train")
    dataset = dataset.map(tokenize, batched=True, num_proc=processes, remove_columns=dataset.column_names)
    if block:
        dataset = dataset.map(group, batched=True, num_proc=processes)
    dataset.save_to_disk(out)


if __name__ == "__main__":
    main()
