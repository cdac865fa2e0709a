"""Pretraining methods side by side: one model, one stream of tokens, one budget for each method's learning rate.

    tune full rank      its best rate is the rate of all that the low-rank methods train at full rank
    tune the others     of a low-rank method the rate of the factors, of any other its rate
    repeat              every method's best rate at the other seeds

A method is a list of overrides (`methods`), a search asks for runs (`tuning`), a run has a process of its own
and is never made twice (`runs`). A run at the first seed and full length that a search made is the first of its
method's results, so the mean is a little too good, for every method alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relora.config import RunConfig, load_config
from relora.errors import UserError
from relora.experiments.launch import Outcome, run_all, settled_folder
from relora.experiments.results import Attempt, Comparison, Result, as_figures
from relora.experiments.search import Choice, Search, Trial, best_of, halving, run_searches
from relora.files.atomic import write_durably
from relora.train.optim import check_optimizer

RECORD = "comparison.json"
RATES = (0.5, 1.0, 2.0, 4.0)
"""Multiples of a method's own rate that `--tune-lr` begins with."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is run for each method, and how."""

    seeds: int = 1
    tune: bool = False
    """Search the rate by successive halving."""
    multiples: Sequence[float] = RATES
    given: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Method -> rates to choose from; in place of multiples of its own."""
    jobs: int = 1
    """Runs side by side."""
    keep: bool = False
    """Keep checkpoints, models and reports of the runs."""
    runs: Path | None = None
    """Where the runs lie; `runs` in the comparison's folder unless given."""


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
    """From a command line: `METHOD=RATE,RATE` in `lr`, `0.5,1,2` in `multiples`; None is the default."""
    if multiples is not None and not tune:
        raise UserError("--rates: are what --tune-lr begins with; give that, too")
    for option, count in (("--seeds", seeds), ("--jobs", jobs)):
        if count is not None and count < 1:
            raise UserError(f"{option} {count}: must be 1 or more")
    given = {}
    for text in lr:
        method, _, rates = text.partition("=")
        given[method] = _rates_of(rates, f"--lr {text}: write METHOD=RATE, e.g. relora=1e-3,2e-3")
    return Budget(
        seeds=seeds or 1,
        tune=tune,
        multiples=RATES if multiples is None else _rates_of(multiples, "--rates: write multiples, e.g. 0.5,1,2,4"),
        given=given,
        jobs=jobs or 1,
        keep=keep,
        runs=runs,
    )


def _rates_of(text: str, mistake: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise UserError(mistake) from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise UserError(mistake)
    return rates


def compare_pretraining(
    path: str | Path,
    overrides: Sequence[str],
    methods: Mapping[str, tuple[str, ...]],
    budget: Budget,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run every method within the budget, continuing what an earlier call has done, and write FOLDER/comparison.json.

    Args:
        path, overrides: the configuration of all runs; its `output_dir` is the comparison's folder.
        methods: name -> what it overrides in that configuration (see `methods_of`).
        tell: takes a line for each run that ends.

    Raises:
        UserError: a method or a rate that cannot be, or what a run refuses; what can be told before a run is.
        RunStopped, Interrupted: see `run_all`.
    """
    bench = _Bench(path, overrides, methods, budget, tell)
    full_rank = [name for name in methods if bench.own(name).method == "full"]
    choices = bench.choose(full_rank)
    if "full" in choices:
        bench.full_lr = choices["full"].rate
    choices |= bench.choose([name for name in methods if name not in full_rank])
    final = [Attempt(name, choices[name].rate, 1.0, bench.seed + n) for name in methods for n in range(budget.seeds)]
    outcomes = dict(zip(final, bench.run(final), strict=True))
    results = [
        Result(
            method=name,
            overrides=overridden,
            rate=choices[name].rate,
            at_edge=choices[name].at_edge,
            tuning_tokens=bench.tuning_tokens.get(name, 0),
            outcomes=tuple(outcome for attempt, outcome in outcomes.items() if attempt.method == name),
        )
        for name, overridden in methods.items()
    ]
    comparison = Comparison(bench.folder, results, list(bench.done.items()))
    text = json.dumps(as_figures(comparison), indent=1, allow_nan=False, ensure_ascii=False)
    write_durably(bench.folder / RECORD, text + "\n")
    return comparison


def shortened(config: RunConfig, length: float) -> list[str]:
    """Overrides that make a run of the same shape, `length` times as long: every period shrinks alike."""
    if length == 1.0:
        return []
    total = max(2, round(config.total_steps * length))

    def scaled(steps: int, least: int, most: int) -> int:
        return 0 if steps == 0 else min(max(round(steps * length), least), most)

    start, restart = config.warm_start, config.restart
    warm_start = start.model_dump(mode="json") | {
        "steps": scaled(start.steps, 1, total - 1),
        "window_steps": scaled(start.window_steps, 1, total),
    }
    every = scaled(restart.every_steps, restart.turns if restart.stagger != "none" else 1, total)
    climb = config.lowrank.warmup_steps
    return [
        f"schedule.total_steps={total}",
        "schedule.total_tokens=null",
        f"schedule.warmup_steps={scaled(config.schedule.warmup_steps, 1, total - 1)}",
        f"warm_start={json.dumps(warm_start)}",
        *([] if climb is None else [f"lowrank.warmup_steps={scaled(climb, 1, total)}"]),
        f"restart.every_steps={every}",
        f"restart.warmup_steps={scaled(restart.warmup_steps, 1, every - 1)}",
        f"optimizer.projection.every_steps={scaled(config.optimizer.projection.every_steps, 1, total)}",
    ]


class _Bench:
    """Where attempts become configurations, and configurations outcomes."""

    def __init__(
        self,
        path: str | Path,
        overrides: Sequence[str],
        methods: Mapping[str, tuple[str, ...]],
        budget: Budget,
        tell: Callable[[str], None],
    ) -> None:
        self._path, self._overrides, self._methods, self._budget, self._tell = path, overrides, methods, budget, tell
        self.full_lr: float | None = None
        """The best of full rank, once that is known."""
        self.done: dict[Attempt, Outcome] = {}
        self.tuning_tokens: dict[str, int] = {}
        base = load_config(path, overrides)
        self.seed, self.folder = base.seed, Path(base.output_dir)
        if (self.folder / "config.yaml").exists():
            raise UserError(f"output_dir: {self.folder} holds a run; give the comparison a folder of its own")
        if strangers := [name for name in budget.given if name not in methods]:
            raise UserError(f"--lr {strangers[0]}=...: no such method among {', '.join(methods)}")
        self._runs = budget.runs or self.folder / "runs"
        for name in methods:  # what is wrong with the last method is said before the first one trains
            check_optimizer(self.own(name).optimizer.name)
            self.config(Attempt(name, self._grid(name)[0], 1.0, base.seed))
        self.folder.mkdir(parents=True, exist_ok=True)

    def own(self, method: str, *further: str) -> RunConfig:
        """The configuration as a method overrides it."""
        every = ("checkpoint.keep_last=1",)
        return load_config(self._path, [*self._overrides, *every, *self._methods[method], *further])

    def config(self, attempt: Attempt) -> RunConfig:
        """Of one run, its folder included."""
        own = self.own(attempt.method)
        rates = self._rates(own, attempt.rate)
        short = shortened(own, attempt.length)
        config = self.own(attempt.method, *rates, *short, f"seed={attempt.seed}")
        return settled_folder(config, self._runs, f"{attempt.method}-lr{attempt.rate:g}")

    def choose(self, methods: Sequence[str]) -> dict[str, Choice]:
        """The rate of each method: given, or searched for."""
        searches = {name: self._search(name) for name in methods}

        def score(asked: list[tuple[str, Trial]]) -> list[float]:
            attempts = [Attempt(name, trial.rate, trial.length, self.seed) for name, trial in asked]
            for attempt in attempts:
                if len(self._grid(attempt.method)) > 1:
                    config = self.config(attempt)
                    spent = self.tuning_tokens.get(attempt.method, 0)
                    self.tuning_tokens[attempt.method] = spent + config.total_steps * config.batch_tokens
            return [outcome.score for outcome in self.run(attempts)]

        return run_searches(searches, score)

    def run(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """Their outcomes; those that are not there yet are made."""
        new = [attempt for attempt in dict.fromkeys(attempts) if attempt not in self.done]

        def tell(index: int, outcome: Outcome) -> None:
            found = "diverged" if outcome.perplexity is None else f"perplexity {outcome.perplexity:,.2f}"
            one = new[index]
            self._tell(
                f"{one.method}  rate {one.rate:g}  {outcome.steps:,} steps  seed {one.seed}: {found}"
                f"  ({outcome.seconds:,.0f} s)"
            )

        configs = [self.config(attempt) for attempt in new]
        outcomes = run_all(configs, jobs=self._budget.jobs, keep=self._budget.keep, tell=tell)
        self.done |= zip(new, outcomes, strict=True)
        return [self.done[attempt] for attempt in attempts]

    def _search(self, method: str) -> Search:
        grid = self._grid(method)
        return halving(grid) if self._budget.tune else best_of(grid)

    def _grid(self, method: str) -> Sequence[float]:
        if method in self._budget.given:
            return self._budget.given[method]
        own = self.own(method)
        if own.method != "full" and self.full_lr is not None:
            own = self.own(method, *self._rates(own, None))
        rate = own.optimizer.lr if own.method == "full" else own.lowrank_lr
        multiples = self._budget.multiples if self._budget.tune else (1.0,)
        return [float(f"{rate * multiple:.6g}") for multiple in multiples]

    def _rates(self, own: RunConfig, rate: float | None) -> list[str]:
        """Overrides for a rate of what a method tunes; that of the blocks' matrices keeps its ratio to `lr`."""
        optimizer = own.optimizer
        lr = rate if own.method == "full" else self.full_lr
        lr = optimizer.lr if lr is None else lr
        rates = [f"optimizer.lr={lr}"]
        if optimizer.matrix_lr is not None:
            rates.append(f"optimizer.matrix_lr={optimizer.matrix_lr * lr / optimizer.lr}")
        if own.method != "full" and rate is not None:
            rates.append(f"optimizer.lowrank_lr={rate}")
        return rates
