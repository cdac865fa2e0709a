"""The environment of a run: versions of packages, the machine and the revision of the source code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_environment() -> dict[str, str | int]:
    """Return versions, machine and source revision, as environment.json holds them; what is unknown is left out."""
    described: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("relora", "torch", "transformers", "tokenizers", "safetensors"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    described["threads"] = torch.get_num_threads()
    described["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if revision := _git_revision():
        described["git_revision"] = revision
    return described


def _git_revision() -> str | None:
    """Return the commit of the checkout that holds this file; None for an installed package, or without git."""
    command = ["git", "rev-parse", "HEAD", "--show-prefix"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    revision, prefix = done.stdout.splitlines()
    # with any other prefix, the package is installed inside a checkout of some other project
    return revision if prefix == "src/relora/runs/" else None
