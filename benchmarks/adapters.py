"""What an adapter costs where it is used: beside its base, or merged into it; and what the merge takes.

    python benchmarks/adapters.py runs/quickstart/model runs/answers/adapter

Base, base + adapter (`relora.Adapters`) and merged model write the same number of tokens greedily by turns, in one
process; and each goes over a batch of 1,024 tokens, as a prompt does. Ratios are times over the base's, medians of the
rounds. The merge is a process of its own: seconds, and the most memory beyond that of the imported libraries.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from relora.adapters.multi_adapter import Adapters
from relora.adapters.save_load import load_adapter
from relora.lowrank import merge
from relora.model import open_model

TOKENS = 64
PROMPT = 1024

MERGE = """
import sys
from pathlib import Path
from relora.adapters.merge import merge_adapter
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
before = peak()
merge_adapter(Path(sys.argv[1]), Path(sys.argv[2]), base=sys.argv[3], check=False)
print(peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="model folder")
    parser.add_argument("adapter", help="adapter folder")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    base, beside, merged = (open_model(arguments.base).eval() for _ in range(3))
    adapters = Adapters(beside)
    adapters.load("adapter", arguments.adapter)
    adapters.use("adapter")
    load_adapter(merged, arguments.adapter)
    merge(merged)
    models = {"base": base, "base + adapter": beside, "merged": merged.eval()}
    with torch.inference_mode():
        for what, work in (("token by token", write), ("a prompt", read)):
            compare(what, {name: work(model) for name, model in models.items()}, arguments.rounds)
    merging(arguments.base, arguments.adapter)


def write(model: torch.nn.Module) -> Callable[[], object]:
    ids = torch.arange(8).unsqueeze(0)
    return lambda: model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )


def read(model: torch.nn.Module) -> Callable[[], object]:
    ids = (torch.arange(PROMPT) % 500).view(4, -1)
    return lambda: model(input_ids=ids, use_cache=False)


def compare(what: str, works: dict[str, Callable[[], object]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["base"], strict=True))
        print(f"{what:15} {name:15} {statistics.median(times) * 1e3:8.1f} ms  {ratio:.2f} of the base's", flush=True)


def merging(base: str, adapter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-c", MERGE, adapter, str(Path(folder) / "merged"), base]
        memory = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
        print(
            f"merge: {time.perf_counter() - began:.1f} s with imports; {memory / 1e6:.0f} MB beyond the libraries, "
            f"the model has {size / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
