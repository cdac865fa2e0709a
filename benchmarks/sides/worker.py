"""One side in a process of its own: reads commands from standard input, answers each with one line of JSON.

step       a whole optimizer step: seconds, loss
profile    one more step under the profiler: see `profiling`
products   the bare products of a step: see `products`
restart    a restart of the low-rank layers (ours only): seconds, and memory beyond what was resident
peak       the most memory that was ever resident in this process, on a GPU that its tensors took there, bytes
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sides.draws import sequences
from sides.shape import Place, Shape
from sides.side import Side


class Worker:
    """A side and what it trains on."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.shape, self.tokens = Shape(**order["shape"]), order["tokens"]
        self.place = Place(**order["place"])
        self.ids = sequences(self.tokens, self.shape.vocabulary)
        build = getattr(importlib.import_module(order["module"]), order["function"])
        self.side: Side = build(self.shape, order["rank"], self.place, **order["options"])

    def step(self) -> dict[str, Any]:
        began = time.perf_counter()
        loss = self.side.step(self.ids)
        if self.place.device != "cpu":
            torch.accelerator.synchronize()
        return {"seconds": time.perf_counter() - began, "loss": loss}

    # what these commands import would count in the peak of a process that only steps

    def profile(self) -> dict[str, Any]:
        from sides.profiling import profiled

        return dataclasses.asdict(profiled(lambda: self.side.step(self.ids), self.shape.vocabulary))

    def products(self) -> dict[str, Any]:
        from sides.products import product_seconds

        return product_seconds(self.shape, self.tokens)

    def restart(self) -> dict[str, Any]:
        from sides.restarting import timed_restart

        return timed_restart(self.side)

    def peak(self) -> dict[str, Any]:
        if self.place.device != "cpu":
            return {"bytes": torch.accelerator.max_memory_allocated()}
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        # getrusage would begin with what the parent process had taken
        return {"bytes": next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM:" in line)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    try:
        worker = Worker(order)
    except ImportError as error:
        print(json.dumps({"unavailable": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({}), file=answers, flush=True)
    for command in sys.stdin:
        print(json.dumps(getattr(worker, command.strip())()), file=answers, flush=True)


if __name__ == "__main__":
    main()
