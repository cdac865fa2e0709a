"""What a run listens to. SIGINT and SIGTERM ask it to stop; it does at the next step boundary, after a checkpoint.

SIGUSR1 asks for a checkpoint; the run goes on.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

_STOP = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """While entered, notes what was asked for. A second stop signal does what it does to any process: it ends it."""

    def __init__(self) -> None:
        self.stop: int | None = None
        """The number of the first stop signal."""
        self._save = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note_stop) for number in _STOP}
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether anything was asked for that has not been done."""
        return self._save or self.stop is not None

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was last asked."""
        asked, self._save = self._save, False
        return asked

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = number
        for each in _STOP:
            signal.signal(each, signal.SIG_DFL)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
