"""A progress bar on standard error where that is a terminal, and no output elsewhere."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def with_progress(items: Iterable[_Item], total: int, label: str) -> Iterable[_Item]:
    """Yield the items while a bar of `total` steps, named `label`, shows the progress; the bar is erased at the end."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    return track(items, label, total, console=console, transient=True, disable=not console.is_terminal)
