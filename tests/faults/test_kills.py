"""Kill anywhere, the fast part: the points that say most, a few drawn ones, and the gentle ends.

All of them, and as many drawn ones as one likes: `python benchmarks/faults.py kills --trials 200`.
"""

import json
import signal
from collections.abc import Iterator

import pytest
from tests.faults import kills
from tests.faults.harness import Blow, difference
from tests.faults.kills import LOOP, Workbench, named_kill, random_kill, struck, workbench

MOST_TELLING = [
    "config.yaml open and empty",
    "in a restart, inside the merge",
    "in a restart, between new factors and their moments",
    "in a restart, between two layers",
    "a restart's line half written",
    "in a later evaluation",
    "between a checkpoint's tensor files",
    "between sync and rename of a checkpoint",
    "in the middle of a pruning",
    "in the export, weights half written",
    "after the line of the result",
    "as it sweeps a half-written checkpoint away",
]


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    with workbench() as bench:
        yield bench


@pytest.mark.parametrize("name", MOST_TELLING)
def test_killed_there_and_continued_a_run_gives_the_same_bytes(bench: Workbench, name: str) -> None:
    assert named_kill(bench, name).problem == ""


@pytest.mark.parametrize("name", kills.NAMED_IN_PREPARE)
def test_killed_there_and_continued_a_preparation_gives_the_same_bytes(bench: Workbench, name: str) -> None:
    assert named_kill(bench, name).problem == ""


@pytest.mark.parametrize("event", ["rmtree train", "remove train/shard", "remove train/tokenizer", "remove journal"])
def test_killed_as_it_clears_up_after_a_mistake_a_preparation_starts_over(bench: Workbench, event: str) -> None:
    """What is left is its own, so the mended source is taken, and nothing of the first start is in the result."""
    source, out = bench.new_folder().with_suffix(".jsonl"), bench.new_folder()
    tokenizer = bench.folder / "prepared" / "train" / "tokenizer"
    # a share that the first documents settle, so that the mistake is met when shards have been written
    arguments = ["prepare", source, "--out", out, "--tokenizer", tokenizer, "--validation", "0.3"]
    records = [json.dumps({"text": f"the cat sat on mat {number} " * 40}) for number in range(40)]
    source.write_text("\n".join([*records, "[no record"]), encoding="utf-8")
    # the first removal of `train` is that of a new start, which finds none
    blow = Blow(event=event, nth=2 if event.startswith("rmtree") else 1)
    assert bench.server.relora(*arguments, watch=out, blows=[blow], dials=kills.SMALL_STEPS).killed
    source.write_text("\n".join(records), encoding="utf-8")
    ended = bench.server.relora(*arguments, watch=out)
    assert ended.status == 0, ended.printed
    assert json.loads((out / "train" / "index.json").read_text())["shards"] and not (out / "journal.jsonl").exists()


@pytest.mark.parametrize("number", range(2))
def test_killed_at_random_again_and_again(bench: Workbench, number: int) -> None:
    assert random_kill(bench, seed=1, number=number).problem == ""


@pytest.mark.parametrize("step", [kills.WARM_START, 27])
def test_stopped_in_that_step_a_run_continues_to_the_same_bytes(bench: Workbench, step: int) -> None:
    blow = Blow(call=f"{LOOP}:train_step", nth=step, signal=signal.SIGTERM)
    trial = struck(bench, "plain", [[blow]], ends=(143,))
    assert trial.problem == "" and trial.saved(step)


def test_a_second_signal_stops_at_once_and_harms_nothing(bench: Workbench) -> None:
    """In the same step: there is no time for a checkpoint."""
    inside = [
        Blow(call=f"{LOOP}:train_step", nth=13, signal=signal.SIGINT),
        Blow(call="torch.nn.utils:get_total_norm", nth=13, signal=signal.SIGINT),
    ]
    trial = struck(bench, "plain", [inside], ends=(130,))
    assert trial.problem == "" and not trial.saved(13) and trial.saved(10)


def test_a_checkpoint_on_demand_and_the_run_goes_on(bench: Workbench) -> None:
    blow = Blow(call=f"{LOOP}:train_step", nth=13, signal=signal.SIGUSR1)
    trial = struck(bench, "plain", [[blow]], ends=(0,))
    assert trial.problem == "" and trial.saved(13)


def test_the_harness_sees_what_it_should(bench: Workbench) -> None:
    """A comparison that cannot fail would prove nothing."""
    whole = bench.whole("plain").outcome
    assert any(name.endswith("/optimizer.safetensors") for name in whole) and "model/model.safetensors" in whole
    for name, content in whole.items():
        if isinstance(content, bytes):
            flipped = bytes([content[0] ^ 1]) + content[1:]
            assert difference(whole, {**whole, name: flipped}) == f"{name}: other content"
        elif isinstance(content, list):
            assert f"{name}, line {len(content)}" in difference(whole, {**whole, name: content[:-1]})
        assert name in difference(whole, {key: value for key, value in whole.items() if key != name})
    assert difference(whole, whole) == ""
