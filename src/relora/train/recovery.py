"""Numbers that went wrong: stop, leave the step out, or go back past the batches that led there.

What follows an incident is a function of what is saved, like everything else: a run that is killed after one and
continued meets the same failure and takes the same way.
"""

import torch

from relora.errors import Diverged, NonFinite
from relora.train.run import Progress, Run, begin
from relora.train.step import release


def look_back(progress: Progress) -> None:
    """Learn how the steps went that were taken unseen; where one went wrong, stand before it again.

    Nothing has moved since then. So that step can be taken once more, seen this time, and fails as it did.
    """
    if not progress.unseen:
        return
    held = torch.stack([flag for _, flag in progress.unseen]).tolist()  # the one wait
    if held[-1]:
        before, _ = progress.unseen[held.index(1)]
        progress.unlogged_tokens -= progress.state.tokens - before.tokens
        progress.state = before
        release(progress.optimizer)
    progress.unseen = []


def recover(run: Run, progress: Progress, failure: NonFinite) -> Progress:
    """The progress from which the run goes on; no weight and no moment has moved since `failure` was found.

    `skip` counts the step and leaves its update out. `rewind` loads the last scheduled checkpoint and goes on with
    the batch after the failed one, so that none of those in between is seen again.

    Raises:
        Diverged: the policy is `stop`, the limit is used up, or there is nothing that could be skipped or gone back
            to.
    """
    place = run.place_of(progress.state.batch, failure.sequences) if failure.sequences else ""
    what = f"{failure}{place and f' ({place})'}"
    if run.non_finite == "stop":
        raise Diverged(f"{what}; lower the learning rate, or let the run go on by `non_finite.policy`")
    if progress.state.incidents >= run.non_finite_limit:
        raise Diverged(f"{what}; non_finite.limit ({run.non_finite_limit}) is used up, so lower the learning rate")
    if run.non_finite == "rewind":
        return _rewind(run, progress, what, place)
    if not failure.sequences:  # weights or factors: no step to leave out would mend them
        raise Diverged(f"{what}; nothing to skip, so lower the learning rate or set `non_finite.policy: rewind`")
    return _skip(run, progress, failure, place)


def _skip(run: Run, progress: Progress, failure: NonFinite, place: str) -> Progress:
    taken = progress.state.step
    progress.state = progress.state.skipping()
    figures = {"loss": failure.loss, "grad_norm": failure.grad_norm, "batch": place}
    run.reporter.incident({"kind": "skipped", **progress.position(taken), **figures})
    return progress


def _rewind(run: Run, progress: Progress, what: str, place: str) -> Progress:
    failed = progress.state
    run.checkpoints.wait()
    checkpoint, broken = run.checkpoints.go_back(failed.step)
    if checkpoint is None:
        raise Diverged(f"{what}; no sound checkpoint to go back to, so lower the learning rate")
    for line in broken:
        run.reporter.warning(f"{line}; an older checkpoint is used")
    records = run.reporter.rewinds_to(checkpoint.step)  # they stand after it, and are cut off with what follows it
    progress.optimizer.state.clear()  # before there are other moments
    earlier = begin(run, checkpoint)
    earlier.state = earlier.state.gone_back_from(failed)
    event = {"kind": "rewind", **earlier.position(max(earlier.state.step - 1, 0))}
    for record in (*records, {**event, "failed_step": failed.step, "batch": place}):
        run.reporter.incident(record)
    return earlier
