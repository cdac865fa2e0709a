"""Defaults that `method` and `variant` give to the keys of a pretraining run which are not given themselves.

`variant: default` renews the factors: Muon moves them, a restart comes every 20 steps and retains the leading three
quarters of their directions, and after a warm start they begin with what it has learnt. Of what was measured this comes
nearest to full rank (docs/results.md). Its parts want one another, so where one of them is ruled out, by an optimizer
or by a restart of another kind, the restarts are those that cost least beside AdamW: the new factors are balanced and
have the norms that the old ones had reached, so that the moments still fit and no warm-up is needed.

`variant: paper` is Algorithm 1 of the ReLoRA paper (arXiv 2307.05695): all layers restart at once, with Kaiming lora_A
and lora_B = 0, and every learning rate warms up from 0. The paper prunes moments; here they are cleared (`optimizer:
magnitude` with a small `keep_ratio` prunes).
"""

from collections.abc import Mapping
from typing import Any

Defaults = dict[str, dict[str, Any]]
"""Section -> key -> default."""

RENEWING: Defaults = {
    "optimizer": {"factors": "muon"},
    "restart": {"every_steps": 20, "init": "balanced", "optimizer": "project", "warmup_steps": 0, "retain": 0.75},
}
"""Restarts of `variant: default`."""
BALANCED: Defaults = {"restart": {"init": "balanced", "optimizer": "keep", "warmup_steps": 0}}
"""Restarts of `variant: default` where the factors cannot be renewed so."""
PAPER: Defaults = {
    "optimizer": {"factors": "adamw"},
    "restart": {
        "growth": 1.0,
        "until": 1.0,
        "ramp": "all",
        "optimizer": "zero",
        "init": "kaiming",
        "retain": 0.0,
        "stagger": "none",
    },
}
"""Restarts of `variant: paper`."""


def fill_variant(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of pretraining in which keys that are not given have the defaults of its variant.

    Sections that are no mapping are left as they are, for the check of types to name.
    """
    filled = dict(tree)
    for section, defaults in _defaults(tree).items():
        given = tree.get(section, {})
        if section == "warm_start" and given == "auto":
            given = {"auto": True}
        if isinstance(given, Mapping):
            filled[section] = {**defaults, **given}
    return filled


def _defaults(tree: Mapping[str, Any]) -> Defaults:
    """Return the defaults for one configuration."""
    method = tree.get("method", "relora")
    if method == "relora" and tree.get("variant", "default") == "paper":
        return PAPER
    if method not in ("lora", "relora"):
        return {}
    renewing = _muon_fits(tree) and _renewal_fits(tree)
    if method == "lora":
        return {"optimizer": RENEWING["optimizer"]} if renewing else {}
    if not renewing:
        return BALANCED
    return RENEWING | ({"warm_start": {"takeover": True}} if _value(tree, "warm_start", "steps") != 0 else {})


def _muon_fits(tree: Mapping[str, Any]) -> bool:
    """Whether the factors can have Muon: beside plain AdamW, and without a residual, which reads AdamW's moments."""
    residual = _value(tree, "lowrank", "residual")
    scale = residual.get("scale") if isinstance(residual, Mapping) else None
    plain = _value(tree, "optimizer", "name") in (None, "adamw")
    return plain and not scale and _value(tree, "optimizer", "factors") in (None, "muon")


def _renewal_fits(tree: Mapping[str, Any]) -> bool:
    """Whether restarts can retain a share of the directions, and no setting asks for restarts of another kind.

    The configuration that a run of an earlier version has in its folder gives every key of its restarts, so such a run
    goes on as it began.
    """
    whole_layers = _value(tree, "restart", "stagger") != "ranks" and not _value(tree, "restart", "adaptive")
    balanced = _value(tree, "restart", "init") in (None, "balanced")
    projected = _value(tree, "restart", "optimizer") in (None, "project")
    retaining = _value(tree, "restart", "retain") != 0 and _value(tree, "lowrank", "r") != 1
    return whole_layers and balanced and projected and retaining


def _value(tree: Mapping[str, Any], section: str, key: str) -> Any:
    """Return the value that a configuration gives to a key, or None."""
    keys = tree.get(section)
    return keys.get(key) if isinstance(keys, Mapping) else None
