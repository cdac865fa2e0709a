"""SIGINT and SIGTERM ask a run to stop; it stops at the next step boundary, after a checkpoint."""

import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, `requested` holds the number of the first stop signal, or None. A second one stops at once."""

    def __init__(self) -> None:
        self.requested: int | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
