"""Progress display of `relora prepare`: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation; the work of an earlier, interrupted call is included."""

    stage: str
    """`tokenizer` while a tokenizer is trained, then `tokens`."""
    text_bytes: int = 0
    """Bytes of UTF-8 text encoded so far."""
    tokens: int = 0
    """Tokens written so far, in both splits."""
    read_share: float | None = None
    """Share of the sources' bytes that has been read, 0 to 1; None when their size is unknown."""


class ConsoleProgress:
    """Display every `PrepareProgress` that it is called with; use it in a `with` statement.

    Rates and the remaining time are computed from the first call with tokens on. So the work of an interrupted call,
    which this one continues, does not make the rates larger than they are.

    Args:
        console: where to print; stderr unless given.
        every_seconds: time between two lines, where the output is no terminal.
    """

    def __init__(self, console: Console | None = None, every_seconds: float = 5.0) -> None:
        # Without force_terminal, FORCE_COLOR, which many CI systems set, would put control codes into a log file.
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
        if self._console.is_terminal:  # a bar that was never started would print an empty line
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
    """Return a line such as `41% · 120.0 MB · 29.3 M tokens · 8.1 MB/s · 1.98 M tokens/s · 0:21 left`.

    Figures that are not known yet, or cannot be known, are left out.

    Args:
        progress: the current progress.
        start: the progress at the first call with tokens.
        seconds: time since then.
    """
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
