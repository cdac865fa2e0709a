"""What may change when a run goes on, what is said of it, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from relora.config import RunConfig, parse_config, parse_finetune_config, to_yaml
from relora.errors import UserError
from relora.recipes.from_settings import schedule_of
from relora.recipes.resume import changes_since, newest
from relora.runs.changes import ALLOWED, FREE, HELD_OUT, SAMPLE, check_settings, covered_by, flat_settings
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import SavedState

Configure = Callable[..., RunConfig]


def changes(folder: Path, config: RunConfig) -> list[str]:
    return changes_since(folder, config, schedule_of)


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """A configuration of 9000 steps; overrides by dotted key."""

    def build(**overrides: object) -> RunConfig:
        tree: dict[str, dict[str, object]] = {
            "model": {"preset": "llama-9m"},
            "data": {"train": "t", "validation": "v"},
            "schedule": {"total_steps": 9000},
            "precision": {"dtype": "fp32"},
        }
        for key, value in overrides.items():
            section, _, last = key.partition("__")
            if last:
                tree.setdefault(section, {})[last] = value
            else:
                tree[section] = value  # type: ignore[assignment]
        return parse_config({"output_dir": str(tmp_path / "run"), **tree})

    return build


@pytest.fixture
def folder(configure: Configure, tmp_path: Path) -> Path:
    """Of a run that has done 4000 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(configure()))
    save(folder, 4000)
    return folder


def save(folder: Path, step: int) -> Path:
    checkpoints = Checkpoints(folder / "checkpoints", background=False)
    checkpoints.save(SavedState(step=step, tokens=0, positions={}), {}, {}, {}, {})
    return folder / "checkpoints" / f"step-{step:08d}"


def test_a_new_folder_has_nothing_to_compare(configure: Configure, tmp_path: Path) -> None:
    assert changes(tmp_path, configure()) == []


def test_the_same_run_needs_no_word(configure: Configure, folder: Path) -> None:
    free = configure(log__every_steps=77, checkpoint__keep_last=5, samples__max_new_tokens=3, output_dir="elsewhere")
    assert changes(folder, configure()) == changes(folder, free) == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"method": "lora"}, r"method \(relora there, lora here\)"),
        ({"model__preset": "llama-20m"}, r"model\.preset"),
        ({"lowrank__r": 64}, r"lowrank\.r \(128 there, 64 here\)"),
        ({"warm_start__steps": 900}, r"warm_start\.steps"),
        ({"restart__every_steps": 900}, r"restart\.every_steps"),
        ({"restart__growth": 2.0}, r"restart\.growth"),
        ({"optimizer__factors": "adamw"}, r"optimizer\.factors \(muon there, adamw here\)"),
        ({"optimizer__matrices": "muon"}, r"optimizer\.matrices \(adamw there, muon here\)"),
        ({"schedule__warmup_steps": 7}, r"schedule\.warmup_steps"),
        ({"schedule__min_lr_ratio": 0.2}, r"schedule\.min_lr_ratio"),
        ({"batch__sequences": 128}, r"batch\.sequences"),
        ({"data__sequence_length": 128}, r"data\.sequence_length"),
        ({"data__train": [{"path": "t", "weight": 2}]}, r"data\.train\.weight"),
        ({"data__train": [{"path": "t"}, {"path": "u"}]}, r"data\.train\.weight"),
        ({"precision__dtype": "bf16"}, r"precision\.dtype"),
    ],
)
def test_another_run_is_refused_by_name(
    configure: Configure, folder: Path, overrides: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=f"holds another run; it differs in {named}"):
        changes(folder, configure(**overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"optimizer__lr": 5e-4}, "optimizer.lr: 0.001 -> 0.0005 (the moments stay)"),
        ({"optimizer__clip_grad_norm": 0.5}, "optimizer.clip_grad_norm: 1.0 -> 0.5 (the moments stay)"),
        ({"evaluate__tokens": 5}, "evaluate.tokens: 200000 -> 5 (held-out figures before and after do not compare)"),
        ({"evaluate__every_steps": 5}, "evaluate.every_steps: 500 -> 5"),
        ({"batch__micro_sequences": 4}, f"batch.micro_sequences: 8 -> 4 ({ALLOWED['batch.micro_sequences']})"),
        ({"non_finite__policy": "skip"}, "non_finite.policy: stop -> skip"),
        ({"device": "cpu"}, f"device: auto -> cpu ({ALLOWED['device']})"),
        ({"compile": True}, f"compile: False -> True ({ALLOWED['compile']})"),
        (
            {"memory__activation_checkpointing": "full"},
            "memory.activation_checkpointing: none -> full (the same bits, but for compiled blocks)",
        ),
        ({"data__train": "moved"}, "data.train.path: ['t'] -> ['moved'] (the same tokens)"),
        ({"data__validation": "w"}, "data.validation: v -> w (the same tokens)"),
    ],
)
def test_an_allowed_change_is_said_in_one_line(
    configure: Configure, folder: Path, overrides: dict[str, object], line: str
) -> None:
    assert changes(folder, configure(**overrides)) == [line]


def test_a_longer_run_says_what_becomes_of_the_schedule(configure: Configure, folder: Path) -> None:
    (folder / "config.yaml").write_text(to_yaml(configure(restart__every_steps=1000)))
    lines = changes(folder, configure(restart__every_steps=1000, schedule__total_steps=18000))
    assert lines[0] == "schedule.total_steps: 9000 -> 18000"
    assert lines[1].startswith(
        "the cosine now ends at step 18000 instead of 9000: at step 4000 the learning rate goes from "
    )
    assert "16 restarts in all instead of 7" in lines[1]


def test_restarts_that_the_run_decides_on_are_not_counted(configure: Configure, folder: Path) -> None:
    (folder / "config.yaml").write_text(to_yaml(configure(restart__adaptive=True)))
    longer = changes(folder, configure(restart__adaptive=True, schedule__total_steps=18000))[1]
    assert "; restarts as the run decides. A run of 18000 steps" in longer


def test_a_restart_that_the_old_length_left_out_is_not_counted(configure: Configure, folder: Path) -> None:
    """Before step 4000 the old run, of 4000 steps, did the restarts before 2000 and 3000."""
    (folder / "config.yaml").write_text(to_yaml(configure(restart__every_steps=1000, schedule__total_steps=4000)))
    longer = configure(restart__every_steps=1000, schedule__total_steps=5000)
    assert "3 restarts in all instead of 2" in changes(folder, longer)[1]


def test_a_run_cannot_become_shorter_than_it_is(configure: Configure, folder: Path) -> None:
    assert len(changes(folder, configure(schedule__total_steps=4000))) == 2
    with pytest.raises(UserError, match="has done 4000 steps, more than the 3999 asked for"):
        changes(folder, configure(schedule__total_steps=3999))


def test_every_class_names_keys_that_exist(configure: Configure) -> None:
    finetuning = {"output_dir": "o", "task": "instruct", "model": {"path": "m"}, "data": {"train": "t"}}
    keys = flat_settings(configure()) | flat_settings(parse_finetune_config(finetuning))
    for name in (*FREE, *ALLOWED):
        assert any(covered_by(key, (name,)) for key in keys), name


def test_a_configuration_cut_short_is_refused_by_name(configure: Configure, folder: Path) -> None:
    (folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml"):
        changes(folder, configure())


# From which checkpoint


def test_an_older_checkpoint_is_used_and_said(folder: Path) -> None:
    (save(folder, 5000) / "weights.safetensors").write_bytes(b"")
    checkpoint, lines = newest(Checkpoints(folder / "checkpoints"), strict=False)
    assert checkpoint is not None and checkpoint.step == 4000
    assert len(lines) == 1 and "step-00005000/weights.safetensors" in lines[0]
    with pytest.raises(UserError, match=r"step-00005000.*without --strict the run goes on from step 4000"):
        newest(Checkpoints(folder / "checkpoints"), strict=True)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(folder: Path) -> None:
    (folder / "checkpoints" / "step-00004000" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json.*no checkpoint .* is sound"):
        newest(Checkpoints(folder / "checkpoints"), strict=False)


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    assert newest(Checkpoints(tmp_path / "checkpoints"), strict=True) == (None, [])


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"the run has a model, but none of .*checkpoints is sound"):
        newest(Checkpoints(tmp_path / "checkpoints"), strict=False)


# What changed around it

NOW: dict[str, str | int] = {"torch": "2", "threads": 4, "data": "abc"}


def test_the_same_surroundings_need_no_word() -> None:
    assert check_settings(NOW, NOW, strict=True) == []


@pytest.mark.parametrize("then", [{"threads": 1}, {"torch": "1"}])
def test_other_surroundings_are_said_and_strict_refuses(then: dict[str, str | int]) -> None:
    [line] = check_settings(NOW | then, NOW, strict=False)
    key = next(iter(then))
    assert line == f"not bit for bit what an uninterrupted run gives: {key} was {then[key]}, is {NOW[key]}"
    with pytest.raises(UserError, match=f"{key} was.*without --strict"):
        check_settings(NOW | then, NOW, strict=True)


def test_a_run_begun_before_held_out_samples_is_told_that_its_figures_do_not_compare() -> None:
    sampled = NOW | {HELD_OUT: SAMPLE}
    [line] = check_settings(NOW, sampled, strict=True)  # what is trained stays the same
    assert line == (
        "held-out figures before and after do not compare: from here on they are of another sample of the whole"
    )
    assert check_settings(NOW | {HELD_OUT: "keyed sample"}, sampled, strict=True) == [line]  # drawn otherwise
    assert check_settings(sampled, sampled, strict=True) == []
    assert check_settings(NOW, NOW | {HELD_OUT: "whole"}, strict=True) == []
    assert check_settings(NOW | {HELD_OUT: "whole"}, sampled, strict=True) == []  # said of `evaluate.tokens`


def test_fine_tuning_begun_before_held_out_samples_goes_on() -> None:
    """Its fingerprint covered the first held-out examples only, so it cannot be compared; data is looked at after."""
    now = NOW | {HELD_OUT: SAMPLE, "base": "b"}
    lines = check_settings(NOW | {"data": "of the first", "base": "b"}, now, strict=False)
    assert len(lines) == 2 and "was not checked" in lines[0] and "do not compare" in lines[1]
    with pytest.raises(UserError, match="other tokens"):
        check_settings(now | {"data": "others"}, now, strict=False)


def test_other_data_is_refused_and_unknown_data_is_said() -> None:
    with pytest.raises(UserError, match="other tokens"):
        check_settings(NOW | {"data": "xyz"}, NOW, strict=False)
    with pytest.raises(UserError, match=r"model\.path: its config\.json is another"):
        check_settings(NOW | {"model": "a"}, NOW | {"model": "b"}, strict=False)
    [line] = check_settings({"torch": "2", "threads": 4}, NOW, strict=False)
    assert "does not say which data" in line
