"""Real steps in a process of their own: what the process takes, how long a step takes, what a plan is held against.

A fresh process has one peak, so each phase gets one. Tokens are synthetic; nothing is written but one small file in the
user's cache, which keeps what a process takes before it has a model.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from relora.config import RunConfig, parse_config
from relora.device import choose_device, peak_memory_bytes
from relora.errors import RunStopped
from relora.files.atomic import write_json
from relora.files.cache import user_cache
from relora.lowrank import inject
from relora.lowrank.residual import residual_steps
from relora.measure import token_loss
from relora.model.blocks import training_blocks
from relora.recipes.from_settings import autocast_of, lowrank_of, settled_lowrank
from relora.recipes.pretraining_inputs import open_configured_model
from relora.train.optim import OptimizerConfig, build_optimizer, check_optimizer
from relora.train.projected_optimizers import ProjectionConfig
from relora.train.schedule import Phase
from relora.train.step import train_step

STEPS = 3
"""The first lays out the moments, the second is the first that has them, the third tells whether it stays."""
_NOTHING: dict[str, Any] = {
    "output_dir": "none",
    "model": {
        "preset": "llama-9m",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    },
    "data": {"train": "none", "validation": "none", "sequence_length": 16},
    "lowrank": {"r": 4},
    "schedule": {"total_steps": 4, "warmup_steps": 0},
    "warm_start": {"steps": 1},
    "batch": {"sequences": 2, "micro_sequences": 1},
}
"""Model and steps that are next to nothing."""


@dataclass(frozen=True)
class Measured:
    """What steps took."""

    peak: int
    """Bytes: on a GPU of tensors, elsewhere of the whole process."""
    step_seconds: float


def probe(config: RunConfig, phase: Phase) -> Measured:
    """Three real steps of a phase in a fresh process.

    Raises:
        RunStopped: the process died, as where memory is short. UserError: as the run's.
    """
    check_optimizer(config.optimizer.name)
    context = multiprocessing.get_context("spawn")
    tree = config.model_dump(mode="json", exclude_none=True)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_take_steps, tree, phase, torch.get_num_threads()).result()
        except (MemoryError, RuntimeError) as error:
            if not _for_lack_of_memory(error):
                raise
            raise RunStopped(
                f"the {phase.replace('_', ' ')} step died, most likely for lack of memory; "
                "`relora plan CONFIG --fit SIZE` finds what fits"
            ) from None


def _for_lack_of_memory(error: Exception) -> bool:
    """Whether the system killed the process, or an allocation failed; the CPU's says so in words only."""
    died = isinstance(error, concurrent.futures.process.BrokenProcessPool | MemoryError | torch.OutOfMemoryError)
    return died or (type(error) is RuntimeError and "allocate memory" in str(error))


def process_bytes(folder: Path | None = None) -> int:
    """What a training process takes beside its tensors: interpreter, libraries, their work space.

    Measured by steps of a model that is next to nothing; kept in `folder` (by default the user's cache).
    """
    folder = folder or user_cache()
    versions = "-".join(version(package) for package in ("relora", "torch", "transformers"))
    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{versions}-{torch.get_num_threads()}")
    file = folder / f"process-{label}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
        if kept > 0:
            return kept
    measured = probe(parse_config({**_NOTHING, "device": "cpu"}), "full").peak
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"bytes": measured}, indent=None)
    return measured


def _take_steps(tree: dict[str, Any], phase: Phase, threads: int) -> Measured:
    torch.set_num_threads(threads)
    config = parse_config(tree)
    device = choose_device(config.device)
    model = open_configured_model(config, trust_remote_code=config.model.trust_remote_code).to(device)
    model.train()
    if phase == "low_rank":
        inject(model, settled_lowrank(config, model, device), seed=config.seed)
    settings = config.optimizer
    optimizer = build_optimizer(
        model,
        OptimizerConfig(
            name=settings.name,
            lr=settings.lr,
            lowrank_lr=config.lowrank_lr,
            projection=ProjectionConfig(**settings.projection.model_dump()),
        ),
    )
    shape = (config.batch.sequences, config.data.sequence_length)
    ids = torch.arange(shape[0] * shape[1]).view(shape) % model.get_input_embeddings().num_embeddings
    seconds = []
    with training_blocks(model, checkpointing=config.memory.activation_checkpointing, compiled=config.compile):
        for step in range(STEPS):
            started = time.perf_counter()
            with residual_steps(model, optimizer, lowrank_of(config).residual, step):
                train_step(
                    model,
                    optimizer,
                    (ids, ids),
                    token_loss,
                    seed=config.seed,
                    step=step,
                    micro_sequences=config.batch.micro_sequences,
                    clip_grad_norm=config.optimizer.clip_grad_norm,
                    autocast=autocast_of(config),
                    check_gradients=False,
                )
            seconds.append(time.perf_counter() - started)
    return Measured(peak_memory_bytes(device), min(seconds[1:]))
