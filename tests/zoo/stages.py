"""The stages that every model of the zoo goes through, from opening a folder to an exported run.

Each stage uses the package as a person would: the commands in this process, or the functions of its Python API. Its
outcome is `ok`, `refused` (the package said in one line of exit status 2 what is wrong) or `failed` (anything else: an
exception, another exit status, or numbers that differ from those of plain transformers and PEFT).
"""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from tests.command import Ended, call
from tests.zoo.tiny_models import PREPARED, VOCABULARY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from relora import LowRankConfig, inject
from relora.config import load_config
from relora.errors import UserError
from relora.lowrank.blocks import block_lists, is_inside
from relora.measure import token_loss
from relora.model import open_model
from relora.model.blocks import training_blocks
from relora.model.head import whole_logits_reason
from relora.model.load import quiet_transformers
from relora.recipes.pretraining_inputs import open_data

ABSOLUTE, RELATIVE = 1e-5, 1e-5
"""Tolerances of logits and losses that are computed twice in fp32."""
MERGED = 1e-4
"""Tolerance of logits of a model whose weights were merged in fp32, relative to the largest if that is above 1."""
LENGTH = 32
STATUS_OF_MISTAKE = 2


class Difference(Exception):
    """Numbers of the package differ from the reference."""


@dataclass
class Outcome:
    """Outcome of one stage."""

    stage: str
    outcome: str
    """`ok`, `refused`, `failed`, or `not run` because an earlier stage that it needs was not ok."""
    text: str = ""
    """Message of a refusal, or the exception of a failure."""
    place: str = ""
    """File and line that raised it, and the last line of this package before it."""
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """A command ended with one line and the exit status of a mistake."""


class Bench:
    """One model folder and a working folder for what the stages write."""

    def __init__(self, model: Path, work: Path) -> None:
        self.model, self.work = model, work
        self.run, self.tuned = work / "run", work / "tuned"
        self.config, self.finetune_config = work / "pretrain.yaml", work / "finetune.yaml"
        work.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(pretrain_settings(model, self.run)))
        examples = work / "examples.jsonl"
        examples.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        self.finetune_config.write_text(yaml.safe_dump(finetune_settings(model, self.tuned, examples)))

    def opened(self) -> PreTrainedModel:
        """The model, opened by the package."""
        return open_model(self.model)

    def open(self) -> dict[str, Any]:
        """Open the model, and compare its logits with those of plain transformers."""
        model, ids = self.opened(), batch()[:, :LENGTH]
        with torch.no_grad():
            compare(model.eval()(input_ids=ids, use_cache=False).logits, logits_of(self.model, ids), ABSOLUTE, "logits")
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": model.config._attn_implementation,
            "tied": bool(getattr(model.config, "tie_word_embeddings", False)),
        }

    def loss(self) -> dict[str, Any]:
        """Compare the loss of a batch with the cross-entropy of the logits of plain transformers."""
        model, ids = self.opened().eval(), batch()
        total, tokens = token_loss(model, ids[:, :-1], ids[:, 1:])
        logits = logits_of(self.model, ids[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        compare(total / tokens, expected, RELATIVE * float(expected.abs()), "loss")
        return {"whole_logits": whole_logits_reason(model)}

    def inject(self) -> dict[str, Any]:
        """Add factors to all linear layers of the blocks; the function of the model must not change."""
        model, ids = self.opened().eval(), batch()[:, :LENGTH]
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            report = inject(model, LowRankConfig(r=4, target_modules="all-linear"))
            compare(model(input_ids=ids, use_cache=False).logits, before, ABSOLUTE, "logits after injection")
        return {"layers": len(report.targets), **coverage(self.opened(), report.targets)}

    def train(self) -> dict[str, Any]:
        """Pretrain: a warm start, the switch and a restart; the model must have the perplexity that was reported."""
        command("pretrain", self.config, "--quiet")
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        reported = [record["validation_loss"] for record in records if "validation_loss" in record][-1]
        losses = [record["loss"] for record in records if "loss" in record]
        if not all(torch.isfinite(torch.tensor(losses))):
            raise Difference(f"losses are not finite: {losses}")
        found = plain_loss(self.run / "model", self.config)
        compare(torch.tensor(found), torch.tensor(reported), 1e-4 * reported, "held-out loss of RUN/model")
        return {}

    def finetune(self) -> dict[str, Any]:
        """Fine-tune with LoRA and merge the adapter; the verb compares logits itself."""
        command("finetune", self.finetune_config, "--quiet")
        merged = command("adapters", "merge", self.tuned / "adapter", "--out", self.work / "merged", "--json")
        difference = json.loads(merged.out)["largest_logit_difference"]
        largest = float(logits_of(self.work / "merged", batch()[:, :LENGTH]).abs().max())
        if difference is None or not difference < MERGED * max(1.0, largest):
            raise Difference(f"merged logits differ by {difference} (largest {largest:.3g})")
        return {}

    def peft(self) -> dict[str, Any]:
        """Open the adapter with PEFT on the plain base; its logits must be those of the merged model."""
        ids = batch()[:, :LENGTH]
        with quiet_transformers():
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            adapted = PeftModel.from_pretrained(base, self.tuned / "adapter").eval()
            with torch.no_grad():
                logits = adapted(input_ids=ids, use_cache=False).logits
        changed = float((logits - logits_of(self.model, ids)).abs().max())
        if not changed > 0:
            raise Difference("PEFT's logits with the adapter are those without it")
        merged = logits_of(self.work / "merged", ids)
        compare(logits, merged, MERGED * max(1.0, float(merged.abs().max())), "PEFT's logits")
        return {}

    def checkpointing(self) -> dict[str, Any]:
        """Take the loss and gradients of one batch with each kind of activation checkpointing."""
        expected = self._loss_and_norm("none")
        for kind in ("selective", "full"):
            found = self._loss_and_norm(kind)
            for name, one, other in zip(("loss", "norm of the gradient"), found, expected, strict=True):
                compare(torch.tensor(one), torch.tensor(other), 1e-4 * abs(other), f"{kind}: {name}")
        return {}

    def _loss_and_norm(self, kind: Any) -> tuple[float, float]:
        """Return loss and norm of the gradient of a batch in training mode, dropout drawn from one seed."""
        model, ids = self.opened().train(), batch()
        torch.manual_seed(0)
        with training_blocks(model, checkpointing=kind):
            loss, tokens = token_loss(model, ids[:, :-1], ids[:, 1:])
            (loss / tokens).backward()
        squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
        return float(loss / tokens), float(torch.stack(squares).sum().sqrt())

    def export(self) -> dict[str, Any]:
        """Export the pretraining run as a bf16 folder; whether it can be a GGUF file is a note."""
        command("export", self.run, "--format", "folder", "--dtype", "bf16", "--out", self.work / "bf16")
        logits_of(self.work / "bf16", batch()[:, :LENGTH])
        ended = call_safely("export", self.run, "--format", "gguf", "--out", self.work / "model.gguf")
        return {"gguf": "ok" if ended.status == 0 else f"status {ended.status}: {last_line(ended.err)}"}

    def plan(self) -> dict[str, Any]:
        """Plan the pretraining run."""
        command("plan", self.config, "--json")
        return {}


STAGES: dict[str, tuple[Callable[[Bench], dict[str, Any]], str | None]] = {
    "open": (Bench.open, None),
    "loss": (Bench.loss, "open"),
    "inject": (Bench.inject, "open"),
    "plan": (Bench.plan, "open"),
    "checkpointing": (Bench.checkpointing, "open"),
    "train": (Bench.train, "open"),
    "export": (Bench.export, "train"),
    "finetune": (Bench.finetune, "open"),
    "peft": (Bench.peft, "finetune"),
}
"""Name of a stage -> the stage, and the stage that must have been ok before it."""

RECORDS = [
    {"instruction": f"Say {one}{' and then again' * (n % 3)}.", "output": f"{one}, {one}"}
    for n, one in enumerate(("old house", "garden wall", "small boat", "kind word", "long road", "red door") * 4)
]
"""Requests of different lengths, to fine-tune on."""


def pretrain_settings(model: Path, run: Path) -> dict[str, Any]:
    """Return the configuration of a run of 5 steps: warm start of 1, a restart after 2 more."""
    return {
        "output_dir": str(run),
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {
            "train": str(PREPARED / "train"),
            "validation": str(PREPARED / "validation"),
            "sequence_length": LENGTH,
        },
        "lowrank": {"r": 4, "lora_alpha": 4, "warmup_steps": 0},
        "warm_start": {"steps": 1},
        "restart": {"every_steps": 2},
        "schedule": {"total_steps": 5, "warmup_steps": 0},
        "optimizer": {"lr": 1e-3},
        "batch": {"sequences": 2, "micro_sequences": 2},
        "checkpoint": {"every_steps": 5},
        "evaluate": {"every_steps": 5, "tokens": 100_000},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 2},
    }


def finetune_settings(model: Path, run: Path, examples: Path) -> dict[str, Any]:
    """Return the configuration of 3 steps of LoRA."""
    return {
        "output_dir": str(run),
        "task": "instruct",
        "device": "cpu",
        "model": {"path": str(model)},
        "data": {"train": str(examples), "validation_share": 0.1, "template": "plain", "sequence_length": 64},
        "lowrank": {"r": 4, "lora_alpha": 8},
        "schedule": {"total_steps": 3, "warmup_steps": 0},
        "optimizer": {"lowrank_lr": 1e-2},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 3},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"examples": 1, "max_new_tokens": 2},
    }


def run_stages(bench: Bench, outcomes: dict[str, Outcome], each_stage: Callable[[], None] = lambda: None) -> None:
    """Run the stages in order and add to `outcomes`; one that needs another stage is not run unless that was ok."""
    for name, (stage, needed) in STAGES.items():
        if needed is not None and outcomes[needed].outcome != "ok":
            outcomes[name] = Outcome(name, "not run", f"{needed} was not ok")
        else:
            outcomes[name] = run_stage(name, partial(stage, bench))
        each_stage()


def run_stage(name: str, action: Callable[[], dict[str, Any]]) -> Outcome:
    """Run one stage and say how it ended."""
    begun = time.perf_counter()
    try:
        found = Outcome(name, "ok", notes=action())
    except (UserError, Refused) as error:
        found = Outcome(name, "refused", str(error))
    except Exception as error:
        found = Outcome(name, "failed", f"{type(error).__name__}: {str(error)[:600]}", _place(error))
    found.seconds = round(time.perf_counter() - begun, 2)
    return found


def as_tree(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON."""
    return asdict(outcome)


def command(*arguments: object) -> Ended:
    """Run a command of relora; `Refused` if it ended with one line of a mistake, `Difference` if otherwise not 0."""
    ended = call(*arguments)
    if ended.status == STATUS_OF_MISTAKE and ended.err.startswith("relora: ") and ended.err.count("\n") == 1:
        raise Refused(ended.err.strip().removeprefix("relora: "))
    if ended.status:
        raise Difference(f"relora {arguments[0]} ended with status {ended.status}: {ended.err[-600:]}")
    return ended


def call_safely(*arguments: object) -> Ended:
    """Run a command; an exception that comes out of it is status 1, as in a shell."""
    try:
        return call(*arguments)
    except Exception as error:
        return Ended(1, "", f"{type(error).__name__}: {error}")


def last_line(text: str) -> str:
    """The last line of a text."""
    return next(reversed(text.strip().splitlines()), "")


def batch() -> Tensor:
    """Token ids [2, 33] that are in the tokenizer, always the same: 32 inputs and the tokens after them."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, VOCABULARY - 20, (2, LENGTH + 1), generator=generator)


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a model folder in eval mode, by transformers alone."""
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise Difference("transformers' own logits are not finite")
    return logits


def plain_loss(folder: Path, config_file: Path) -> float:
    """Held-out loss of a model folder by transformers alone, on the held-out data of a configuration."""
    _, held_out = open_data(load_config(config_file, []))
    total, tokens = 0.0, 0
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for ids, labels in held_out:
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            total += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
            tokens += int((labels != -100).sum())
    return total / tokens


def compare(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise `Difference` unless two tensors are equal within an absolute tolerance."""
    if found.shape != expected.shape:
        raise Difference(f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:
        raise Difference(f"{what} differ by {difference:.2e} (largest {float(expected.abs().max()):.3g})")


def coverage(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Say which share of the parameters of the blocks gets factors, and which matrices of the blocks get none.

    Args:
        model: the model without factors.
        paths: paths of the layers that get factors.
    """
    targets = {f"{path}.weight" for path in paths}
    lists = block_lists(model)
    inside = {name: parameter for name, parameter in model.named_parameters() if is_inside(name, lists)}
    inside = inside or dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in inside.values())
    covered = sum(parameter.numel() for name, parameter in inside.items() if name in targets)
    left = {
        ".".join(part for part in name.split(".") if not part.isdigit()): list(parameter.shape)
        for name, parameter in inside.items()
        if name not in targets and parameter.dim() > 1
    }
    return {
        "blocks": {name: len(found) for name, found in lists.items()},
        "share": covered / max(total, 1),
        "without": left,
    }


def _place(error: BaseException) -> str:
    """The line that raised an exception, and the last line of this package on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/relora/" in frame.filename]
    shown = [frames[-1], *own[-1:]]
    return " < ".join(f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in shown)
