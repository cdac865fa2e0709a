"""The search: draw settings, take trials from rung to rung, repeat the best ones with other seeds.

    as long as something is left to do:
        a trial that was left behind goes on       its worker is dead: its lock is free
        else the best trial that waits is promoted (`rungs`)
        else, within the budget, a new trial begins (`sampler`, `limits`)
        else, when all of that is done, the best trials run again with further seeds

Each decision is made under one lock of the study, by whichever worker is free, from what the storage holds. So any
number of workers can join, and any of them can be killed at any moment: what was reported stays, and what was not is a
part of a run that goes on from its checkpoint. The numbers of a trial do not depend on who runs it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from relora.errors import Interrupted, ReloraError, UserError
from relora.experiments.parts import CHECKPOINTS, clear
from relora.experiments.tune.draws import Base, completed
from relora.experiments.tune.estimate import WALL_SECONDS, Work, seconds_left, seconds_per_token
from relora.experiments.tune.limits import Limits, planned_figures, too_slow, why_not
from relora.experiments.tune.rungs import Trial, is_pending, next_promotion, percent
from relora.experiments.tune.sampler import suggest
from relora.experiments.tune.spaces import Config, Space
from relora.experiments.tune.standing import Standing, best_trials
from relora.experiments.tune.study import Study
from relora.experiments.tune.trials import QUIET, RESULTS, Reached, run_part
from relora.files.locks import FileLock
from relora.processes import Call, OutOfMemory, serve_calls
from relora.runs.folder import is_being_written

MOST_DRAWS = 30
"""Draws for one trial, of which none can be used, after which a search gives up."""
FIRST_TRIALS = 3
"""Trials after which a search gives up if all of them failed."""
MOST_KILLS = 2
"""Times that a trial's process may be killed before the trial counts as failed."""
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a search may do; None where there is no limit. The first limit that is reached ends it."""

    trials: int | None = None
    """Trials of the study, those of earlier commands and other workers included."""
    hours: float | None = None
    """Hours of this command."""
    tokens: int | None = None
    """Tokens that the trials of the study train on."""
    seeds: int = 1
    """Seeds with which each of the finalists is run."""
    finalists: int = 3
    """Best trials that are run with several seeds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a search is to do."""

    base: Base
    config: Config
    """The configuration that the search starts from."""
    space: Space
    budget: Budget
    limits: Limits
    rungs: tuple[float, ...]
    sampler: str
    jobs: int


@dataclass
class Search:
    """A worker of a study."""

    plan: Plan
    study: Study
    tell: Callable[[str], None]
    _held: dict[int, tuple[int, float, FileLock, float]] = field(default_factory=dict)
    """Number of a call -> number of the trial, share of the run that the part ends at, lock of the trial, time of the
    beginning."""
    _given: int = 0
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Work until nothing is left to do, or the time is over.

        Raises:
            UserError: no draw from the space can be used.
            Interrupted: a signal arrived; trials under way have a checkpoint. The message says how the search stands.
        """
        hours = self.plan.budget.hours
        try:
            ended = serve_calls(
                self._parts(),
                self._settle,
                jobs=self.plan.jobs,
                seconds=math.inf if hours is None else hours * SECONDS_PER_HOUR,
            )
        except Interrupted as error:
            name = str(error).partition(":")[0]
            number = error.exit_status - 128
            raise Interrupted(f"{name}: {self.standing()}; the same command continues", number) from None
        finally:
            for _, _, lock, _ in self._held.values():
                lock.release()
        if ended:
            self._close()

    def standing(self) -> Standing:
        """Return how the search stands."""
        trials = self.study.trials()
        return Standing(trials, self.plan.rungs, self._seconds_left(trials))

    def _parts(self) -> Iterator[Call[Reached] | None]:
        """Give the next part of a trial whenever a process is free; None while others decide what comes next."""
        while True:
            with self._deciding():
                trials = self.study.trials()
                found = self._abandoned(trials) or self._promoted(trials) or self._new(trials) or self._repeated(trials)
                busy = any(is_pending(trial, self.plan.rungs) for trial in trials)
            if found is None and not busy:
                return
            yield found

    def _abandoned(self, trials: list[Trial]) -> Call[Reached] | None:
        """Take over a trial whose worker is gone."""
        for trial in trials:
            if is_pending(trial, self.plan.rungs) and (call := self._part_of(trial)) is not None:
                return call
        return None

    def _promoted(self, trials: list[Trial]) -> Call[Reached] | None:
        """Send the best trial that waits to its next rung."""
        if self._is_spent(trials):
            return None
        own = [trial for trial in trials if trial.repeats is None]
        waiting = next_promotion(own, self.plan.rungs, more_to_come=self._may_begin(own))
        if waiting is None:
            return None
        self.study.promote(waiting.number, waiting.target + 1)
        return self._part_of(self.study.trials()[waiting.number])

    def _new(self, trials: list[Trial]) -> Call[Reached] | None:
        """Begin a trial with new settings, if the budget allows one."""
        own = [trial for trial in trials if trial.repeats is None]
        if not self._may_begin(own) or self._is_spent(trials):
            return None
        if len(own) >= FIRST_TRIALS and all(trial.state == "failed" for trial in own):
            raise UserError(f"{self.study.folder}: the first {len(own)} trials failed, the last one: {own[-1].reason}")
        plan, reason = self.plan, ""
        for attempt in range(MOST_DRAWS):
            drawn, distributions = suggest(
                plan.space,
                plan.config,
                trials,
                [self.study.distributions(trial.number) for trial in trials],
                plan.rungs,
                sampler=plan.sampler,
                seed=plan.config.seed,
                attempt=attempt,
            )
            values = completed(drawn.values, plan.config)
            try:
                config = plan.base.with_values(values, *QUIET)
                figures = planned_figures(config, with_memory=plan.limits.memory is not None)
                reason = why_not(figures, plan.limits) or ""
            except UserError as error:
                reason = str(error)
            if not reason:
                trial = Trial(0, "running", drawn.parameters, values, seed=plan.config.seed, figures=figures)
                number = self.study.add(trial, distributions)
                return self._part_of(self.study.trials()[number])
        raise UserError(f"{plan.space.name}: none of {MOST_DRAWS} draws can be run; the last one: {reason}")

    def _repeated(self, trials: list[Trial]) -> Call[Reached] | None:
        """Run one of the best trials with a further seed, once all trials are done."""
        plan = self.plan
        own = [trial for trial in trials if trial.repeats is None]
        if plan.budget.seeds < 2 or any(is_pending(trial, plan.rungs) for trial in own) or self._is_spent(trials):
            return None
        done = {(trial.repeats, trial.seed) for trial in trials}
        for trial in best_trials(own)[: plan.budget.finalists]:
            for seed in range(plan.config.seed + 1, plan.config.seed + plan.budget.seeds):
                if trial.state == "complete" and (trial.number, seed) not in done:
                    last = len(plan.rungs) - 1
                    repeat = Trial(
                        0, "running", trial.parameters, trial.values, target=last, repeats=trial.number, seed=seed
                    )
                    number = self.study.add(repeat, self.study.distributions(trial.number))
                    return self._part_of(self.study.trials()[number])
        return None

    def _part_of(self, trial: Trial) -> Call[Reached] | None:
        """Make the call that takes a trial to the rung that it was sent to; None if somebody else works on it."""
        folder = self.folder_of(trial.number)
        folder.parent.mkdir(exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        if not lock.try_acquire():
            return None
        if is_being_written(folder):  # by a process whose worker was killed, and which writes its last checkpoint
            lock.release()
            return None
        share = self.plan.rungs[trial.target]
        config = self.plan.base.with_values(trial.values, *QUIET, f"output_dir={folder}", f"seed={trial.seed}")
        self._held[self._given] = trial.number, share, lock, time.monotonic()
        self._given += 1
        return Call(str(folder), run_part, (config, share))

    def folder_of(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return self.study.folder / "trials" / f"{number:04}"

    def _settle(self, index: int, outcome: Reached | ReloraError) -> None:
        """Note what a part of a trial has come to."""
        number, share, lock, began = self._held.pop(index)
        try:
            if isinstance(outcome, Interrupted):  # this one process was stopped, and the trial is left to be taken over
                return
            with self._deciding():
                figures = self.study.trials()[number].figures
                kills = figures.get("kills", 0) + 1
                if isinstance(outcome, OutOfMemory) and kills < MOST_KILLS:  # killed by whom? it may go on once more
                    self.study.note(number, {**figures, "kills": kills})
                    return
                if isinstance(outcome, ReloraError):
                    self.study.fail(number, str(outcome))
                else:
                    seconds = figures.get(WALL_SECONDS, 0.0) + time.monotonic() - began
                    reached = replace(outcome, figures={**outcome.figures, WALL_SECONDS: seconds})
                    self._note(self.study.trials()[number], share, reached)
        finally:
            lock.release()
        trial = self.study.trials()[number]
        news = trial.reason or ("diverged" if trial.diverged else f"{percent(share)}%  loss {trial.loss:.4f}")
        again = "" if trial.repeats is None else f" (trial {trial.repeats} with seed {trial.seed})"
        self.tell(f"trial {number}{again}  {news};  {self.standing()}")

    def _note(self, trial: Trial, share: float, reached: Reached) -> None:
        """Report a loss, and end the trial if there is nothing left for it to do."""
        number, folder = trial.number, self.folder_of(trial.number)
        self.study.report(number, percent(share), reached.loss, {**trial.figures, **reached.figures})
        if share >= 1 or not math.isfinite(reached.loss):
            self.study.complete(number, reached.loss)
            clear(folder, CHECKPOINTS)
        elif reason := too_slow(self.study.trials()[number], self.plan.limits):
            self.study.give_up(number, reason)
            clear(folder, CHECKPOINTS)

    def _close(self) -> None:
        """Give up the trials that nobody is going to promote, and delete what only they needed."""
        with self._deciding():
            trials = self.study.trials()
            if not self._may_begin([trial for trial in trials if trial.repeats is None]):
                for trial in trials:
                    if trial.state == "running" and not is_pending(trial, self.plan.rungs):
                        self.study.give_up(trial.number, f"not among the best at {max(trial.losses)}% of the run")
                        clear(self.folder_of(trial.number), CHECKPOINTS)
            best = best_trials(trials)[:1]
            for trial in trials:
                if trial not in best and trial.state != "running":
                    clear(self.folder_of(trial.number), *RESULTS)

    def _may_begin(self, own: list[Trial]) -> bool:
        """Whether the number of trials allows another one."""
        most = self.plan.budget.trials
        return most is None or len(own) < most

    def _is_spent(self, trials: list[Trial]) -> bool:
        """Whether the trials have trained on as many tokens as they may."""
        most = self.plan.budget.tokens
        return most is not None and sum(trial.figures.get("tokens", 0) for trial in trials) >= most

    def _seconds_left(self, trials: list[Trial]) -> float | None:
        """Estimate the seconds that the search will still take; None before anything is done."""
        budget, now = self.plan.budget, time.monotonic()
        left = [] if budget.hours is None else [max(budget.hours * SECONDS_PER_HOUR - (now - self._started), 0.0)]
        held = {number: now - began for number, _, _, began in self._held.values()}
        running = {trial.number for trial in trials if is_pending(trial, self.plan.rungs)}
        lanes = self.plan.jobs + len(running - held.keys())
        if budget.trials is not None:
            work = Work(
                trials=budget.trials,
                rungs=self.plan.rungs,
                seeds=budget.seeds,
                finalists=budget.finalists,
                lanes=lanes,
                elapsed=held,
            )
            if (seconds := seconds_left(trials, work)) is not None:
                left.append(seconds)
        if budget.tokens is not None and (each := seconds_per_token(trials)) is not None:
            tokens = sum(trial.figures.get("tokens", 0.0) for trial in trials)
            left.append(max(budget.tokens - tokens, 0.0) * each / lanes)
        return min(left, default=None)

    def _deciding(self) -> FileLock:
        """Return the lock under which workers decide."""
        return FileLock(self.study.folder / "study.lock")
