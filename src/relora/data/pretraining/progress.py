"""What a long preparation says while it works: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is; what an earlier, interrupted run did counts in."""

    stage: str
    """`tokenizer` while one is trained, then `tokens`."""
    text_bytes: int = 0
    tokens: int = 0
    read_share: float | None = None
    """Of the sources, 0 to 1; None when their size is unknown."""


class ConsoleProgress:
    """Shows `PrepareProgress`, called with each; use it in a `with` statement.

    Rates and the time left count from the first call with tokens, so a continued run does not look faster than it is.
    """

    def __init__(self, console: Console | None = None, every_seconds: float = 5.0) -> None:
        # force_terminal: FORCE_COLOR, which many CI systems set, must not put control codes into a log file
        self._console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self._every_seconds = every_seconds
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), console=self._console
        )
        self._task = self._bar.add_task("preparing", total=None, figures="")
        self._start: tuple[float, PrepareProgress] | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "ConsoleProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # elsewhere it never started, and would print an empty line
            self._bar.stop()

    def __call__(self, progress: PrepareProgress) -> None:
        now = time.monotonic()
        if progress.stage == "tokenizer":
            figures = "training the tokenizer"
        else:
            self._start = self._start or (now, progress)
            figures = _figures(progress, self._start[1], now - self._start[0])
        if self._console.is_terminal:
            share = progress.read_share
            self._bar.update(self._task, total=None if share is None else 1.0, completed=share or 0.0, figures=figures)
        elif now - self._last_line >= self._every_seconds:
            self._last_line = now
            self._console.print(f"preparing: {figures}", soft_wrap=True, highlight=False)


def _figures(progress: PrepareProgress, start: PrepareProgress, seconds: float) -> str:
    """`41% · 120.0 MB · 29.3 M tokens · 8.1 MB/s · 1.98 M tokens/s · 0:21 left`, as far as it is known."""
    parts = [f"{progress.text_bytes / 1e6:.1f} MB", f"{progress.tokens / 1e6:.1f} M tokens"]
    if progress.read_share is not None:
        parts.insert(0, f"{progress.read_share:.0%}")
    if seconds > 0:
        parts.append(f"{(progress.text_bytes - start.text_bytes) / 1e6 / seconds:.1f} MB/s")
        parts.append(f"{(progress.tokens - start.tokens) / 1e6 / seconds:.2f} M tokens/s")
    if progress.read_share is not None and start.read_share is not None and progress.read_share > start.read_share:
        left = seconds * (1 - progress.read_share) / (progress.read_share - start.read_share)
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return " · ".join(parts)
