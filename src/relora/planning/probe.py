"""Real training steps in a process of their own: peak memory and time, which replace or check the predicted ones.

A process has one peak in its life, so each phase gets a fresh process. It takes three steps on synthetic tokens, with
the model, optimizer, kernels and settings of the run. Nothing is written except one small file in the user's cache:
what a process takes before it has a model.
"""

import contextlib
import json
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from relora.config import RunConfig, parse_config
from relora.device import choose_device, peak_memory_bytes
from relora.errors import RunStopped
from relora.files.atomic import write_json
from relora.files.cache import user_cache
from relora.lowrank import inject
from relora.lowrank.residual import residual_steps
from relora.measure import token_loss
from relora.model.blocks import training_blocks
from relora.model.unused import leave_out_unused
from relora.planning.model_shape import with_settled_dtype
from relora.processes import Call, OutOfMemory, run_in_processes
from relora.recipes.from_settings import autocast_of, lowrank_of, optimizer_of, settled_lowrank
from relora.recipes.pretraining_inputs import open_configured_model
from relora.train.optim import build_optimizer, check_optimizer
from relora.train.schedule import Phase
from relora.train.step import train_step

STEPS = 3
"""Number of steps: the first allocates the moments, the second is the first with them, the third confirms its time."""
_TINY_RUN: dict[str, Any] = {
    "output_dir": "none",
    "device": "cpu",
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
"""Configuration whose model and steps take next to nothing, so that a process with it takes what any process does."""


@dataclass(frozen=True)
class Measured:
    """Peak memory and time of real steps."""

    peak: int
    """Peak in bytes: on a GPU of tensors, elsewhere of the whole process."""
    step_seconds: float
    """Seconds of the faster of the steps after the first."""


def probe(config: RunConfig, phase: Phase) -> Measured:
    """Take three real steps of a phase in a fresh process.

    Raises:
        UserError: the run would refuse the configuration for the same reason.
        RunStopped: the process ran out of memory, or ended by an error that it has printed.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    check_optimizer(config.optimizer.name)
    step = f"the {phase.replace('_', ' ')} step"
    try:
        [measured] = run_in_processes([Call(step, take_steps, (config, phase))])
    except OutOfMemory:
        raise RunStopped(
            f"{step} died, most likely for lack of memory; `relora plan CONFIG --fit SIZE` finds what fits"
        ) from None
    return measured


def process_bytes(folder: Path | None = None) -> int:
    """Return the bytes that a training process takes in addition to its tensors: interpreter, libraries, work space.

    They are measured once for each combination of versions and number of threads, by steps of a tiny model.

    Args:
        folder: where the result is kept; the user's cache unless given.
    """
    folder = folder or user_cache()
    versions = "-".join(version(package) for package in ("relora", "torch", "transformers"))
    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{versions}-{torch.get_num_threads()}")
    file = folder / f"process-{label}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
        if kept > 0:
            return kept
    measured = probe(parse_config(_TINY_RUN), "full").peak
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"bytes": measured}, indent=None)
    return measured


def take_steps(config: RunConfig, phase: Phase) -> Measured:
    """Take the steps of a probe in this process and measure them."""
    device = choose_device(config.device)
    config = with_settled_dtype(config)
    model, optimizer = model_and_optimizer(config, phase, device)
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


def model_and_optimizer(config: RunConfig, phase: Phase, device: torch.device) -> tuple[PreTrainedModel, Optimizer]:
    """Build the model of a phase in training mode, and the optimizer with the settings of the run.

    Args:
        config: a configuration with a settled dtype.
    """
    model = open_configured_model(config, trust_remote_code=config.model.trust_remote_code).to(device)
    model.train()
    leave_out_unused(model, config.data.sequence_length)
    settings = optimizer_of(config, model, lowrank_of(config))
    if phase == "low_rank":
        inject(model, settled_lowrank(config, model, device), seed=config.seed)
    return model, build_optimizer(model, settings)
