"""What can go wrong, as the exit statuses that the command line gives.

Every error carries one line for the person at the terminal: what is wrong (which key, which file) and what would mend
it.
"""


class ReloraError(Exception):
    """Base of all errors that the command line prints as one line instead of a traceback."""

    exit_status = 3


class UserError(ReloraError):
    """The user's mistake: a key, a file or a combination that cannot be used. Nothing was created or overwritten."""

    exit_status = 2


class RunStopped(ReloraError):
    """The run stopped itself (a loss that is not finite, a dead tensor, a full disk); its last checkpoint is kept."""

    exit_status = 3


class Diverged(RunStopped):
    """Numbers stopped being finite, and by its `non_finite` settings the run does not go on."""


class NonFinite(RunStopped):
    """A loss, a gradient, a weight or an update is not a finite number; it went no further.

    `sequences`: those of the step's batch that it may have come from; empty where it was not found in a step.
    """

    def __init__(
        self, message: str, *, loss: float | None = None, grad_norm: float | None = None, sequences: range = range(0)
    ) -> None:
        super().__init__(message)
        self.loss, self.grad_norm, self.sequences = loss, grad_norm, sequences


class Interrupted(ReloraError):
    """A signal ended the run after a checkpoint was written; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """Let the error be pickled, to come back from a process of its own: `Exception` would keep the message only."""
        return Interrupted, (str(self), self.exit_status - 128)
