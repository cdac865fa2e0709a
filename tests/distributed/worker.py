"""Script that torchrun starts: plays the scenes of a folder one after the other, each a whole run with some fault.

A scene: {"name", "tree": configuration, "until": step or null, "fault": [kind, rank, step] or null}. Faults:

    nan     the loss of a rank is not a number
    skew    a rank changes one bit of one weight
    slow    a rank takes longer over every batch
    save    the disk of a rank is full at its next checkpoint
    seed    each rank has its own number as the seed
"""

import errno
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora.config import parse_config
from relora.config.reading import parse_finetune_config
from relora.distributed.agree import tensor_hashes
from relora.distributed.group import current_group, together
from relora.errors import ReloraError
from relora.measure import Evaluation
from relora.recipes import finetune, pretrain
from relora.recipes.finetuning_inputs import FinetuningInputs, gather_finetuning
from relora.recipes.job import Job, Position, measure_result, run_job
from relora.recipes.pretraining_inputs import PretrainingInputs, gather_pretraining
from relora.train.checkpoint import Checkpoints
from relora.train.run import Run


def main(place: Path) -> None:
    for scene in json.loads((place / "scenes.json").read_text()):
        started = time.monotonic()
        met: dict[str, Any] = {}
        try:
            met |= played(scene)
        except ReloraError as error:
            met |= {"error": type(error).__name__, "line": str(error), "status": error.exit_status}
        met["seconds"] = time.monotonic() - started
        (place / f"{scene['name']}-{os.environ['RANK']}.json").write_text(json.dumps(met))


def played(scene: dict[str, Any]) -> dict[str, Any]:
    """Train one scene to its end with the other ranks."""
    with together() as group:
        with group.stage("the inputs"):
            fault = scene.get("fault") or (None, None, None)
            seed = {"seed": group.rank} if fault[0] == "seed" else {}
            inputs, job = gathered(scene["tree"] | seed)
            job = with_fault(job, scene.get("fault"))

        def finish(run: Run, folder: Path, position: Position) -> Evaluation:
            return measure_result(run, position, lambda: inputs.evaluate_whole(inputs.model, run.reporter))

        result = run_job(job, finish, fresh=False, strict=False, quiet=True, until=scene.get("until"))
    return {"loss": result.evaluation.loss, "hash": hash_of(inputs.model), "steps": result.steps}


def gathered(tree: dict[str, Any]) -> tuple[PretrainingInputs | FinetuningInputs, Job]:
    """Inputs and job of a configuration of either kind."""
    if "task" in tree:
        config = parse_finetune_config(tree)
        examples = gather_finetuning(config)
        return examples, finetune.job_of(config, examples)
    settings = parse_config(tree)
    inputs = gather_pretraining(settings)
    return inputs, pretrain.job_of(settings, inputs)


def hash_of(model: torch.nn.Module) -> int:
    """One number for all weights."""
    return int(tensor_hashes(dict(model.named_parameters())).sum())


def with_fault(job: Job, fault: tuple[str, int, int] | None) -> Job:
    """Return the job with a fault on one rank, from one step on or at that step."""
    if fault is None or fault[1] != current_group().rank:
        return job
    kind, _, step = fault
    task, reached = job.task, [0]

    def batch_at(number: int) -> tuple[Tensor, ...]:
        reached[0] = number
        if kind == "slow" and number >= step:
            time.sleep(0.15)
        if kind == "skew" and number == step:
            weight = task.model.get_parameter("model.layers.1.self_attn.v_proj.weight")
            weight.data.view(torch.int32).view(-1)[5] ^= 1
        if kind == "save" and number == step:
            full_disk()
        return task.batch_at(number)

    def loss(*inputs: Any) -> tuple[Tensor, Tensor]:
        total, tokens = task.loss(*inputs)
        training = torch.is_grad_enabled()
        return (total * torch.nan if kind == "nan" and training and reached[0] == step else total), tokens

    return replace(job, task=replace(task, batch_at=batch_at, loss=loss))


def full_disk() -> None:
    """Let every later checkpoint of this process meet a full disk."""

    def write(self: Checkpoints, open_folder: Any, content: Any) -> Any:
        with open_folder:
            raise self._not_written(content.state.step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    Checkpoints._write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
