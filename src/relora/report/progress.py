"""A progress bar on a terminal, on standard error, and nothing elsewhere."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def with_progress(items: Iterable[_Item], total: int, label: str) -> Iterable[_Item]:
    """The items in turn, with a bar of `total` steps named `label` that is gone at the end."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    return track(items, label, total, console=console, transient=True, disable=not console.is_terminal)
