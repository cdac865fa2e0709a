"""Configuration: defaults, overrides, round trip; every mistake is one line that names the key."""

from pathlib import Path

import pytest
import yaml

from relora.config import RunConfig, load_any_config, load_config, parse_config, to_yaml
from relora.errors import UserError
from relora.lowrank import LowRankConfig

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"preset": "llama-9m"},
    "data": {"train": "a", "validation": "b"},
    "schedule": {"total_steps": 3000},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_are_the_papers() -> None:
    config = parse_config(MINIMAL)
    assert (config.method, config.lowrank.r, config.lowrank.lora_alpha) == ("relora", 128, 32)
    assert config.lowrank.lora_dropout == 0.0
    assert config.lowrank_lr == 2 * config.optimizer.lr


def test_resolved_yaml_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["data.train=[{path: a, weight: 2}, {path: c}]", "lowrank.target_modules=[q_proj]"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_apply_in_order(file: Path) -> None:
    config = load_config(file, ["optimizer.lr=1e-2", "optimizer.lr=5e-3", "seed=7", "model.vocab_size=512"])
    assert (config.optimizer.lr, config.seed, config.model.overrides) == (5e-3, 7, {"vocab_size": 512})


def test_token_budget_counts_tokens(file: Path) -> None:
    """Not sequences: the published code divides tokens by sequences and trains sequence_length times too long."""
    tree = MINIMAL | {"schedule": {"total_tokens": 100_000_000}, "batch": {"sequences": 64, "micro_sequences": 8}}
    config = parse_config(tree)
    assert config.total_steps == -(-100_000_000 // (64 * 256))


def test_lowrank_settings_and_library_config_agree() -> None:
    settings = parse_config(MINIMAL).lowrank
    assert LowRankConfig(**settings.model_dump()) == LowRankConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lowrank.rr=3", "unknown key `lowrank.rr`; did you mean `lowrank.r`"),
        ("lowrnk.r=3", "did you mean `lowrank`"),
        ("lr=1", "did you mean `optimizer.lr`"),
        ("restart.every=10", "did you mean `restart.every_steps`"),
        ("model.path=x", "either `preset`"),
        ("schedule.total_tokens=5", "either `total_steps`"),
        ("batch.sequences=7", r"sequences \(7\) must be a multiple of micro_sequences \(8\)"),
        ("batch.sequences=0", "`batch.sequences` is 0"),
        ("lowrank.r=-1", "`lowrank.r` is -1"),
        ("lowrank.lora_dropout=1.5", "`lowrank.lora_dropout` is 1.5"),
        ("lowrank.base=int3", "'auto', 'fp32', 'bf16' or 'int8'"),
        ("optimizer.lr=.nan", "`optimizer.lr`"),
        ("optimizer.lr=abc", "valid number"),
        ("restart.optimizer=clear", "'zero', 'random', 'magnitude' or 'keep'"),
        ("method=relorra", "'full', 'lora' or 'relora'"),
        ("warm_start.steps=3000", "must be shorter than the run"),
        ("restart.warmup_steps=1000", r"shorter than restart.every_steps \(1000\)"),
        ("schedule.warmup_steps=3000", "must be shorter than the run"),
        ("precision.dtype=fp16", "'fp32', 'bf16' or 'bf16-mixed'"),
        ("data.train=[]", "data.train"),
        ("log.trackers=[mlflow]", "'tensorboard', 'wandb' or 'trackio'"),
        ("optimizer.lr", "key.sub=value"),
        ("seed.x=1", "not a section|valid integer"),
        ("optimizer.lr=[1", "not valid YAML"),
        ("data=3", "data"),
    ],
)
def test_mistakes_are_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ["a: [", "- 1", "", "\x00", "a: &x *y"])
def test_broken_files_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_every_key_is_documented() -> None:
    schema = RunConfig.model_json_schema()
    assert schema["$defs"]["RestartSettings"]["properties"]["optimizer"]["description"]


def test_shipped_configurations_are_valid() -> None:
    shipped = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert shipped
    for path in shipped:
        assert load_any_config(path).output_dir.startswith("runs/"), path
