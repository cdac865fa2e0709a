"""Runs the zoo: every family in a process of its own, so that a crash or a hang of one does not stop the rest."""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.zoo.stages import STAGES, Bench, Outcome, as_tree, run_stage, run_stages
from tests.zoo.tiny_models import CANNOT_BE_BUILT, make_tiny_model

TIMEOUT_SECONDS = 180
PRELOADED = (
    *("tests.zoo.stages", "relora.recipes.pretrain", "relora.recipes.finetune", "relora.adapters.merge"),
    *("relora.export.checkpoint", "relora.planning.plan", "relora.cli.training", "relora.cli.models"),
)
"""Modules that the server of processes imports once; otherwise each family would wait for torch."""


def run_zoo(families: Iterable[str], *, jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the record of each family: its name and the outcomes of its stages, or why it cannot be built."""
    with tempfile.TemporaryDirectory(prefix="zoo-cache-") as cache, ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(run_family, cache=Path(cache)), families)


def run_family(family: str, *, cache: Path) -> dict[str, Any]:
    """Run the stages of one family in a process of its own.

    Args:
        cache: folder for what the package measures of this machine; shared, because measuring takes long.
    """
    if family in CANNOT_BE_BUILT:
        return {"family": family, "cannot_be_built": CANNOT_BE_BUILT[family]}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo-") as place:
        file = Path(place) / "outcomes.json"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        process = context.Process(target=_in_process, args=(family, Path(place), cache, file))
        process.start()
        process.join(TIMEOUT_SECONDS)
        ended = "crashed" if not process.is_alive() else f"still ran after {TIMEOUT_SECONDS} s"
        process.kill()
        process.join()
        written = file.read_text().replace(f"{place}/", "") if file.exists() else "{}"  # no message names this machine
        record: dict[str, Any] = {"family": family, "stages": json.loads(written)}
    for name in ("build", *STAGES):
        record["stages"].setdefault(name, as_tree(Outcome(name, "failed", f"the process {ended}")))
    return {**record, "seconds": round(time.perf_counter() - begun, 1)}


def _in_process(family: str, place: Path, cache: Path, file: Path) -> None:
    """Build the model and run its stages; write the outcomes after each, so that those before a crash are kept."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.nice(5)
    torch.set_num_threads(1)
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    found = {"build": run_stage("build", lambda: _build(family, place / family))}
    _write(found, file)
    if found["build"].outcome != "ok":
        _write({**found, **{name: Outcome(name, "not run", "build was not ok") for name in STAGES}}, file)
        return
    bench = Bench(place / family, place / "work")
    run_stages(bench, found, lambda: _write(found, file))
    shutil.rmtree(place / "work", ignore_errors=True)


def _build(family: str, folder: Path) -> dict[str, Any]:
    """Write the tiny model of a family; a stage of its own, without notes."""
    make_tiny_model(family, folder)
    return {}


def _write(outcomes: dict[str, Outcome], file: Path) -> None:
    """Write outcomes as JSON, in one step."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({name: as_tree(outcome) for name, outcome in outcomes.items()}))
    partial.rename(file)
