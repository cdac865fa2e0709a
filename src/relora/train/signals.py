"""Signals that a run handles: SIGINT and SIGTERM ask it to stop, SIGUSR1 asks it for a checkpoint.

The handlers only note the request. The loop acts on it between two steps: it writes a checkpoint and then stops or
goes on.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

_STOP = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Handlers that are in force inside a `with` block and note which signals have arrived.

    The first stop signal restores the default handlers of both, so a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        """Number of the first stop signal; None before there is one."""
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
        """Whether a stop was requested, or a checkpoint that `take_save` has not reported yet."""
        return self._save or self.stop is not None

    def take_save(self) -> bool:
        """Return whether a checkpoint was requested since the last call, and forget the request."""
        asked, self._save = self._save, False
        return asked

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = number
        for each in _STOP:
            signal.signal(each, signal.SIG_DFL)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
