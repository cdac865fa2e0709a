"""Signals that a run handles: SIGINT and SIGTERM ask it to stop, SIGUSR1 asks it for a checkpoint.

The handlers only note the request. The loop acts on it between two steps: it writes a checkpoint and then stops or
goes on. Several processes do so at the same step: what one of them heard counts when all have agreed on it.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

import torch

from relora.distributed.group import ALONE, Group

_STOP = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Handlers that are in force inside a `with` block and note which signals have arrived.

    The first stop signal restores the default handlers of both, so a second one ends the process at once.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self._group = group
        self._stop: int | None = None
        self._save = False
        self._agreed_stop: int | None = None
        self._agreed_save = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note_stop) for number in _STOP}
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # `Processes` ignores SIGTERM once a rank is lost
                signal.signal(number, handler)

    def agree(self) -> None:
        """Let what any rank has heard count on all; every rank calls this at the same place. Alone, do nothing."""
        if self._group.world == 1:
            return
        heard = torch.zeros(len(_STOP) + 1, dtype=torch.int32)
        heard[0], self._save = int(self._save), False
        if self._stop is not None:
            heard[1 + _STOP.index(self._stop)] = 1
        save, *stops = self._group.sum_(heard).tolist()
        self._agreed_save |= save > 0
        if any(stops):
            self._agreed_stop = next(number for number, ranks in zip(_STOP, stops, strict=True) if ranks)

    @property
    def stop(self) -> int | None:
        """Number of the first stop signal; None before there is one."""
        return self._stop if self._group.world == 1 else self._agreed_stop

    @property
    def asked(self) -> bool:
        """Whether a stop was requested, or a checkpoint that `take_save` has not reported yet."""
        return self.stop is not None or (self._save if self._group.world == 1 else self._agreed_save)

    def take_save(self) -> bool:
        """Return whether a checkpoint was requested since the last call, and forget the request."""
        if self._group.world == 1:
            asked, self._save = self._save, False
        else:
            asked, self._agreed_save = self._agreed_save, False
        return asked

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = number
        for each in _STOP:
            signal.signal(each, signal.SIG_DFL)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
