"""Script that torchrun starts: plays the scenes of a folder one after the other, each a run of the command's own kind.

A scene: {"name", "tree": configuration, "until": step or null, "machines": number of machines that the ranks stand for,
"die": step at whose checkpoint rank 1 is killed while it writes, or null, "skew": step before which one bit of a weight
changes on rank 3, or null}. Trees with a `task` are fine-tuned.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from relora.config import parse_config, parse_finetune_config
from relora.distributed import group as groups
from relora.errors import ReloraError
from relora.recipes.finetune import finetune
from relora.recipes.pretrain import pretrain
from relora.train import checkpoint as checkpoints
from relora.train import loop
from relora.train.step import train_step


def main(place: Path) -> None:
    world, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    for scene in json.loads((place / "scenes.json").read_text()):
        os.environ["LOCAL_WORLD_SIZE"] = str(world // scene.get("machines", 1))
        groups._group = None  # every scene joins anew, as a new process does
        os.environ["TORCHELASTIC_RESTART_COUNT"] = scene["name"]
        os.environ["MASTER_PORT"] = str(port)
        met: dict[str, Any] = {}
        if scene.get("die") and os.environ["RANK"] == "1":
            die_in_checkpoint(scene["die"])
        loop.train_step = skewed(scene["skew"]) if scene.get("skew") and os.environ["RANK"] == "3" else train_step
        try:
            if "task" in scene["tree"]:
                result = finetune(parse_finetune_config(scene["tree"]), quiet=True)
            else:
                result = pretrain(parse_config(scene["tree"]), until=scene.get("until"), quiet=True)
            met = {"steps": result.steps, "loss": result.evaluation.loss, "bytes": result.memory.weights}
        except ReloraError as error:
            met = {"error": type(error).__name__, "line": str(error), "status": error.exit_status}
        (place / f"{scene['name']}-{os.environ['RANK']}.json").write_text(json.dumps(met))


def skewed(at: int) -> Any:
    """A step before which, at one step, one bit of this process's rows changes."""

    def step(model: torch.nn.Module, *rest: Any, step: int, **others: Any) -> Any:
        if step == at:
            weight = next(p for name, p in model.named_parameters() if name.endswith("down_proj.weight"))
            weight.data.view(torch.int32).view(-1)[5] ^= 1
        return train_step(model, *rest, step=step, **others)

    return step


def die_in_checkpoint(step: int) -> None:
    """Let this process be killed when it has written one file of the checkpoint of a step."""
    write = checkpoints.write_tensors

    def fatal(path: Path, *rest: Any) -> None:
        write(path, *rest)
        if f"step-{step:08d}" in path.parent.name:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write_tensors = fatal


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
