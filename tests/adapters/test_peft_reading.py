"""What is said of PEFT's reading of an adapter is what PEFT does with it, for families of every kind."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import _MOE_FUSED_TARGETS, _MOE_TARGET_MODULE_MAPPING
from tests.zoo.tiny_models import make_tiny_model, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.peft_format import write_adapter
from relora.adapters.peft_reading import EXPERT_TARGETS, STATE_SPACE_LEAVES, STATE_SPACE_TYPES, misreadings
from relora.adapters.save_load import save_adapter
from relora.adapters.show import show_adapter
from relora.lowrank import LowRankConfig, inject
from relora.model.load import open_model, quiet_transformers
from relora.seeding import keyed_generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),  # PEFT warns of what it leaves out
]

EXPERTS = ("afmoe", "beam", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "longcat_flash", "qwen3_next")
RENAMED = ("inkling2_text", "laguna")
STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "nemotron_h")
READ_RIGHTLY = (
    "llama",
    "gpt_neox",
    "mixtral",
    "minimax",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "bamba",
    "gemma3",
    "fuyu",
)


def built(family: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    return model


def adapter_on(model: PreTrainedModel, leaves: tuple[str, ...] = (), **settings: Any) -> Adapter:
    """An adapter of rank 1 on every plain linear layer but the head, or on those whose path ends in one of `leaves`."""
    layers = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings() and path.endswith(leaves or ""):
            draw = keyed_generator(0, path)
            a, b = (torch.randn(shape, generator=draw) for shape in ((1, module.in_features), (module.out_features, 1)))
            magnitude = torch.ones(module.out_features) if settings.get("dora") else None
            layers[path] = Factors(a, b, 1.0, magnitude)
    return Adapter(layers=layers, task_type="CAUSAL_LM", dropout=settings.get("dropout", 0.0))


def lost_in_peft(model: PreTrainedModel, adapter: Adapter, folder: Path) -> set[str] | None:
    """The layers whose factors PEFT does not have after it has loaded the adapter; None if it refuses to load it."""
    write_adapter(adapter, folder)
    try:
        loaded = peft.PeftModel.from_pretrained(model, folder)
    except ValueError:
        return None
    modules = dict(loaded.base_model.model.named_modules())

    def arrived(path: str, factors: Factors) -> bool:
        if "default" not in getattr(modules[path], "lora_A", {}):
            return False
        layer = modules[path]
        pairs = ((layer.lora_A, factors.lora_A), (layer.lora_B, factors.lora_B))
        return all(torch.equal(found["default"].weight, ours) for found, ours in pairs)

    return {path for path, factors in adapter.layers.items() if not arrived(path, factors)}


def agree(family: str, adapter: Adapter, model: PreTrainedModel, folder: Path) -> list[str]:
    """Compare what we say with what PEFT does; return the layers that it does not read, as we say."""
    found = misreadings(model, adapter)
    named = [path for misreading in found for path in misreading.layers]
    lost = lost_in_peft(model, adapter, folder)
    assert any(misreading.refused for misreading in found) == (lost is None), family
    assert lost is None or lost == set(named), family
    return named


@pytest.mark.parametrize("family", [*EXPERTS, *RENAMED, *STATE_SPACE, *READ_RIGHTLY])
def test_what_is_said_is_what_peft_does(family: str, tmp_path: Path) -> None:
    model = built(family)
    adapter = adapter_on(model)
    named = agree(family, adapter, model, tmp_path / "adapter")
    assert bool(named) == (family not in READ_RIGHTLY)
    assert len(named) < len(adapter.layers)


@pytest.mark.parametrize(
    ("leaves", "settings"),
    [
        (("q_a_proj", "down_proj"), {}),
        (("q_a_proj", "gate_proj"), {}),
        (("q_a_proj", "up_proj", "down_proj"), {}),
        (("q_a_proj", "gate_proj", "up_proj"), {"dropout": 0.1}),
        (("q_a_proj", "down_proj"), {"dora": True}),
        (("q_a_proj", "o_proj"), {"dropout": 0.1, "dora": True}),
        (("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"), {}),
    ],
)
def test_some_of_the_layers_of_a_mixture_of_experts(
    leaves: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = built("deepseek_v3")
    named = agree("deepseek_v3", adapter_on(model, leaves, **settings), model, tmp_path / "adapter")
    assert bool(named) == any("mlp" in leaf or leaf in ("gate_proj", "up_proj", "down_proj") for leaf in leaves)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"dora": True}])
def test_a_linear_router_is_read_as_a_parameter(settings: dict[str, Any], tmp_path: Path) -> None:
    model = built("afmoe")
    named = agree("afmoe", adapter_on(model, ("q_proj", "gate"), **settings), model, tmp_path / "adapter")
    assert bool(named) == bool(settings)


def test_without_experts_in_the_model_dropout_is_no_obstacle(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    config.first_k_dense_replace = config.num_hidden_layers
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert not any("experts" in name for name, _ in model.named_parameters())
    adapter = adapter_on(model, ("q_a_proj", "gate_proj", "up_proj"), dropout=0.1)
    assert agree("deepseek_v3", adapter, model, tmp_path / "adapter")


def test_the_tables_are_those_of_the_installed_peft() -> None:
    assert EXPERT_TARGETS == _MOE_TARGET_MODULE_MAPPING
    for kind, fused in _MOE_FUSED_TARGETS.items():
        ours = [leaf for leaf, parameter in EXPERT_TARGETS[kind].items() if parameter == "gate_up_proj"]
        assert fused == {"gate_up_proj": ours}
    for model_type in (*STATE_SPACE_TYPES, "bamba", "jamba", "llama"):
        model = nn.Module()
        model.config = type("Config", (), {"model_type": model_type})()
        for leaf in (*STATE_SPACE_LEAVES, "in_proj"):
            refused = model_type in STATE_SPACE_TYPES and leaf in STATE_SPACE_LEAVES
            try:
                _check_lora_target_modules_mamba(peft.LoraConfig(), model, leaf)
            except ValueError:
                assert refused, (model_type, leaf)
            else:
                assert not refused, (model_type, leaf)


def test_saving_and_showing_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line names the layers and what to do; an adapter without these layers gets none."""
    with quiet_transformers():
        base = make_tiny_model("glm4_moe", tmp_path / "base")
    for targets, said in ((("q_proj", "up_proj", "gate_proj"), True), (("q_proj", "o_proj"), False)):
        model = open_model(base)
        inject(model, LowRankConfig(r=2, rest="frozen", target_modules=targets))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="relora"):
            folder = save_adapter(model, tmp_path / targets[-1], base=str(base))
        lines = [record.getMessage() for record in caplog.records]
        assert show_adapter(folder).misread_by_peft == [line.split(": ", 2)[2] for line in lines]
        assert len(lines) == said
        for line in lines:
            assert (
                "4 layers (model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj, model.layers.*.mlp.shared" in line
                and "\n" not in line
            )
            assert "relora adapters merge" in line and "lowrank.target_modules" in line
    nowhere = save_adapter(model, tmp_path / "nowhere", base="someone/model")
    assert show_adapter(nowhere).misread_by_peft is None
