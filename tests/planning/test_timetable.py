"""The timetable is that of the run, and what the run would refuse is refused; no weights, no files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BartConfig, MixtralConfig

from relora.cli.tables.timetable import print_timetable
from relora.config import RunConfig, parse_config
from relora.errors import UserError
from relora.lowrank import inject
from relora.planning.timetable import timetable_of
from relora.recipes.from_settings import lowrank_of, schedule_of
from relora.recipes.pretraining_inputs import gather_pretraining

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(prepared: Path, tmp_path: Path) -> Configure:
    """Return a function that builds a configuration: 14 steps, warm start of 4, restarts before steps 8 and 12."""

    def build(**overrides: object) -> RunConfig:
        tree: dict[str, object] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"preset": "llama-9m", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64},
            "data": {
                "train": str(prepared / "train"),
                "validation": str(prepared / "validation"),
                "sequence_length": 32,
            },
            "lowrank": {"r": 4},
            "warm_start": {"steps": 4},
            "restart": {"every_steps": 4, "warmup_steps": 1},
            "schedule": {"total_steps": 14, "warmup_steps": 2},
            "batch": {"sequences": 4, "micro_sequences": 2},
        }
        for section, value in overrides.items():
            known = tree.get(section)
            tree[section] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        return parse_config(tree)

    return build


def test_the_timetable_is_that_of_the_run(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    timetable = timetable_of(config)
    model, schedule = gather_pretraining(config).model, schedule_of(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = inject(model, lowrank_of(config))
    warm_start, low_rank = timetable.phases
    assert (warm_start.name, warm_start.first_step, warm_start.steps) == ("warm_start", 0, 4)
    assert (warm_start.trainable_parameters, warm_start.frozen_parameters) == (parameters, 0)
    assert (low_rank.name, low_rank.first_step, low_rank.steps) == ("low_rank", 4, 10)
    assert (low_rank.trainable_parameters, low_rank.frozen_parameters) == (report.trainable, report.frozen)
    assert timetable.restarts == list(schedule.restarts) == [8, 12]
    assert timetable.batch_tokens == 4 * 32 and timetable.total_tokens == 14 * 4 * 32 == sum(
        p.tokens for p in timetable.phases
    )
    assert timetable.epochs == pytest.approx(14 * 4 / gather_pretraining(config).batches.epoch_sequences)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "phases", "restarts"),
    [
        ({"method": "full"}, ["full"], []),
        ({"method": "lora"}, ["warm_start", "low_rank"], []),
        ({"method": "lora", "warm_start": {"steps": 0}}, ["low_rank"], []),
        ({"warm_start": {"steps": 0}}, ["low_rank"], [4, 8, 12]),
        ({"restart": {"warmup_steps": 3}}, ["warm_start", "low_rank"], [8]),
        ({"schedule": {"total_steps": None, "total_tokens": 14 * 128 - 5}}, ["warm_start", "low_rank"], [8, 12]),
    ],
)
def test_phases_and_restarts_of_each_method(
    configure: Configure, overrides: dict[str, object], phases: list[str], restarts: list[int]
) -> None:
    timetable = timetable_of(configure(**overrides))
    assert [phase.name for phase in timetable.phases] == phases and timetable.restarts == restarts
    assert timetable.total_steps == 14 and sum(phase.steps for phase in timetable.phases) == 14


def test_the_largest_preset_needs_no_memory(configure: Configure) -> None:
    """7 billion weights would be 27 GB; the meta device holds shapes only."""
    shape = {"vocab_size": 32100, "hidden_size": None, "intermediate_size": None}
    timetable = timetable_of(configure(model={"preset": "llama-7b", **shape}, lowrank={"r": 128}))
    assert timetable.phases[0].trainable_parameters > 6_700_000_000
    assert timetable.phases[1].trainable_parameters < timetable.phases[0].trainable_parameters / 10


def test_what_gets_no_factors_and_never_trains_is_said(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of the warm start are those that train: attention to an encoder that is not there does not."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
    mixtral, bart = MixtralConfig(**sizes, **experts), BartConfig(vocab_size=512, d_model=32, is_decoder=True)
    for config in (mixtral, bart):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
    model = {"preset": None, "vocab_size": None, "hidden_size": None, "intermediate_size": None}
    print_timetable(timetable_of(configure(model={**model, "path": str(tmp_path / "mixtral")})))
    printed = capsys.readouterr().out
    assert "experts of 2 layers (" in printed and "get no factors: they train at full rank" in printed
    timetable = timetable_of(configure(model={**model, "path": str(tmp_path / "bart")}))
    assert timetable.phases[0].frozen_parameters > 0 and any("encoder_attn" in note for note in timetable.notes)


def test_a_person_reads_a_table(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    print_timetable(timetable_of(configure()))
    printed = capsys.readouterr().out
    assert "relora: 14 steps of 128 tokens" in printed and "warm start" in printed
    assert "restarts: 2 (before steps 8, 12)" in printed and "tokens: 1,792 (" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lowrank": {"r": 33}}, r"lowrank\.r \(33\)"),
        ({"lowrank": {"target_modules": ["nothing"]}}, "'nothing' matches no linear layer"),
        ({"model": {"preset": "llama-8m"}}, "llama-9m"),
        ({"model": {"num_attention_heads": 5}}, r"model\.hidden_size \(32\)"),
        ({"model": {"vocab_size": 100}}, r"model\.vocab_size"),
        ({"model": {"max_position_embeddings": 16}}, r"data\.sequence_length \(32\)"),
        ({"data": {"train": "no/such/place"}}, "no/such/place"),
        ({"data": {"validation": "no/such/place"}}, "no/such/place"),
        ({"batch": {"sequences": 40_000}}, "tokens"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:77"}, "cuda"),
    ],
)
def test_refuses_what_the_run_would_refuse(configure: Configure, overrides: dict[str, object], message: str) -> None:
    config = configure(**overrides)
    with pytest.raises(UserError, match=message):
        gather_pretraining(config)
    with pytest.raises(UserError, match=message):
        timetable_of(config)


def test_what_the_run_decides_is_said_to_be_the_most(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    auto = {"auto": True, "steps": 6, "window_steps": 1}
    timetable = timetable_of(configure(warm_start=auto))
    assert (timetable.phases[0].steps, timetable.restarts, timetable.most_restarts) == (
        6,
        [10],
        2,
    )  # from step 4 on: 8, 12
    print_timetable(timetable)
    assert "restarts: 1 to 2, counted from the end of the warm start" in capsys.readouterr().out
    print_timetable(timetable_of(configure(warm_start=auto, restart={"adaptive": True})))
    printed = capsys.readouterr().out
    assert "restarts: at most 2, when the run decides" in printed and "warm start (at" in printed
