"""Recovery from a loss or gradient that is not finite: stop the run, skip the step, or rewind past the failed batches.

What follows an incident depends only on checkpointed state: a run that is killed after an incident and continued meets
the same failure again and handles it in the same way.
"""

import torch

from relora.errors import Diverged, NonFinite
from relora.train.run import Progress, Run, restore
from relora.train.step import clear_nonfinite_flag


def resolve_pending(progress: Progress) -> None:
    """Read the flags of the steps taken without a synchronisation; where one failed, return to the state before it.

    No weight and no moment has moved since the first failed step. So that step can be taken once more, this time with
    a synchronisation, and raises `NonFinite` as it would have done at first.
    """
    if not progress.pending:
        return
    flags = torch.stack([flag for _, flag in progress.pending]).tolist()  # the only synchronisation
    if flags[-1]:
        before, _ = progress.pending[flags.index(1)]
        progress.unlogged_tokens -= progress.state.tokens - before.tokens
        progress.state = before
        clear_nonfinite_flag(progress.optimizer)
    progress.pending = []


def recover(run: Run, progress: Progress, failure: NonFinite) -> Progress:
    """Return the progress from which the run goes on; no weight and no moment has moved since `failure` was found.

    The policy `skip` counts the step and leaves its update out. The policy `rewind` loads the last scheduled
    checkpoint and goes on with the batch after the failed one, so that none of the batches in between is used again.

    Raises:
        Diverged: the policy is `stop`, the limit of incidents is used up, there is nothing that could be skipped, or
            there is no checkpoint to rewind to.
    """
    place = run.place_of(progress.state.batch, failure.sequences) if failure.sequences else ""
    what = f"{failure} ({place})" if place else str(failure)
    if run.non_finite == "stop":
        raise Diverged(f"{what}; lower the learning rate, or let the run go on by `non_finite.policy`")
    if progress.state.incidents >= run.non_finite_limit:
        raise Diverged(f"{what}; non_finite.limit ({run.non_finite_limit}) is used up, so lower the learning rate")
    if run.non_finite == "rewind":
        return _rewind(run, progress, what, place)
    if not failure.sequences:  # a weight or factor is not finite, which skipping a step would not mend
        raise Diverged(f"{what}; nothing to skip, so lower the learning rate or set `non_finite.policy: rewind`")
    return _skip(run, progress, failure, place)


def _skip(run: Run, progress: Progress, failure: NonFinite, place: str) -> Progress:
    """Count the failed step as taken without an update, and record it."""
    taken = progress.state.step
    progress.state = progress.state.skipping()
    figures = {"loss": failure.loss, "grad_norm": failure.grad_norm, "batch": place}
    run.reporter.incident({"kind": "skipped", **progress.position(taken), **figures})
    return progress


def _rewind(run: Run, progress: Progress, what: str, place: str) -> Progress:
    """Restore the last scheduled checkpoint, with the data set to the batch after the failed one, and record it."""
    failed = progress.state
    run.checkpoints.wait()
    checkpoint, broken = run.checkpoints.go_back(failed.step)
    if checkpoint is None:
        raise Diverged(f"{what}; no sound checkpoint to go back to, so lower the learning rate")
    for line in broken:
        run.reporter.warning(f"{line}; an older checkpoint is used")
    records = run.reporter.rewinds_to(checkpoint.step)  # `restore` cuts these records off; written again below
    progress.optimizer.state.clear()  # frees the old moments before those of the checkpoint are loaded
    earlier = restore(run, checkpoint)
    earlier.state = earlier.state.gone_back_from(failed)
    event = {"kind": "rewind", **earlier.position(max(earlier.state.step - 1, 0))}
    for record in (*records, {**event, "failed_step": failed.step, "batch": place}):
        run.reporter.incident(record)
    return earlier
