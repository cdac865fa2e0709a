"""A step on several processes, on paper."""

from dataclasses import replace
from typing import Any

import pytest

from relora.config import RunConfig, parse_config
from relora.errors import UserError
from relora.planning.scale import Link, Scaled, link_of, scale, scale_figures
from relora.planning.sizes import counts, positive_numbers, rate_in_bytes

LINK = Link(bandwidth=1e9, within=1e10, per_machine=2, overlap=0.0)
TREE: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"preset": "llama-9m", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    "data": {"train": "x", "validation": "y", "sequence_length": 32},
    "lowrank": {"r": 4},
    "warm_start": {"steps": 10},
    "schedule": {"total_steps": 100, "warmup_steps": 5},
    "batch": {"sequences": 8, "micro_sequences": 2},
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str, str], Scaled]:
    return {(one.world, one.phase, one.strategy): one for one in scale(config(), [1, 2, 4], LINK)}


def config(**changes: Any) -> RunConfig:
    return parse_config(TREE | changes)


def test_one_process_sends_nothing_and_each_strategy_has_its_row(found: dict[tuple[int, str, str], Scaled]) -> None:
    assert {(world, strategy) for world, _, strategy in found} == {
        *((1, "replicate"), (2, "replicate"), (2, "shard")),
        *((4, "replicate"), (4, "shard"), (4, "hybrid")),
    }
    for phase in ("warm_start", "low_rank"):
        alone = found[1, phase, "replicate"]
        assert (alone.sent_bytes, alone.exposed, alone.sequences) == (0, 0, 8)
        assert alone.efficiency == pytest.approx(1)


def test_a_ring_sends_the_gradients_of_what_trains(found: dict[tuple[int, str, str], Scaled]) -> None:
    trained = {"warm_start": 0, "low_rank": 0}
    for phase in trained:
        two, four = found[2, phase, "replicate"], found[4, phase, "replicate"]
        assert four.sent_bytes == pytest.approx(two.sent_bytes * 1.5, abs=1)
        trained[phase] = two.sent_bytes // 4  # 2 (W - 1)/W is 1
        assert two.sending == two.exposed == pytest.approx(two.sent_bytes / LINK.bandwidth)
    embeddings, norms = 2 * 512 * 64, (2 * 2 + 1) * 64
    assert trained["low_rank"] < trained["warm_start"]
    factors = trained["low_rank"] - embeddings - norms
    intermediate = (trained["warm_start"] - embeddings - norms - 2 * 4 * 64 * 64) // (2 * 3 * 64)
    assert factors == 2 * 4 * (4 * (64 + 64) + 3 * (64 + intermediate))


def test_shards_gather_weights_and_hold_a_part(found: dict[tuple[int, str, str], Scaled]) -> None:
    for phase in ("warm_start", "low_rank"):
        assert found[4, phase, "shard"].sent_bytes > found[4, phase, "replicate"].sent_bytes
        assert found[4, phase, "hybrid"].sending < found[4, phase, "shard"].sending  # gathers stay in the machine


def test_overlap_hides_what_fits_into_the_backward_pass() -> None:
    slow = replace(LINK, bandwidth=1e6)
    [plain], [hidden] = (
        [one for one in scale(config(), [2], link) if (one.phase, one.strategy) == ("warm_start", "replicate")]
        for link in (slow, replace(slow, overlap=1.0))
    )
    backward_of_the_last = plain.computing / 2 * 2 / 3  # two micro-batches of two sequences on each rank
    assert plain.exposed - hidden.exposed == pytest.approx(backward_of_the_last, rel=0.05)


def test_measured_seconds_replace_the_predicted() -> None:
    alone = scale(config(), [1], LINK, step_seconds=[3.0, 2.0])
    assert [one.step_seconds for one in alone] == pytest.approx([3.0, 2.0])
    assert scale_figures(alone)[0]["step_seconds"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("worlds", "link", "seconds", "message"),
    [
        ([9], LINK, None, r"--world 9: a step has only 8 sequences; raise `batch.sequences`"),
        ([3], LINK, None, "--world 3: is no whole number of machines with 2 processes each"),
        ([2], LINK, [1.0], r"--step-seconds: give 2, one for each phase \(warm_start, low_rank\)"),
    ],
)
def test_what_cannot_be_is_one_line(worlds: list[int], link: Link, seconds: list[float] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scale(config(), worlds, link, step_seconds=seconds)


def test_rates_and_counts_are_read() -> None:
    assert rate_in_bytes("25GB/s", "--bandwidth") == 25e9
    assert rate_in_bytes("1Gbit/s", "--bandwidth") == 125e6
    assert rate_in_bytes("1GiB/s", "--bandwidth") == 2**30
    assert link_of("1GB/s", None, 8, 0.5).within == 1e9
    assert counts("8,64", "--world") == [8, 64] and positive_numbers("1.5", "--step-seconds") == [1.5]
    for wrong in ("25", "fast/s", "25GB/h", "-1GB/s", "0Gbit/s"):
        with pytest.raises(UserError, match="--bandwidth"):
            rate_in_bytes(wrong, "--bandwidth")
    for wrong in ("", "0", "1.5", "a", "8,,9", "inf"):
        with pytest.raises(UserError, match="--world"):
            counts(wrong, "--world")
