"""Errors that users see, each with the exit status that the command line ends with.

The message of each is one line for the person at the terminal: what is wrong (which key, which file) and what would
mend it.
"""


class ReloraError(Exception):
    """Base of all errors that the command line prints as one line instead of a traceback."""

    exit_status = 3


class UserError(ReloraError):
    """A mistake of the user: a key, a file or a combination that cannot be used. Nothing was created or overwritten."""

    exit_status = 2


class RunStopped(ReloraError):
    """A run stopped itself (a loss that is not finite, a dead tensor, a full disk); its last checkpoint is kept."""

    exit_status = 3


class Diverged(RunStopped):
    """A number was not finite, and the run's `non_finite` settings let it go no further."""


class NonFinite(RunStopped):
    """A loss, a gradient, a weight or an update is not a finite number; nothing was changed or saved by it.

    Args:
        message: one line for the user.
        loss: loss of the step, if it was known.
        grad_norm: norm of the step's gradient, if it was known.
        sequences: indices, within the batch of the step, of the sequences that the number may have come from; empty
            if it was not found in a step.
    """

    def __init__(
        self, message: str, *, loss: float | None = None, grad_norm: float | None = None, sequences: range = range(0)
    ) -> None:
        super().__init__(message)
        self.loss, self.grad_norm, self.sequences = loss, grad_norm, sequences


class PeerFailed(RunStopped):
    """Another process of the run failed or was lost, and one process says so for all: this one ends without a line."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(ReloraError):
    """A signal ended the run after a checkpoint was written; `exit_status` is 128 + `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """Let the error be pickled, to come back from a process of its own: `Exception` would keep the message only."""
        return Interrupted, (str(self), self.exit_status - 128)
