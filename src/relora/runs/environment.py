"""What a run runs on: versions, machine, source revision."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_environment() -> dict[str, str | int]:
    """Versions, machine and source revision, for environment.json."""
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
    """Of the checkout that this file stands in; None for an installed package, or without git."""
    here = Path(__file__).resolve()
    command = ["git", "rev-parse", "HEAD", "--show-prefix"]
    try:
        done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    revision, prefix = done.stdout.splitlines()
    return revision if prefix == "src/relora/runs/" else None  # else some other repository around an installation
