"""The choice that `precision.dtype: auto` stands for: bf16-mixed where it is faster on this device, else fp32.

    GPU     bf16-mixed if it has bf16 in hardware (compute capability 8 or later), else fp32
    CPU     fp32 without instructions for bf16; with them, by a measurement: bf16-mixed if the matrices of the model
            take at most 0.8 of the time that they take in fp32
    others  fp32

What is measured is a linear layer's forward and backward pass on numbers that are no model's, once per machine, with
its weight in fp32 and the casts that bf16-mixed makes. So the price of casting is in the figures, which decides at
small sides. The method is not looked at: runs that are compared multiply in one dtype.

A run decides before its first step and writes the outcome into config.yaml, so it goes on as it began, on whatever
machine. Of several ranks rank 0 decides.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.config import FinetuneConfig, RunConfig, TrainingConfig, load_any_config
from relora.distributed.group import ALONE, Group
from relora.lowrank.calibrate import best_seconds, keep_first, rates_file
from relora.lowrank.targets import is_conv1d
from relora.runs.settings import CONFIG_FILE, is_run

Config = TypeVar("Config", bound=TrainingConfig)

LARGEST_SHARE = 0.8
"""bf16-mixed is chosen only if products take at most this share of their time in fp32: the rest of a step (attention,
norms, loss, the update) gains less, and rounding must pay."""
_TOKENS = 512
"""Tokens of the measured passes. With more of them, casts of weights weigh less than measured."""
_SIDES = (128, 256, 512, 1024)
"""Sides of the measured weights. Narrower products are taken to be as fast in fp32, wider ones as the widest."""
_ROUNDS = 4
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names that `torch.cpu.get_capabilities` has for instructions that multiply in bf16: two of x86-64, two of ARM."""


def settle_dtype(config: Config, device: torch.device, model: Callable[[], nn.Module]) -> tuple[Config, str]:
    """Replace `precision.dtype: auto` by what it stands for on a device; a named dtype stays.

    Args:
        model: returns the model, whose shapes alone matter; called only where they decide.

    Returns:
        The configuration, and a line that says what was chosen and why; an empty one if there was nothing to choose.
    """
    if config.precision.dtype != "auto":
        return config, ""
    dtype, reason = _choice(config, device, model)
    return with_dtype(config, dtype), f"precision.dtype: auto takes {dtype} ({reason})"


def settle_dtype_of_run(
    config: Config, device: torch.device, model: nn.Module, *, fresh: bool, group: Group = ALONE
) -> tuple[Config, str]:
    """Settle the dtype of a run: that which its folder has, if it goes on; else as `settle_dtype` on rank 0.

    Of several ranks all call this, whatever their configurations, which are compared later.

    Args:
        fresh: the run folder is moved aside, so what it holds does not matter.

    Raises:
        UserError: config.yaml in the run folder cannot be read.
    """
    settled, line = config, ""
    with group.stage("the choice of the dtype"):
        if group.is_first:
            folder = Path(config.output_dir)
            if config.precision.dtype == "auto" and not fresh and is_run(folder):
                settled = with_dtype(config, begun_with(folder).precision.dtype)
                line = f"precision.dtype: auto takes {settled.precision.dtype} (with which this run began)"
            else:
                settled, line = settle_dtype(config, device, lambda: model)
    dtype, line = group.broadcast([settled.precision.dtype, line] if group.is_first else None)
    return (with_dtype(config, dtype), line) if config.precision.dtype == "auto" else (config, "")


def begun_with(folder: Path) -> RunConfig | FinetuneConfig:
    """Return the configuration in a run folder; without a dtype in it, the run is of a version that had fp32 then."""
    there = load_any_config(folder / CONFIG_FILE)
    return with_dtype(there, "fp32") if there.precision.dtype == "auto" else there


def with_dtype(config: Config, dtype: str) -> Config:
    """Return the configuration with another `precision.dtype`."""
    return config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": dtype})})


def auto_on(device: torch.device) -> str:
    """Describe what `auto` takes on a device, as far as that does not depend on a model."""
    if device.type == "cpu" and has_bf16_instructions():
        shares = ", ".join(f"{share:.2f} at {side}" for side, share in zip(_SIDES, bf16_shares(device), strict=True))
        return f"bf16-mixed where a model's layers take {LARGEST_SHARE} of the time of fp32 or less; by side: {shares}"
    dtype, reason = _by_device(device)
    return f"{dtype} ({reason})"


def has_bf16_instructions() -> bool:
    """Return whether this processor has instructions that multiply in bf16; without, bf16 is emulated and slow."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)


def bf16_shares(device: torch.device, folder: Path | None = None, *, anew: bool = False) -> tuple[float, ...]:
    """Return the time of a layer in bf16-mixed as a share of that in fp32, for each of `_SIDES`.

    Args:
        folder: where the figures of this machine are kept; the user's cache unless given.
        anew: measure again, whatever is kept.
    """
    file = rates_file(device, folder, "bf16")
    if not anew and (kept := _read(file)):
        return kept
    measured = _measure(device)
    keep_first(file, json.dumps({"tokens": _TOKENS, "sides": _SIDES, "shares": measured}))
    return _read(file) or measured


def _choice(config: TrainingConfig, device: torch.device, model: Callable[[], nn.Module]) -> tuple[str, str]:
    """Return the dtype that `auto` stands for, and the reason."""
    if config.precision.frozen == "fp32":
        return "fp32", "as precision.frozen"
    if device.type != "cpu" or not has_bf16_instructions():
        return _by_device(device)
    share = _predicted_share(config, device, model())
    dtype = "bf16-mixed" if share <= LARGEST_SHARE else "fp32"
    return dtype, f"in bf16-mixed the layers of this model take {share:.2f} of the time of fp32 here"


def _by_device(device: torch.device) -> tuple[str, str]:
    """Return dtype and reason where the device alone decides."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return ("bf16-mixed", f"{name} multiplies in bf16") if has_bf16 else ("fp32", f"{name} has no bf16")
    if device.type == "cpu":
        return "fp32", "this processor has no instructions for bf16"
    return "fp32", f"bf16 was not measured on {device.type}"


def _predicted_share(config: TrainingConfig, device: torch.device, model: nn.Module) -> float:
    """Predict the time of a model's layers in bf16-mixed as a share of that in fp32, weighted by their operations."""
    assert isinstance(config, RunConfig | FinetuneConfig)
    tokens = config.batch.micro_sequences * config.data.sequence_length
    linear = [one for one in model.modules() if isinstance(one, nn.Linear) or is_conv1d(one)]
    weights = [weight.shape for one in linear if isinstance(weight := one.weight, Tensor)]
    if not weights:
        return 1.0
    narrowest = [min(*shape, tokens) for shape in weights]
    shares = np.interp(narrowest, _SIDES, bf16_shares(device), left=1.0)
    return float(np.average(shares, weights=[shape.numel() for shape in weights]))


def _measure(device: torch.device) -> tuple[float, ...]:
    """Measure the shares of `bf16_shares`; this takes some tenths of a second and draws nothing."""

    def layer(side: int, *, mixed: bool) -> Callable[[], object]:
        """Return a function that takes a linear layer [side, side] forward and back."""
        x, weight = (torch.ones(rows, side, device=device, requires_grad=True) for rows in (_TOKENS, side))

        def run() -> object:
            with torch.enable_grad():
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
                    y = F.linear(x, weight)
                return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

        return run

    calls = {f"{side} {mixed}": layer(side, mixed=mixed) for side in _SIDES for mixed in (False, True)}
    seconds = best_seconds(calls, device, _ROUNDS)
    return tuple(seconds[f"{side} True"] / seconds[f"{side} False"] for side in _SIDES)


def _read(file: Path) -> tuple[float, ...] | None:
    """Return the shares in `file`; None if it is absent, or its content is not valid or of other sides."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        shares = tuple(float(share) for share in kept["shares"])
        fits = kept["tokens"] == _TOKENS and tuple(kept["sides"]) == _SIDES and len(shares) == len(_SIDES)
        if fits and all(0 < share < math.inf for share in shares):
            return shares
    return None
