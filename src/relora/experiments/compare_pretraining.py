"""The comparison of pretraining methods: one model, one stream of tokens, one budget for each method's learning rate.

    1. tune full rank     the best rate of `full` becomes the rate of everything that other methods train at full rank
    2. tune the others    of a method with factors the rate of the factors is tuned, of any other its own rate
    3. repeat             every method runs at its best rate at the other seeds

A method is a list of overrides (`methods`), a search asks for runs (`search`), and every run has a process of its own
and is made once (`pretraining_runs`): one that a search lets go on does so from its checkpoint. The price of reuse: the
full-length run at the first seed by which a search chose the rate is also the first of the method's results, so its
mean is a little too good, for every method alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relora.config import RunConfig, load_config
from relora.errors import UserError
from relora.experiments.pretraining_runs import drop_checkpoints, end_of, run_all, with_run_folder
from relora.experiments.rates import parse_rates, rates_by_method
from relora.experiments.results import Attempt, Comparison, MethodResult, PretrainingOutcome
from relora.experiments.search import Choice, Search, Trial, best_of, halving, run_searches
from relora.experiments.tables import write_pretraining_files
from relora.planning.model_shape import with_settled_dtype
from relora.runs.settings import is_run
from relora.train.optim import check_optimizer

RATE_MULTIPLES = (0.5, 1.0, 2.0, 4.0)
"""First rates that `--tune-lr` tries, as multiples of a method's own rate."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Number and kind of the runs that every method gets."""

    seeds: int = 1
    """Runs of every method at its best rate."""
    tune: bool = False
    """Whether to search the rate by successive halving."""
    multiples: Sequence[float] = RATE_MULTIPLES
    """First rates of the search, as multiples of a method's own rate."""
    given: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Method -> rates to choose from, instead of multiples of its own rate."""
    jobs: int = 1
    """Number of runs at a time."""
    keep: bool = False
    """Whether to keep checkpoints, models and reports of the runs."""
    runs: Path | None = None
    """Folder that holds the run folders; `runs` in the comparison's folder unless given."""


def budget_of(
    lr: Sequence[str],
    *,
    tune: bool,
    multiples: str | None,
    seeds: int | None,
    jobs: int | None,
    keep: bool,
    runs: Path | None,
) -> Budget:
    """Read the options of the command line; None stands for an option that was not given.

    Args:
        lr: values of `--lr`, each `METHOD=RATE,RATE`.
        multiples: value of `--rates`, such as `0.5,1,2`.

    Raises:
        UserError: an option that cannot be read, or `--rates` without `--tune-lr`.
    """
    if multiples is not None and not tune:
        raise UserError("--rates: are what --tune-lr begins with; give that, too")
    for option, count in (("--seeds", seeds), ("--jobs", jobs)):
        if count is not None and count < 1:
            raise UserError(f"{option} {count}: must be 1 or more")
    given = rates_by_method(lr, "relora=1e-3,2e-3")
    first_multiples: Sequence[float] = RATE_MULTIPLES
    if multiples is not None:
        first_multiples = parse_rates(multiples, "--rates: write multiples, e.g. 0.5,1,2,4")
    return Budget(
        seeds=seeds or 1, tune=tune, multiples=first_multiples, given=given, jobs=jobs or 1, keep=keep, runs=runs
    )


def compare_pretraining(
    path: str | Path,
    overrides: Sequence[str],
    methods: Mapping[str, tuple[str, ...]],
    budget: Budget,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run every method within the budget and write FOLDER/comparison.json, .md, .csv and .html.

    Runs that an earlier call has made are used again, and those that it has begun are continued.

    Args:
        path, overrides: the configuration of all runs; its `output_dir` is the comparison's folder.
        methods: name -> overrides of that configuration (see `methods_of`).
        tell: called with a line for each run that ends.

    Raises:
        UserError: a method or a rate that cannot be used, or what a run refuses; found before the first run where that
            is possible.
        RunStopped, Interrupted: see `run_all`.
    """
    runner = _AttemptRunner(path, overrides, methods, budget, tell)
    full_rank = [name for name in methods if runner.method_config(name).method == "full"]
    choices = runner.choose_rates(full_rank)
    if "full" in choices:
        runner.full_lr = choices["full"].rate
    choices |= runner.choose_rates([name for name in methods if name not in full_rank])
    seeds = range(runner.seed, runner.seed + budget.seeds)
    final = [Attempt(name, choices[name].rate, 1.0, seed) for name in methods for seed in seeds]
    outcomes = dict(zip(final, runner.outcomes_of(final), strict=True))
    results = [
        MethodResult(
            method=name,
            overrides=overridden,
            rate=choices[name].rate,
            at_edge=choices[name].at_edge,
            tuning_tokens=runner.tuning_tokens(name),
            outcomes=tuple(outcome for attempt, outcome in outcomes.items() if attempt.method == name),
        )
        for name, overridden in methods.items()
    ]
    comparison = Comparison(runner.folder, results, list(runner.done.items()))
    write_pretraining_files(comparison)
    return comparison


class _AttemptRunner:
    """Turns the attempts that a comparison asks for into configurations, and runs them.

    Raises:
        UserError: see `compare_pretraining`; nothing has been written then.
    """

    def __init__(
        self,
        path: str | Path,
        overrides: Sequence[str],
        methods: Mapping[str, tuple[str, ...]],
        budget: Budget,
        tell: Callable[[str], None],
    ) -> None:
        self._path, self._methods, self._budget, self._tell = path, methods, budget, tell
        self.full_lr: float | None = None
        """Best learning rate of full rank, as soon as it is known."""
        self.done: dict[Attempt, PretrainingOutcome] = {}
        """Outcomes so far, in the order in which they were asked for."""
        self._searched: dict[tuple[str, float], int] = {}
        """(method, rate) -> tokens of the run, as far as a search of several rates has taken it."""
        base = load_config(path, overrides)
        self._overrides = [*overrides, f"precision.dtype={with_settled_dtype(base).precision.dtype}"]
        self.seed, self.folder = base.seed, Path(base.output_dir)
        if is_run(self.folder):
            raise UserError(f"output_dir: {self.folder} holds a run; give the comparison a folder of its own")
        if unknown := [name for name in budget.given if name not in methods]:
            raise UserError(f"--lr {unknown[0]}=...: no such method among {', '.join(methods)}")
        self._runs = budget.runs or self.folder / "runs"
        for name in methods:  # a mistake in the last method is found before the first one trains
            check_optimizer(self.method_config(name).optimizer.name)
            self._attempt_config(Attempt(name, self._first_rates(name)[0], 1.0, base.seed))
        self.folder.mkdir(parents=True, exist_ok=True)

    def method_config(self, method: str, *overrides: str) -> RunConfig:
        """Return the configuration with the overrides of a method, and further ones."""
        every_run = ("checkpoint.keep_last=1",)
        return load_config(self._path, [*self._overrides, *every_run, *self._methods[method], *overrides])

    def choose_rates(self, methods: Sequence[str]) -> dict[str, Choice]:
        """Find the learning rate of each method, by runs if there are several to choose from."""
        searches = {name: self._search(name) for name in methods}
        asked: list[Attempt] = []

        def losses_of(pairs: list[tuple[str, Trial]]) -> list[float]:
            attempts = [Attempt(name, trial.rate, trial.length, self.seed) for name, trial in pairs]
            asked.extend(attempts)
            for attempt in attempts:
                if len(self._first_rates(attempt.method)) > 1:
                    config = self._attempt_config(attempt)
                    tokens = end_of(config, attempt.length) * config.batch_tokens
                    self._searched[attempt.method, attempt.rate] = tokens  # of the longest one, which comes last
            return [outcome.loss_or_infinity for outcome in self.outcomes_of(attempts)]

        choices = run_searches(searches, losses_of)
        if not self._budget.keep:
            went_on = {(attempt.method, attempt.rate) for attempt in asked if attempt.length == 1.0}
            left = [attempt for attempt in asked if (attempt.method, attempt.rate) not in went_on]
            drop_checkpoints(self._attempt_config(attempt) for attempt in left)
        return choices

    def tuning_tokens(self, method: str) -> int:
        """Return the tokens of all runs by which the rate of a method was chosen."""
        return sum(tokens for (name, _), tokens in self._searched.items() if name == method)

    def outcomes_of(self, attempts: Sequence[Attempt]) -> list[PretrainingOutcome]:
        """Return the outcomes of attempts in their order, running those that have not been run yet."""
        new = [attempt for attempt in dict.fromkeys(attempts) if attempt not in self.done]

        def tell(index: int, outcome: PretrainingOutcome) -> None:
            found = "diverged" if outcome.perplexity is None else f"perplexity {outcome.perplexity:,.2f}"
            attempt = new[index]
            self._tell(
                f"{attempt.method}  rate {attempt.rate:g}  {outcome.steps:,} steps  seed {attempt.seed}: {found}"
                f"  ({outcome.seconds:,.0f} s)"
            )

        runs = [(self._attempt_config(attempt), attempt.length) for attempt in new]
        outcomes = run_all(runs, jobs=self._budget.jobs, keep=self._budget.keep, on_outcome=tell)
        self.done |= zip(new, outcomes, strict=True)
        return [self.done[attempt] for attempt in attempts]

    def _attempt_config(self, attempt: Attempt) -> RunConfig:
        """Return the configuration of one run, its run folder included."""
        own = self.method_config(attempt.method)
        rates = self._rate_overrides(own, attempt.rate)
        config = self.method_config(attempt.method, *rates, f"seed={attempt.seed}")
        return with_run_folder(config, self._runs, f"{attempt.method}-lr{attempt.rate:g}")

    def _search(self, method: str) -> Search:
        """Return the search by which the rate of a method is chosen."""
        rates = self._first_rates(method)
        return halving(rates) if self._budget.tune else best_of(rates)

    def _first_rates(self, method: str) -> Sequence[float]:
        """Return the rates that the search of a method begins with: those given, or multiples of the method's own."""
        if method in self._budget.given:
            return self._budget.given[method]
        own = self.method_config(method)
        if own.method != "full" and self.full_lr is not None:
            own = self.method_config(method, *self._rate_overrides(own, None))
        rate = own.optimizer.lr if own.method == "full" else own.lowrank_lr
        multiples = self._budget.multiples if self._budget.tune else (1.0,)
        return [float(f"{rate * multiple:.6g}") for multiple in multiples]

    def _rate_overrides(self, own: RunConfig, rate: float | None) -> list[str]:
        """Return overrides that set the learning rates of a run; `matrix_lr` keeps its ratio to `lr`.

        Args:
            own: the configuration of the method.
            rate: rate of what the method tunes: `lr` of a full-rank method, `lowrank_lr` of any other, whose `lr` is
                the best of full rank; None for its own.
        """
        optimizer = own.optimizer
        lr = rate if own.method == "full" else self.full_lr
        if lr is None:
            lr = optimizer.lr
        rates = [f"optimizer.lr={lr}"]
        if optimizer.matrix_lr is not None:
            rates.append(f"optimizer.matrix_lr={optimizer.matrix_lr * lr / optimizer.lr}")
        if own.method != "full" and rate is not None:
            rates.append(f"optimizer.lowrank_lr={rate}")
        return rates
