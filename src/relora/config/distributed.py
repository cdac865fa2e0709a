"""The section of a configuration for several processes that train one model."""

from typing import Literal

from relora.config.values import PositiveFloat, Settings


class DistributedSettings(Settings):
    """Several processes, started by torchrun: how they share the model and add up its gradients."""

    strategy: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """Place of the model: whole on every rank (`replicate`), or divided among them (`shard`). `hybrid` divides it among
    the ranks of each machine; `auto` is `shard` only where a whole model is predicted not to fit a rank's memory."""
    deterministic: bool = False
    """Add up the micro-batches in one order, so that every number of ranks gives the same bits. It takes more memory
    and sends more; `false` differs in the last bits."""
    timeout_seconds: PositiveFloat = 120.0
    """Longest wait for a rank that does not answer, after which the others stop and name it."""
