"""Incidents: nothing moves, the place in the data is named, and a run that is killed and continued does the same.

The runs are like those of test_loop.py: a network of two blocks, restarts before steps 6 and 9.
"""

import contextlib
import dataclasses
import importlib.util
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from tests.train.small import SETTINGS, Net, Sequences, batch
from tests.train.small import loss as good_loss
from torch import Tensor, nn

from relora.errors import Interrupted, NonFinite, RunStopped
from relora.lowrank import LowRankConfig, low_rank_layers
from relora.measure import Evaluation
from relora.report.console import Console
from relora.report.metrics import read_json_lines
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.recovery import resolve_pending
from relora.train.run import Progress, Run, restore
from relora.train.schedule import Schedule
from relora.train.state import TrainState


def loss_of(bad: Callable[[Tensor], bool], infect: float = math.nan) -> Callable[..., tuple[Tensor, Tensor]]:
    """Loss that is multiplied by `infect` for the sequences that `bad` selects."""

    def loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        summed, count = good_loss(model, input_ids, labels)
        return summed * (infect if bad(input_ids) else 1.0), count

    return loss


def is_batch(*numbers: int) -> Callable[[Tensor], bool]:
    """Predicate: sequences are the second half (the second micro-batch) of one of these batches."""
    return lambda ids: any(torch.equal(ids, batch(number).input_ids[2:]) for number in numbers)


def never(_: Tensor) -> bool:
    return False


class Killed(Exception):
    """Stands for SIGKILL."""


@dataclasses.dataclass
class Outcome:
    state: TrainState
    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    metrics: list[dict[str, object]]
    restarts: list[dict[str, object]]
    batches: list[int]

    def incidents(self) -> list[dict[str, object]]:
        return [line for line in self.metrics if line["kind"] not in ("train", "evaluation")]


def play(
    folder: Path,
    bad: Callable[[Tensor], bool],
    *,
    kill_at: int | None = None,
    signals: Mapping[int, signal.Signals] = MappingProxyType({}),
    **changes: object,
) -> Outcome:
    """Run 12 steps with a checkpoint every 4.

    Args:
        bad: selects the sequences whose loss is not finite.
        kill_at: number of batches that are served in this process before it is killed.
        signals: signals that arrive while the batch of a number is requested.
        changes: fields of `Run` that differ from the settings of `tests.train.small`.
    """
    folder.mkdir(exist_ok=True)
    model, asked = Net(), []

    def batch_at(number: int) -> Sequences:
        if len(asked) == kill_at:
            raise Killed
        if number in signals:
            signal.raise_signal(signals[number])
        asked.append(number)
        return batch(number)

    def evaluate(model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        each_batch()
        with torch.no_grad():
            summed, tokens = good_loss(model, *batch(1000))
        return Evaluation.of(summed.item(), int(tokens), None)

    settings = SETTINGS | {
        "model": model,
        "schedule": Schedule(total_steps=12, warm_start_steps=3, restart_every_steps=3, restart_warmup_steps=1),
        "batch_at": batch_at,
        "loss": loss_of(bad),
        "evaluate": evaluate,
        "checkpoint_every_steps": 4,
    }
    with (
        Reporter(folder, 12, [], Console(quiet=True)) as reporter,
        Checkpoints(folder / "checkpoints", background=False) as checkpoints,
    ):
        run = Run(**(settings | {"reporter": reporter, "checkpoints": checkpoints} | changes))
        progress = restore(run, checkpoints.latest()[0])
        state = train(run, progress).state
    newest = checkpoints.open(12)
    files = [
        [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in read_json_lines(file)]
        for file in (folder / "metrics.jsonl", folder / "restarts.jsonl")
    ]
    assert newest.state.progress == state
    return Outcome(state, newest.weights(), newest.optimizer(), *files, asked)


def same(one: Outcome, other: Outcome) -> bool:
    return (
        one.state == other.state
        and one.metrics == other.metrics
        and one.restarts == other.restarts
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        and all(torch.equal(one.moments[name], other.moments[name]) for name in one.moments | other.moments)
    )


# Stop


@pytest.mark.parametrize("infect", [math.nan, math.inf])
def test_stop_says_where_in_the_data(tmp_path: Path, infect: float) -> None:
    with pytest.raises(
        RunStopped, match=r"step 5: loss (nan|inf).*no weight has moved \(batch 5, sequences 2-3\); lower"
    ):
        play(tmp_path, never, loss=loss_of(is_batch(5), infect))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]
    assert play(tmp_path, never).state == TrainState(12, 288)


def test_a_gradient_alone_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    """The loss is finite: the square root of 0 has an infinite slope."""

    def loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        summed, count = good_loss(model, input_ids, labels)
        return summed + torch.sqrt(model.head.bias[0] * 0.0), count

    with pytest.raises(RunStopped, match=r"loss \d.*gradient norm nan \(first in head.bias\).*batch 0, sequences 0-3"):
        play(tmp_path, never, loss=loss)


def test_no_checkpoint_holds_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    """A tensor that does not affect the loss is checked when it is saved. A buffer may hold infinities, as masks do."""
    for value, ends in ((math.inf, 12), (math.nan, 0)):
        model = Net()
        model.register_buffer("unused", torch.tensor([1.0, value]))
        with (
            contextlib.suppress(RunStopped) if ends else pytest.raises(RunStopped, match="after step 4: unused is not")
        ):
            play(tmp_path / str(value), never, model=model)
        assert max(Checkpoints(tmp_path / str(value) / "checkpoints").steps(), default=0) == ends


# Skip


def test_a_skipped_step_moves_nothing_and_the_timetable_goes_on(tmp_path: Path) -> None:
    whole = play(tmp_path / "whole", never)
    skipping = play(tmp_path / "skipping", is_batch(5, 7), non_finite="skip")
    assert skipping.state == TrainState(12, 240, incidents=2)
    assert [line["step"] for line in skipping.incidents()] == [6, 8]
    assert skipping.incidents()[0]["batch"] == "batch 5, sequences 2-3" and skipping.incidents()[0]["loss"] is None
    assert [line["step"] for line in skipping.restarts] == [line["step"] for line in whole.restarts] == [6, 9]
    rates = {line["step"]: line["lr"] for line in whole.metrics if line["kind"] == "train"}
    for line in skipping.metrics:
        assert line["kind"] != "train" or line["lr"] == rates[line["step"]]


def test_a_skipped_step_equals_one_that_was_never_taken(tmp_path: Path) -> None:
    """Compared with a plain loop that does not call the optimizer at that step."""
    schedule = Schedule(total_steps=12, warm_start_steps=12)
    skipping = play(tmp_path, is_batch(5), non_finite="skip", schedule=schedule)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    for step in range(12):
        if step == 5:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * schedule.lr_factor(step)
        for half in (slice(0, 2), slice(2, 4)):
            ids, labels = (part[half] for part in batch(step))
            summed, _ = good_loss(model, ids, labels)
            (summed / 24).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, skipping.tensors[name]), name


@pytest.mark.parametrize("bad", [(0,), (3,), (6,), (9,), (11,), (3, 4), (5, 6), (6, 8)])
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_killed_around_an_incident_and_continued_gives_the_same_bytes(
    tmp_path: Path, policy: str, bad: tuple[int, ...]
) -> None:
    """Incidents in the warm start, at the switch, at a restart, at the end, in a row."""
    whole = play(tmp_path / "whole", is_batch(*bad), non_finite=policy)
    for kill_at in range(1, len(whole.batches)):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            play(folder, is_batch(*bad), non_finite=policy, kill_at=kill_at)
        assert same(play(folder, is_batch(*bad), non_finite=policy), whole), kill_at


def test_the_limit_ends_the_run_and_counts_over_kills(tmp_path: Path) -> None:
    bad = is_batch(1, 5, 7)
    with pytest.raises(RunStopped, match=r"step 7: .*non_finite.limit \(2\) is used up"):
        play(tmp_path, bad, non_finite="skip", non_finite_limit=2)
    with pytest.raises(RunStopped, match=r"step 7: .*used up"):  # from step 4, where one of the two had been counted
        play(tmp_path, bad, non_finite="skip", non_finite_limit=2)
    assert play(tmp_path, bad, non_finite="skip", non_finite_limit=3).state.incidents == 3


def test_skip_stops_where_there_is_no_step_to_skip(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("unused", torch.tensor(math.nan))
    with pytest.raises(RunStopped, match="nothing to skip"):
        play(tmp_path, never, model=model, non_finite="skip")


# Without synchronisation: the host runs ahead, as on a GPU

TIMETABLES = {
    "full": {"schedule": Schedule(total_steps=12, warm_start_steps=12), "checkpoint_every_steps": 12},
    "lora": {"schedule": Schedule(total_steps=12), "evaluate_every_steps": 9},
    "relora": {},
}


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("bad", [(), (1,), (7,), (4, 5), (3, 8, 10)])
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_steps_without_synchronisation_give_the_same_bytes(
    tmp_path: Path, policy: str, bad: tuple[int, ...], timetable: str
) -> None:
    settings = {"non_finite": policy, "log_every_steps": 5, **TIMETABLES[timetable]}
    in_step = play(tmp_path / "in_step", is_batch(*bad), **settings)
    ahead = play(tmp_path / "ahead", is_batch(*bad), sync_every_steps=7, **settings)
    assert same(in_step, ahead) and ahead.state.incidents == len(bad)
    if timetable == "full" and bad == (7,):
        assert ahead.batches[7:10] == [7, 8, 7]  # it had gone on to batch 8 and went back


def test_resolving_pending_steps_leaves_no_trace_of_skipped_updates() -> None:
    """Three pending steps of 24 tokens, of which the second was not finite."""
    optimizer = torch.optim.AdamW(Net().parameters(), fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    schedule = Schedule(total_steps=12)
    progress = Progress(optimizer, schedule, TrainState(8, 192), unlogged_tokens=96)
    progress.pending = [(TrainState(5 + n, 120 + 24 * n), torch.tensor(float(n > 0))) for n in range(3)]
    resolve_pending(progress)
    assert progress == Progress(optimizer, schedule, TrainState(6, 144), unlogged_tokens=48)
    assert not hasattr(optimizer, "found_inf")


def test_a_step_without_synchronisation_is_reported_like_one_with_it(tmp_path: Path) -> None:
    messages = []
    for sync_every_steps in (1, 7):
        with pytest.raises(RunStopped) as caught:
            changes = {"sync_every_steps": sync_every_steps, "log_every_steps": 100, **TIMETABLES["full"]}
            play(tmp_path / str(sync_every_steps), is_batch(4), **changes)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "step 4: loss nan" in messages[0]


@pytest.mark.parametrize(
    ("number", "at", "bad", "saved"),
    [(signal.SIGTERM, 7, 8, 9), (signal.SIGTERM, 8, 7, 8), (signal.SIGUSR1, 7, 8, 9)],
)
def test_a_signal_waits_for_a_step_with_synchronisation(
    tmp_path: Path, number: signal.Signals, at: int, bad: int, saved: int
) -> None:
    """Steps 7 and 8 are taken without synchronisation. The checkpoint is of after the bad one, with its incident."""
    settings = {"non_finite": "skip", "sync_every_steps": 7, "log_every_steps": 5, **TIMETABLES["full"]}
    whole = play(tmp_path / "whole", is_batch(bad), **settings)
    with contextlib.suppress(Interrupted):
        play(tmp_path / "cut", is_batch(bad), signals={at: number}, **settings)
    checkpoints = Checkpoints(tmp_path / "cut" / "checkpoints")
    assert checkpoints.steps()[0] == saved
    assert checkpoints.open(saved).state.progress == TrainState(saved, 24 * (saved - 1), incidents=1)
    assert same(play(tmp_path / "cut", is_batch(bad), **settings), whole)


def test_killed_between_two_synchronisations(tmp_path: Path) -> None:
    settings = {"non_finite": "rewind", "sync_every_steps": 7, "log_every_steps": 5, **TIMETABLES["lora"]}
    whole = play(tmp_path / "whole", is_batch(5), **settings)
    for kill_at in range(1, len(whole.batches)):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            play(folder, is_batch(5), kill_at=kill_at, **settings)
        assert same(play(folder, is_batch(5), **settings), whole), kill_at


# Rewind


def test_rewind_uses_no_batch_again(tmp_path: Path) -> None:
    rewound = play(tmp_path, is_batch(6), non_finite="rewind")
    assert rewound.batches == [0, 1, 2, 3, 4, 5, 6, *range(7, 15)]  # step 4 again, with batch 7
    assert rewound.state == TrainState(12, 288, incidents=1, skipped_batches=3)
    [event] = rewound.incidents()
    assert (event["kind"], event["step"], event["failed_step"]) == ("rewind", 4, 6)
    assert event["batch"] == "batch 6, sequences 2-3"
    assert [line["step"] for line in rewound.metrics if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in rewound.restarts] == [6, 9]


def test_every_return_to_one_checkpoint_is_on_record(tmp_path: Path) -> None:
    rewound = play(tmp_path, is_batch(6, 8), non_finite="rewind")
    assert [(line["step"], line["failed_step"]) for line in rewound.incidents()] == [(4, 6), (4, 5)]
    assert rewound.state.incidents == 2 and rewound.state.skipped_batches == 5


@pytest.mark.parametrize("stopped_at", [5, 6, 7, 9, 10])
def test_stopped_by_a_signal_around_two_returns_gives_the_same_bytes(tmp_path: Path, stopped_at: int) -> None:
    bad = is_batch(6, 9)
    whole = play(tmp_path / "whole", bad, non_finite="rewind")
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        play(folder, bad, non_finite="rewind", signals={stopped_at: signal.SIGTERM})
    assert same(play(folder, bad, non_finite="rewind"), whole)


def test_a_checkpoint_on_demand_in_a_discarded_part_is_deleted(tmp_path: Path) -> None:
    """Requested at step 6, before the rewind from step 7 to step 4, where the run is then stopped."""
    whole = play(tmp_path / "whole", is_batch(7), non_finite="rewind")
    with pytest.raises(Interrupted, match="stopped after step 5"):
        calls = {5: signal.SIGUSR1, 8: signal.SIGTERM}
        play(tmp_path / "cut", is_batch(7), non_finite="rewind", signals=calls)
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps() == [0, 4, 5]
    assert same(play(tmp_path / "cut", is_batch(7), non_finite="rewind"), whole)


def test_rewind_chosen_after_a_stop_takes_what_checkpoint_there_is(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        play(tmp_path, never, signals={1: signal.SIGTERM})
    assert play(tmp_path, is_batch(3), non_finite="rewind").incidents()[0]["step"] == 2


def test_rewind_before_the_first_regular_checkpoint_begins_again(tmp_path: Path) -> None:
    rewound = play(tmp_path, is_batch(2), non_finite="rewind")
    assert rewound.batches == [0, 1, 2, *range(3, 15)] and rewound.state.skipped_batches == 3


def test_rewind_from_a_bad_weight(tmp_path: Path) -> None:
    """Found by the save of step 8, which undoes all steps since step 4."""
    model, poisoned = Net(), []

    def place_poison(number: int) -> Sequences:
        if number == 7 and not poisoned:
            poisoned.append(number)
            layer = next(iter(low_rank_layers(model).values()))
            layer.weight.data[0, 0] = math.inf
        return batch(number)

    def blind(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Finite loss even if the model's output is not."""
        summed, count = good_loss(model, input_ids, labels)
        return torch.nan_to_num(summed), count

    with pytest.raises((RunStopped, NonFinite)):
        play(tmp_path / "stop", never, model=model, batch_at=place_poison, loss=blind)
    model, poisoned = Net(), []
    rewound = play(tmp_path / "back", never, model=model, batch_at=place_poison, loss=blind, non_finite="rewind")
    assert rewound.state.incidents == 1 and rewound.incidents()[0]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in rewound.tensors.values())


def poisoned_before_the_restart(model: nn.Module) -> Callable[..., Evaluation]:
    """Evaluation that makes a factor infinite once, just before the restart of step 6."""
    done: list[bool] = []

    def evaluate(_: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        each_batch()
        layers = low_rank_layers(model)
        if layers and not done:
            done.append(True)
            layers["blocks.1"].lora_B.data[0, 0] = math.inf
        return Evaluation.of(1.0, 1, None)

    return evaluate


@pytest.mark.parametrize(("policy", "message"), [("stop", "lower the learning rate"), ("skip", "nothing to skip")])
def test_an_update_that_is_not_finite_is_not_merged(tmp_path: Path, policy: str, message: str) -> None:
    model = Net()
    with pytest.raises(RunStopped, match=rf"blocks\.1\.lora_B is not finite before the restart.*{message}"):
        play(tmp_path, never, model=model, evaluate=poisoned_before_the_restart(model), non_finite=policy)
    assert all(layer.weight.isfinite().all() for layer in low_rank_layers(model).values())


def test_rewind_from_an_update_that_is_not_finite(tmp_path: Path) -> None:
    model = Net()
    evaluate = poisoned_before_the_restart(model)
    rewound = play(tmp_path, never, model=model, evaluate=evaluate, non_finite="rewind")
    assert [(line["step"], line["failed_step"]) for line in rewound.incidents()] == [(4, 6)]
    assert [line["step"] for line in rewound.restarts] == [6, 9]
    assert all(tensor.isfinite().all() for tensor in rewound.tensors.values())


def test_rewind_is_refused_without_a_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    """As after a change of the policy between two parts of a run: the start was not saved."""
    with pytest.raises(RunStopped, match="no sound checkpoint to go back to"):
        play(tmp_path, is_batch(2), non_finite="rewind", checkpoints=_Nothing(tmp_path / "checkpoints"))


class _Nothing(Checkpoints):
    """A folder that saves nothing."""

    def save(self, *_: object, **__: object) -> None:
        return


def test_exact_tensors_of_a_rewound_model_are_those_of_a_new_one(tmp_path: Path) -> None:
    """Stored in bf16 with masters; factors are injected into the same model twice."""
    lowrank = LowRankConfig(r=2, lora_alpha=2, base="bf16", trainable_scaling=True)
    whole = play(tmp_path / "one", is_batch(10), non_finite="rewind", lowrank=lowrank)
    with pytest.raises(Killed):
        play(tmp_path / "two", is_batch(10), non_finite="rewind", lowrank=lowrank, kill_at=9)
    assert same(play(tmp_path / "two", is_batch(10), non_finite="rewind", lowrank=lowrank), whole)
    assert {"blocks.0.scaling", "blocks.0.lora_A"} <= whole.tensors.keys()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_run_in_8_bits_goes_on_as_any(tmp_path: Path, policy: str) -> None:
    """Through the switch, restarts, an incident and a kill."""
    optimizer = dataclasses.replace(SETTINGS["optimizer"], name="adamw-8bit")
    whole = play(tmp_path / "whole", is_batch(7), non_finite=policy, optimizer=optimizer)
    assert {"embed.weight:state1", "embed.weight:step"} <= whole.moments.keys()
    for kill_at in (2, 6, 9, 11):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            play(folder, is_batch(7), non_finite=policy, optimizer=optimizer, kill_at=kill_at)
        assert same(play(folder, is_batch(7), non_finite=policy, optimizer=optimizer), whole), kill_at
