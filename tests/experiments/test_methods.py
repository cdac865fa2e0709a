"""Names of pretraining methods: the overrides of each, and the shape of the control."""

from pathlib import Path

import pytest
import torch
import yaml
from tests.paths import CONFIGS
from tests.test_docs import COMMANDS, shown

from relora.config import load_config
from relora.config.variants import PAPER, RENEWING
from relora.errors import UserError
from relora.experiments.methods import PRETRAINING_METHODS, control_shape, methods_of
from relora.lowrank import inject
from relora.recipes.from_settings import lowrank_of
from relora.recipes.pretraining_inputs import open_configured_model

COMPARISONS = [*sorted((CONFIGS / "paper").glob("*.yaml")), *sorted((CONFIGS / "small").glob("*.yaml"))]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    tree = {
        "output_dir": "runs/all",
        "model": {"preset": "llama-9m", "vocab_size": 512},
        "data": {"train": "train", "validation": "validation"},
        "lowrank": {"r": 8},
        "warm_start": "auto",
        "restart": {"every_steps": 1500, "warmup_steps": 20, "init": "orthogonal"},
        "schedule": {"total_steps": 9000},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_name_gives_a_configuration(config: Path) -> None:
    found = methods_of(",".join(PRETRAINING_METHODS), [], config, [])
    assert list(found) == list(PRETRAINING_METHODS)
    settled = {name: load_config(config, overrides) for name, overrides in found.items()}
    assert {name: one.method for name, one in settled.items() if "relora" not in name and "restarts" not in name} == {
        **dict.fromkeys(("full", "full-muon", "control", "galore", "apollo", "fira"), "full"),
        **dict.fromkeys(("lora", "lora-warm", "lora-muon", "lora-muon-warm", "residual", "residual-scratch"), "lora"),
    }
    assert {name for name, one in settled.items() if one.lowrank.residual.scale} == {"residual", "residual-scratch"}
    assert settled["galore"].optimizer.name == "galore" and settled["galore"].optimizer.projection.rank == 8
    assert settled["lora"].warm_start.steps == 0 and settled["lora-warm"].warm_start.auto
    # a variant sets every key that it stands for, even those that the configuration gives
    for name, variant, defaults in (("relora", "default", RENEWING), ("relora-paper", "paper", PAPER)):
        assert settled[name].variant == variant
        for section, keys in defaults.items():
            found_keys = settled[name].model_dump()[section]
            assert {key: found_keys[key] for key in keys} == keys
    assert settled["relora-paper"].restart.every_steps == settled["relora-balanced"].restart.every_steps == 1500
    assert settled["relora-paper"].restart.warmup_steps == 20
    assert settled["relora"].warm_start.takeover and not settled["relora-scratch"].warm_start.takeover
    assert {name for name, one in settled.items() if one.method != "full" and one.optimizer.factors == "muon"} == {
        *("relora", "relora-scratch", "lora-muon", "lora-muon-warm")
    }


def test_the_ablation_table_has_every_part_alone(config: Path) -> None:
    names = (
        "lora",
        "restarts",
        "restarts-reset",
        "restarts-jagged",
        "relora-paper-scratch",
        "lora-warm",
        "relora-paper",
    )
    found = methods_of(",".join(names), [], config, [])
    rows = []
    for name in names:
        one = load_config(config, found[name])
        restarts = one.method == "relora"
        reset, jagged = one.restart.optimizer == "zero", one.restart.warmup_steps > 0
        rows.append((restarts, restarts and reset, restarts and jagged, one.warm_start.steps > 0))
    assert rows == [
        (False, False, False, False),
        (True, False, False, False),
        (True, True, False, False),
        (True, False, True, False),
        (True, True, True, False),
        (False, False, False, True),
        (True, True, True, True),
    ]


def test_methods_of_ones_own_override_relora(config: Path) -> None:
    own = ["tail:restart.until=0.7,restart.optimizer=keep", "betas:optimizer.betas=[0.9,0.95],method=lora"]
    found = methods_of("full", own, config, [])
    assert found["tail"] == ("method=relora", "restart.until=0.7", "restart.optimizer=keep")
    assert load_config(config, found["tail"]).restart.until == 0.7
    betas = load_config(config, found["betas"])
    assert betas.optimizer.betas == (0.9, 0.95) and betas.method == "lora"


def test_what_is_no_method_is_refused_with_the_names_that_are(config: Path) -> None:
    with pytest.raises(UserError, match=r"`lora-hot` is none of full, control, lora, lora-warm, relora-paper, relora,"):
        methods_of("full,lora-hot", [], config, [])
    for text in ("restart.until=0.7", "tail:", "full:restart.until=0.7", "../up:restart.until=0.7"):
        with pytest.raises(UserError, match="--method"):
            methods_of("full", [text], config, [])
    with pytest.raises(UserError, match="at least one"):
        methods_of(" , ", [], config, [])


@pytest.mark.parametrize("preset", ["llama-9m", "llama-60m", "llama-350m"])
@pytest.mark.parametrize("changes", [(), ("model.tie_word_embeddings=true",), ("lowrank.target_modules=[q_proj]",)])
def test_control_has_as_many_parameters_as_relora_trains(config: Path, preset: str, changes: tuple[str, ...]) -> None:
    base = [f"model.preset={preset}", "model.vocab_size=32100", *changes]
    relora = load_config(config, base)
    control = load_config(config, [*base, "method=full", *control_shape(relora)])
    with torch.device("meta"):
        wide, narrow = open_configured_model(relora), open_configured_model(control)
    trained = inject(wide, lowrank_of(relora)).trainable
    parameters = sum(parameter.numel() for parameter in narrow.parameters())
    assert abs(parameters / trained - 1) < 0.005
    for key in ("num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(narrow.config, key) == getattr(wide.config, key)
    assert narrow.config.hidden_size <= wide.config.hidden_size


def test_control_wants_a_preset(config: Path) -> None:
    with pytest.raises(UserError, match=r"control: needs `model\.preset`"):
        methods_of("full,control", [], config, ["model={path: somewhere}"])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_comparisons_that_come_with_the_package(path: Path) -> None:
    """The commands in their comments parse, name the file itself and its data, and ask for methods that are valid."""
    config = load_config(path)
    prepare, *compares = shown(path)
    assert prepare[0] == "prepare" and compares
    folder = prepare[prepare.index("--out") + 1]
    assert (config.data.train, config.data.validation) == (f"{folder}/train", f"{folder}/validation")
    for verb, file, *options in compares:
        assert verb == "compare" and Path(file) == path.relative_to(CONFIGS.parent)
        COMMANDS.commands[verb].make_context(verb, [file, *options])
        for overrides in methods_of(options[options.index("--methods") + 1], [], path, []).values():
            load_config(path, overrides)


def test_two_comparisons_for_every_published_size() -> None:
    names = {path.stem for path in COMPARISONS}
    assert names >= {
        f"{size}-{kind}" for size in ("60m", "130m", "250m", "350m", "1.3b") for kind in ("main", "ablation")
    }
    presets = {load_config(path).model.preset for path in COMPARISONS if path.parent.name == "paper"}
    assert presets == {"llama-60m", "llama-130m", "llama-250m", "llama-350m", "llama-1b"}
