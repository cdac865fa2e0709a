"""Kill anywhere: runs and preparations ended by SIGKILL at named and at random moments, continued, compared.

A trial passes if every command that followed a kill continued from the newest checkpoint that was sound, the last one
ended with status 0, and what it leaves equals, byte for byte, what an undisturbed run leaves: tensors of the last
checkpoint, model, samples, every figure of the metric files but times and memory, and no file more or less.
`stops` and `signals` are the gentler ends: SIGTERM, SIGINT, SIGUSR1.
"""

import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tests.faults.harness import ROOT, Blow, Ended, Server, difference, files_of, outcome_of

from relora.errors import UserError
from relora.train.checkpoint import Checkpoints

Rows = list[tuple[str, int, int]]
"""What was tried, how often it passed, of how many."""

KILLED = 128 + signal.SIGKILL
GRACE_SECONDS = 2.5
"""Within which a run must have stopped: two seconds and a step; a step of this model takes hundredths."""
STEPS, WARM_START, RESTART_EVERY, SAVE_EVERY, EVALUATE_EVERY = 40, 8, 8, 5, 6
"""Of the run: restarts before steps 16, 24 and 32; one save, at 40, falls on a boundary's evaluation."""
LAYERS = 14
"""Low-rank layers of its model."""
SMALL_STEPS = {
    "relora.data.pretraining.prepare:CHUNK_CHARS": 3000,
    "relora.data.pretraining.prepare:JOURNAL_SECONDS": 0,
    "relora.data.pretraining.journal:SHARD_TOKENS": 2000,
}
"""Many chunks, shards and journal lines from little text."""
VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "plain": {},
    "pruned moments, dropout": {"restart": {"optimizer": "random"}, "lowrank": {"lora_dropout": 0.1}},
    "bf16 base, trained scale": {"precision": {"dtype": "bf16"}, "lowrank": {"trainable_scaling": True}},
}
"""Kinds of runs that the random kills meet."""

LOOP, RESTART, PARTIAL = "relora.train.loop", "relora.lowrank.restart", r"checkpoints/\.step-00000020\.partial"
NAMED_IN_A_RUN: dict[str, Blow] = {
    "before the first step": Blow(call=f"{LOOP}:train_step"),
    "between the micro-batches of a step": Blow(call="relora.recipes.pretrain:token_loss", nth=12),
    "between gradient and update": Blow(call="torch.nn.utils:get_total_norm", nth=5, after=True),
    "in the warm start": Blow(call=f"{LOOP}:train_step", nth=4, after=True),
    "a metrics line half written": Blow(
        call="relora.report.metrics:JsonLines.append", nth=9, after=True, cut="metrics.jsonl"
    ),
    "the step before the switch": Blow(call=f"{LOOP}:train_step", nth=WARM_START),
    "before the switch": Blow(call=f"{LOOP}:inject"),
    "in the switch, between layers": Blow(call="relora.lowrank.linear:LowRankLinear.redraw_", nth=6),
    "in the switch, moments not carried over": Blow(call=f"{LOOP}:carry_state"),
    "after the switch": Blow(call=f"{LOOP}:carry_state", after=True),
    "the first low-rank step": Blow(call=f"{LOOP}:train_step", nth=WARM_START + 1, after=True),
    "the step before a restart": Blow(call=f"{LOOP}:train_step", nth=16),
    "before a restart": Blow(call=f"{LOOP}:restart"),
    "in a restart, before the first merge": Blow(call="relora.lowrank.linear:LowRankLinear.replace_factors_", nth=1),
    "in a restart, inside the merge": Blow(
        call="relora.lowrank.storage.frozen_weight:FrozenWeight.add_", nth=9, after=True
    ),
    "in a restart, between new factors and their moments": Blow(
        call="relora.lowrank.linear:LowRankLinear.replace_factors_", nth=LAYERS - 3, after=True
    ),
    "in a restart, between two moments": Blow(call=f"{RESTART}:reset_moments", nth=2 * LAYERS + 7),
    "in a restart, between two layers": Blow(call=f"{RESTART}:_merge_and_redraw", nth=3 * LAYERS - 2),
    "after a restart, before its line": Blow(call=f"{LOOP}:restart", nth=2, after=True),
    "after a restart's line": Blow(call="relora.report.reporter:Reporter.restart", nth=2, after=True),
    "a restart's line half written": Blow(
        call="relora.report.reporter:Reporter.restart", nth=3, after=True, cut="restarts.jsonl"
    ),
    "the step after a restart": Blow(call=f"{LOOP}:train_step", nth=25, after=True),
    "in the first evaluation": Blow(call="relora.measure:token_loss", nth=2),
    "in a later evaluation": Blow(call="relora.measure:token_loss", nth=18, after=True),
    "before the first checkpoint": Blow(event=r"mkdir checkpoints$"),
    "before a checkpoint's first file": Blow(event=f"write {PARTIAL}/"),
    "a checkpoint's weights half written": Blow(event=f"half {PARTIAL}/weights"),
    "between a checkpoint's tensor files": Blow(event=f"written {PARTIAL}/weights"),
    "a checkpoint's frozen weights half written": Blow(event=f"half {PARTIAL}/frozen"),
    "before frozen weights are linked": Blow(event=r"link checkpoints/step-00000025/frozen"),
    "after frozen weights are linked": Blow(event=r"write checkpoints/\.step-00000030\.partial/weights"),
    "a checkpoint's moments half written": Blow(event=f"half {PARTIAL}/optimizer"),
    "before a checkpoint's manifest": Blow(event=rf"open {PARTIAL}/\.manifest\.json"),
    "a checkpoint's manifest empty": Blow(event=rf"opened {PARTIAL}/\.manifest\.json"),
    "a checkpoint's manifest before its rename": Blow(event=rf"rename {PARTIAL}/\.manifest\.json"),
    "between sync and rename of a checkpoint": Blow(event=f"rename {PARTIAL} to "),
    "between rename and sync of the folder": Blow(event=r"sync checkpoints$", nth=3),
    "before the first pruning": Blow(event=r"rmtree checkpoints/step-"),
    "in the middle of a pruning": Blow(event=r"remove checkpoints/step-", nth=6),
    "before the last step's checkpoint": Blow(event=r"mkdir checkpoints/\.step-00000040"),
    "between training and export": Blow(call="relora.recipes.pretrain:save_model"),
    "in the export, before the weights": Blow(event=r"write \.model\.partial/"),
    "in the export, weights half written": Blow(event=r"half \.model\.partial/"),
    "in the export, before the tokenizer": Blow(event=r"open \.model\.partial/tokenizer_config"),
    "in the export, before the rename": Blow(event=r"rename \.model\.partial"),
    "in the measurement of the result": Blow(call="relora.report.reporter:Reporter.measuring", after=True),
    "after the line of the result": Blow(call="relora.report.reporter:Reporter.final", after=True),
    "between export and samples": Blow(call="relora.recipes.pretrain:sample_texts"),
    "before the samples are written": Blow(event=r"open \.samples\.json"),
    "between samples and report": Blow(call="relora.recipes.pretrain:write_report"),
    "the report open and empty": Blow(event=r"opened \.report\.html"),
    "the report before its rename": Blow(event=r"rename \.report\.html"),
    "config.yaml open and empty": Blow(event=r"opened \.config\.yaml"),
    "before config.yaml is renamed": Blow(event=r"rename \.config\.yaml"),
    "environment.json open and empty": Blow(event=r"opened \.environment\.json"),
    "before the tokenizer's copy is renamed": Blow(event=r"rename \.tokenizer\.partial"),
}
NAMED_IN_CONTINUED_RUNS: dict[str, tuple[Blow, ...]] = {
    "three times inside the same restart": (
        Blow(call=f"{RESTART}:reset_moments", nth=2 * LAYERS + 7),
        Blow(call="relora.lowrank.linear:LowRankLinear.replace_factors_", nth=3, after=True),
        Blow(call=f"{RESTART}:reset_moments", nth=3),
    ),
    "before, in and after the switch": (
        Blow(call=f"{LOOP}:inject"),
        Blow(call=f"{LOOP}:carry_state"),
        Blow(call=f"{LOOP}:train_step", nth=4),
    ),
    "as it takes up a checkpoint": (
        Blow(call=f"{LOOP}:train_step", nth=12),
        Blow(call="relora.report.reporter:Reporter.rewind"),
        Blow(call="relora.report.reporter:Reporter.rewind", after=True),
    ),
    "in the first checkpoint after a continued start": (
        Blow(call=f"{LOOP}:train_step", nth=28),
        Blow(event=r"link checkpoints/step-00000025/frozen|write checkpoints/.*/frozen"),
        Blow(event=r"rename checkpoints/\.step-00000030\.partial to "),
    ),
    "as it sweeps a half-written checkpoint away": (
        Blow(event=f"half {PARTIAL}/optimizer"),
        Blow(event=r"remove checkpoints/\.step-00000020\.partial"),
    ),
    "as the model of an earlier export is replaced": (
        Blow(call="relora.recipes.pretrain:sample_texts"),
        Blow(event=r"rename \.model\.partial to model"),
        Blow(event=r"rename \.model\.partial to model"),
    ),
    "as the report of a finished run is replaced": (
        Blow(event=r"sync \.$", nth=6),
        Blow(event=r"rename \.report\.html"),
    ),
}
"""What befalls the first start, the second ..."""
NAMED_IN_PREPARE: dict[str, Blow] = {
    "prepare: the journal open and empty": Blow(event=r"opened journal\.jsonl"),
    "prepare: the journal's first line not synced": Blow(event=r"sync journal\.jsonl"),
    "prepare: a journal line half written": Blow(
        call="relora.data.pretraining.journal:Journal.note", nth=3, after=True, cut="journal.jsonl"
    ),
    "prepare: in the tokenizer's training": Blow(call="relora.data.pretraining.encode:SplitRule.is_held_out", nth=8),
    "prepare: the tokenizer before its rename": Blow(event=r"rename train/\.tokenizer\.partial"),
    "prepare: a shard open and empty": Blow(event=r"opened train/shard-00001"),
    "prepare: between two chunks": Blow(call="relora.data.pretraining.journal:SplitWriter.append", nth=9),
    "prepare: shards synced, journal not": Blow(call="relora.data.pretraining.journal:Journal.note", nth=4),
    "prepare: before the first index": Blow(event=r"open train/\.index"),
    "prepare: between the two indexes": Blow(event=r"open validation/\.index"),
    "prepare: both indexes there, journal too": Blow(event=r"remove journal\.jsonl"),
}
NAMED: dict[str, list[str]] = {
    "named points of a run": [*NAMED_IN_A_RUN],
    "named points of continued runs": [*NAMED_IN_CONTINUED_RUNS],
    "named points of a preparation": [*NAMED_IN_PREPARE],
}


@dataclass(frozen=True)
class Whole:
    """What an undisturbed command comes to."""

    outcome: Mapping[str, object]
    ended: Ended


@dataclass
class Workbench:
    """The prepared text, and what each kind of run comes to when nobody disturbs it."""

    server: Server
    folder: Path
    wholes: dict[str, Whole] = field(default_factory=dict)
    trials: int = 0

    def preparing(self, out: Path) -> list[object]:
        """The arguments of a `prepare`."""
        options = ["--train-tokenizer", 300, "--validation", "20%", "--workers", 2]
        return ["prepare", self._pages, "--out", out, *options]

    def pretraining(self, folder: Path, variant: str) -> list[object]:
        """The arguments of a `pretrain`; its configuration is written beside the run folder."""
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(settings(self.folder / "prepared", folder, VARIANTS[variant])))
        return ["pretrain", file]

    def command(self, out: Path, variant: str) -> Callable[..., Ended]:
        """`command(blows=...)` runs it, again and again; variant `prepare` or one of VARIANTS."""
        if variant == "prepare":
            return lambda blows=(): self.server.relora(*self.preparing(out), watch=out, blows=blows, dials=SMALL_STEPS)
        return lambda blows=(): self.server.relora(*self.pretraining(out, variant), watch=out, blows=blows)

    def whole(self, variant: str) -> Whole:
        """Run once and remembered."""
        if variant not in self.wholes:
            out = self.folder / f"whole-{len(self.wholes)}"
            ended = self.command(out, variant)()
            assert ended.status == 0, ended.printed
            self.wholes[variant] = Whole(self.outcome(out, variant), ended)
        return self.wholes[variant]

    @staticmethod
    def outcome(out: Path, variant: str) -> Mapping[str, object]:
        """What is compared."""
        return files_of(out) if variant == "prepare" else outcome_of(out)

    def new_folder(self) -> Path:
        """For one trial."""
        self.trials += 1
        return self.folder / f"trial-{self.trials}"

    @cached_property
    def _pages(self) -> Path:
        """Twenty pages of the packaged corpus, as text files."""
        pages = self.folder / "pages"
        pages.mkdir()
        book = sorted((ROOT / "corpus").glob("*.txt"))[0].read_text(encoding="utf-8")
        for page in range(20):
            (pages / f"{page:02}.txt").write_text(book[page * 2000 : (page + 1) * 2000], encoding="utf-8")
        return pages


@contextmanager
def workbench() -> Iterator[Workbench]:
    """A server, a temporary folder, and the text that all runs train on."""
    with TemporaryDirectory(prefix="relora-faults-") as name, Server(Path(name)) as server:
        bench = Workbench(server, Path(name))
        out = bench.folder / "prepared"
        ended = server.relora(*bench.preparing(out), watch=out)
        assert ended.status == 0, ended.printed
        yield bench


def settings(prepared: Path, folder: Path, changes: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """A run of 40 steps, a line of metrics each, with all that a run can have."""
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {
            "preset": "llama-9m",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS // 7,
        },
        "data": {"train": str(prepared / "train"), "validation": str(prepared / "validation"), "sequence_length": 32},
        "method": "relora",
        "lowrank": {"r": 4, "lora_alpha": 4},
        "warm_start": {"steps": WARM_START},
        "restart": {"every_steps": RESTART_EVERY, "warmup_steps": 2},
        "schedule": {"total_steps": STEPS, "warmup_steps": 4},
        "optimizer": {"lr": 5e-3},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "evaluate": {"every_steps": EVALUATE_EVERY, "tokens": 300},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": ["The"], "max_new_tokens": 4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return tree


def sound_steps(folder: Path) -> list[int]:
    """The checkpoints of a run folder that verify."""
    checkpoints, sound = Checkpoints(folder / "checkpoints"), []
    for step in checkpoints.steps():
        try:
            sound.append(checkpoints.open(step).step)
        except UserError:
            continue
    return sound


@dataclass(frozen=True)
class Trial:
    """What became of a command that was met by blows."""

    starts: tuple[Ended, ...]
    problem: str
    """What is not as it should be; empty if all is."""

    @property
    def kills(self) -> int:
        """How many starts ended by SIGKILL."""
        return sum(ended.killed for ended in self.starts)

    def saved(self, step: int) -> bool:
        """Whether the first start wrote the checkpoint of that step."""
        return any(event.endswith(f" to checkpoints/step-{step:08d}") for event in self.starts[0].events)


def struck(bench: Workbench, variant: str, blows: Sequence[Sequence[Blow]], ends: Sequence[int] = (KILLED,)) -> Trial:
    """A command that meets `blows`, one start after the other, and is then left alone.

    Args:
        blows: what befalls the first start, the second ...
        ends: the statuses, as a shell sees them, with which a start that was met may end.
    """
    out, newest = bench.new_folder(), 0
    whole, command = bench.whole(variant), bench.command(out, variant)
    starts: list[Ended] = []
    for befalling in (*blows, ()):
        starts.append(ended := command(blows=befalling))
        problem = ""
        if ended.shell_status not in (ends if befalling else (0,)):
            problem = f"status {ended.shell_status}"
        if newest and ended.status == 0 and f"continuing after step {newest} " not in ended.printed:
            problem = f"did not continue after step {newest}"
        sound = sound_steps(out)
        if newest and (not sound or sound[-1] < newest):
            problem = f"lost the checkpoint of step {newest}, sound are {sound}"
        if problem:
            last = ended.events[-1] if ended.events else "none"
            return Trial(tuple(starts), f"start {len(starts)}: {problem}; last event {last}; {ended.printed[-500:]!r}")
        newest = sound[-1] if sound else 0
    different = difference(whole.outcome, bench.outcome(out, variant))
    if not different:
        shutil.rmtree(out)
    return Trial(tuple(starts), different)


def drawn_kills(bench: Workbench, draw: random.Random) -> tuple[str, list[list[Blow]]]:
    """A kind of run and one to three kills in a row: at the nth change of a file, or after a time."""
    variant = draw.choice([*VARIANTS, *VARIANTS, "prepare"])
    whole, blows = bench.whole(variant).ended, []
    for _ in range(draw.choice((1, 1, 2, 3))):
        at_event = Blow(event=".", nth=draw.randint(1, len(whole.events)))
        blows.append([draw.choice((at_event, Blow(seconds=draw.uniform(0.0, whole.seconds))))])
    return variant, blows


def random_kill(bench: Workbench, seed: int, number: int) -> Trial:
    """Trial `number` of a campaign; drawn anew until a kill met the command before it was done."""
    draw = random.Random(f"{seed}-{number}")
    while True:
        trial = struck(bench, *drawn_kills(bench, draw), ends=(KILLED, 0))
        if trial.kills or trial.problem:
            return trial


def named_kill(bench: Workbench, name: str) -> Trial:
    """The kill, or the kills in a row, of that name."""
    if name in NAMED_IN_CONTINUED_RUNS:
        return struck(bench, "plain", [[blow] for blow in NAMED_IN_CONTINUED_RUNS[name]])
    if name in NAMED_IN_PREPARE:
        return struck(bench, "prepare", [[NAMED_IN_PREPARE[name]]])
    return struck(bench, "plain", [[NAMED_IN_A_RUN[name]]])


def campaign(trials: int, seed: int) -> Rows:
    """Every named point once, and random kills to make up `trials`."""
    rows = Tally()
    with workbench() as bench:
        for row, names in NAMED.items():
            for name in names:
                rows.add(row, name, named_kill(bench, name))
        for number in range(trials - sum(map(len, NAMED.values()))):
            rows.add("random points", f"seed {seed}, trial {number}", random_kill(bench, seed, number))
    return rows.rows()


def stops(trials: int, seed: int) -> Rows:
    """SIGTERM in each of the run's steps (`trials` of them): status 143, a checkpoint of that step, continued."""
    rows = Tally()
    with workbench() as bench:
        for step in range(1, min(trials, STEPS) + 1):
            blow = Blow(call=f"{LOOP}:train_step", nth=step, signal=signal.SIGTERM)
            trial = struck(bench, "plain", [[blow]], ends=(143,))
            if not trial.problem and not trial.saved(step):
                trial = replace(trial, problem=f"no checkpoint of step {step}")
            rows.add("stopped by SIGTERM in every step", f"step {step}", trial)
    return rows.rows()


def signals(trials: int, seed: int) -> Rows:
    """SIGTERM and SIGINT at random times, once and twice; SIGUSR1, which asks for a checkpoint and no more."""
    rows, draw = Tally(), random.Random(seed)
    with workbench() as bench:
        seconds = bench.whole("plain").ended.seconds
        for number in range(trials):
            for stop in (signal.SIGTERM, signal.SIGINT):
                first = draw.uniform(0.0, seconds)
                once, twice = (
                    Blow(seconds=first, signal=stop),
                    Blow(seconds=first + draw.uniform(0.0, 0.05), signal=stop),
                )
                for name, blows in ((stop.name, [once]), (f"{stop.name} twice", [once, twice])):
                    trial = struck(bench, "plain", [blows], ends=(128 + stop, 0))
                    if not trial.problem and trial.starts[0].seconds_after_blow > GRACE_SECONDS:
                        late = trial.starts[0].seconds_after_blow
                        trial = replace(trial, problem=f"took {late:.1f} s to stop")
                    rows.add(f"{name} at a random time", f"seed {seed}, number {number}", trial)
            step = draw.randint(1, STEPS)
            trial = struck(
                bench, "plain", [[Blow(call=f"{LOOP}:train_step", nth=step, signal=signal.SIGUSR1)]], ends=(0,)
            )
            if not trial.problem and not trial.saved(step):
                trial = replace(trial, problem=f"no checkpoint of step {step}")
            rows.add("SIGUSR1 in a random step", f"step {step}", trial)
    return rows.rows()


class Tally:
    """Counts trials by what was tried, and says at once what failed."""

    def __init__(self) -> None:
        self._passed: Counter[str] = Counter()
        self._of: Counter[str] = Counter()

    def add(self, row: str, name: str, trial: Trial) -> None:
        """One more trial."""
        self._of[row] += 1
        self._passed[row] += not trial.problem
        if trial.problem:
            print(f"FAILED {row}: {name}: {trial.problem}", file=sys.stderr, flush=True)

    def rows(self) -> Rows:
        """In the order in which the rows were begun."""
        return [(row, self._passed[row], of) for row, of in self._of.items()]
