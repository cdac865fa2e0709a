"""Configurations: defaults, overrides, round trip; every mistake is one line that names the key."""

from pathlib import Path

import pytest
import yaml
from tests.paths import CONFIGS

from relora.config import FinetuneConfig, RunConfig, load_any_config, load_config, parse_config, to_yaml
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.recipes.from_settings import lowrank_of, schedule_of

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
    """The published code divides tokens by sequences, and so trains sequence_length times too long."""
    tree = MINIMAL | {"schedule": {"total_tokens": 100_000_000}, "batch": {"sequences": 64, "micro_sequences": 8}}
    config = parse_config(tree)
    assert config.total_steps == -(-100_000_000 // (64 * 256))


def test_lowrank_settings_and_library_config_agree() -> None:
    assert lowrank_of(parse_config(MINIMAL)) == LowRankConfig()


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 70),
        (["method=lora"], 70),
        (["lowrank.warmup_steps=0"], 0),
        (["variant=paper"], None),
        (["variant=paper", "lowrank.warmup_steps=20"], 20),
        (["variant=paper", "method=lora"], 70),
    ],
)
def test_warm_up_of_the_factors_is_that_of_the_run_unless_given(
    file: Path, overrides: list[str], steps: int | None
) -> None:
    """With Algorithm 1 the switch warms up as a restart does, unless steps are given."""
    config = load_config(file, ["schedule.warmup_steps=70", *overrides])
    assert schedule_of(config).switch_warmup_steps == steps


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
        ("restart.optimizer=clear", "'zero', 'random', 'magnitude', 'keep' or 'project'"),
        ("restart.growth=0.5", "`restart.growth` is 0.5"),
        ("restart={stagger: ranks, optimizer: project}", "knows `optimizer: zero` and `keep`"),
        ("restart={stagger: ranks, warmup_steps: 5}", "set `warmup_steps: 0`"),
        ("restart={stagger: layers, warmup_steps: 5}", "set `ramp: factors`"),
        ("restart={stagger: layers, every_steps: 3, warmup_steps: 0}", r"restart.turns \(4\) must not exceed"),
        ("method=relorra", "'full', 'lora' or 'relora'"),
        ("warm_start.steps=3000", "must be shorter than the run"),
        ("warm_start={auto: true, steps: 600}", r"first at step 600; raise its bound, warm_start.steps \(600\)"),
        ("warm_start=often", "`warm_start` is .often.: must be a section"),
        ("lowrank={ranks: spectrum, r: 0}", "`lowrank.r` is 0"),
        ("restart={adaptive: true, growth: 2}", "set `growth: 1`"),
        ("restart={adaptive: true, stagger: layers, warmup_steps: 0}", "set `stagger: none`"),
        ("restart.warmup_steps=1000", r"shorter than restart.every_steps \(20\)"),
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


@pytest.mark.parametrize("kind", [RunConfig, FinetuneConfig])
def test_every_key_is_documented(kind: type[RunConfig | FinetuneConfig]) -> None:
    schema = kind.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        for name, key in section["properties"].items():
            is_section = any("$ref" in option for option in (key, *key.get("anyOf", ())))
            assert is_section or key["description"], name


def test_shipped_configurations_are_valid() -> None:
    shipped = sorted(CONFIGS.rglob("*.yaml"))
    assert shipped
    for path in shipped:
        assert load_any_config(path).output_dir.startswith("runs/"), path


def test_auto_is_a_word_for_a_section() -> None:
    auto = parse_config(MINIMAL | {"warm_start": "auto"})
    assert auto.warm_start.auto and auto.warm_start.steps == 1000 and auto.earliest_switch == 600
    assert parse_config(yaml.safe_load(to_yaml(auto))) == auto
    accepted = RunConfig.model_json_schema()["properties"]["warm_start"]["anyOf"]
    assert {"const": "auto", "type": "string"} in accepted


@pytest.mark.parametrize(
    ("between_restarts", "between_measurements", "measured"),
    [(1000, 500, 1), (200, 250, 1), (50, 250, 3), (20, 200, 5)],
)
def test_restarts_are_measured_at_most_twice_as_often_as_the_run(
    between_restarts: int, between_measurements: int, measured: int
) -> None:
    config = parse_config(
        MINIMAL
        | {"restart": {"every_steps": between_restarts, "warmup_steps": 0}}
        | {"evaluate": {"every_steps": between_measurements}}
    )
    assert config.measured_restarts == measured


@pytest.mark.parametrize("restart", [{"init": "kaiming"}, {"init": "balanced", "stagger": "ranks", "turns": 2}])
def test_directions_are_retained_by_balanced_factors_alone(restart: dict[str, object]) -> None:
    with pytest.raises(UserError, match="`retain` goes with `init: balanced`"):
        parse_config(MINIMAL | {"restart": restart | {"retain": 0.5, "warmup_steps": 0, "optimizer": "keep"}})


def test_a_share_of_less_than_a_rank_is_refused() -> None:
    restart = {"init": "balanced", "warmup_steps": 0, "retain": 0.2}
    with pytest.raises(UserError, match=r"restart\.retain \(0\.2\) of lowrank\.r \(4\) is no whole rank"):
        parse_config(MINIMAL | {"restart": restart, "lowrank": {"r": 4}})
    assert parse_config(MINIMAL | {"restart": restart, "lowrank": {"r": 5}})


def test_a_takeover_needs_a_warm_start() -> None:
    with pytest.raises(UserError, match=r"nothing to take over; raise `warm_start\.steps`"):
        parse_config(MINIMAL | {"warm_start": {"steps": 0, "takeover": True}})
    assert parse_config(MINIMAL | {"warm_start": {"steps": 0, "takeover": True}, "method": "full"})


@pytest.mark.parametrize("key", ["factors", "matrices"])
@pytest.mark.parametrize("name", ["adamw-8bit", "galore"])
def test_muon_stands_beside_adamw_alone(key: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{key}: muon stands beside adamw, not beside {name}"):
        parse_config(MINIMAL | {"method": "full", "optimizer": {"name": name, key: "muon"}})


def test_the_residual_needs_the_moments_that_adamw_has_of_the_factors() -> None:
    residual = {"lowrank": {"residual": {"scale": 1.0}}}
    with pytest.raises(UserError, match=r"moments of the factors; set `optimizer\.factors: adamw`"):
        parse_config(MINIMAL | residual | {"optimizer": {"factors": "muon"}})
    assert parse_config(MINIMAL | residual | {"optimizer": {"matrices": "muon"}})


@pytest.mark.parametrize("section", [{"warm_start": "auto"}, {"lowrank": {"ranks": "spectrum"}}])
def test_signals_need_what_they_are_read_from(section: dict[str, object]) -> None:
    with pytest.raises(UserError, match="reads the moments of adamw, not of adamw-8bit"):
        parse_config(MINIMAL | section | {"optimizer": {"name": "adamw-8bit"}})
    with pytest.raises(UserError, match=r"adamw, not of muon; set `optimizer\.matrices: adamw`"):
        parse_config(MINIMAL | section | {"optimizer": {"matrices": "muon"}})
    assert parse_config(MINIMAL | section | {"optimizer": {"factors": "muon"}})
    assert parse_config(MINIMAL | section | {"optimizer": {"name": "adamw-8bit"}, "method": "full"})
    with pytest.raises(UserError, match=r"warm_start\.steps"):
        parse_config(MINIMAL | {"lowrank": {"ranks": "spectrum"}, "warm_start": {"steps": 0}})


def test_the_papers_variant_fills_what_restart_leaves_open() -> None:
    paper = parse_config(MINIMAL | {"variant": "paper", "restart": {"every_steps": 700, "optimizer": "magnitude"}})
    assert (paper.restart.init, paper.restart.ramp, paper.restart.stagger) == ("kaiming", "all", "none")
    assert (paper.restart.every_steps, paper.restart.optimizer) == (700, "magnitude")
    assert parse_config(yaml.safe_load(to_yaml(paper))) == paper
