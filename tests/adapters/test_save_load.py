"""Adapters written here compute the same in PEFT, and the other way round, in float64; misfits are refused."""

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.lowrank.test_inject import FAMILIES, IDS, SHAPE, SPECIAL
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from relora.adapters.peft_format import CONFIG, TENSORS, common_and_patterns, read_adapter, shapes
from relora.adapters.save_load import load_adapter, save_adapter
from relora.errors import UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, low_rank_layers, merge
from relora.lowrank.gradient_init import gradient_svd_
from relora.lowrank.patterns import by_pattern

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
    "rslora": {"rslora": True, "rank_pattern": {r".*\.1\..*": 6}},
    "dora": {"dora": True},
}


def built(family: str) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family][0]().double().eval()
    return model


def trained(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """A model with low-rank layers whose factors have changed since their initialisation."""
    inject(model, LowRankConfig(**{"r": 4, "lora_alpha": 8, "rest": "frozen", **settings}))
    moved(model)
    return model


def moved(model: nn.Module) -> None:
    """Change every parameter that trains by small random numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def in_peft(family: str, **settings: Any) -> peft.PeftModel:
    """A trained adapter of PEFT's own."""
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": family == "gpt2",
            **settings,
        }
    )
    model = peft.get_peft_model(built(family), config).eval()
    moved(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LLaMA's adapter."""
    return save_adapter(trained(built("llama")), tmp_path / "adapter", base="tiny/llama")


# PEFT's format, both ways


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_ours(family: str, kind: str, tmp_path: Path) -> None:
    model = trained(built(family), **KINDS[kind])
    save_adapter(model, tmp_path / "ours", base="tiny")
    loaded = peft.PeftModel.from_pretrained(built(family), tmp_path / "ours")
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert not torch.allclose(logits(model), logits(built(family)), atol=1e-3)
    same(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_peft_saves(family: str, kind: str, tmp_path: Path) -> None:
    settings = {{"rslora": "use_rslora", "dora": "use_dora"}.get(key, key): v for key, v in KINDS[kind].items()}
    theirs = in_peft(family, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    model = built(family)
    report = load_adapter(model, tmp_path / "theirs")
    same(logits(model), logits(theirs))
    assert report.low_rank == report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    merge(model)
    same(logits(model), logits(theirs))


def test_an_adapter_goes_there_and_back_unchanged(family: str, tmp_path: Path) -> None:
    model = trained(built(family), **KINDS["patterns"], lora_dropout=0.1)
    first = save_adapter(model, tmp_path / "first", base="tiny")
    again = built(family)
    load_adapter(again, first)
    second = save_adapter(again, tmp_path / "second", base="tiny")
    assert (first / CONFIG).read_bytes() == (second / CONFIG).read_bytes()
    assert (first / TENSORS).read_bytes() == (second / TENSORS).read_bytes()
    config = json.loads((first / CONFIG).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    assert config["lora_dropout"] == 0.1 and config["base_model_name_or_path"] == "tiny"
    assert all(len(name.split(".")) == 1 for name in config["target_modules"])


@pytest.mark.parametrize("init", ["pissa", "gradient-svd"])
def test_factors_that_began_with_the_weight_are_saved_relative_to_it(family: str, init: str, tmp_path: Path) -> None:
    model = built(family)
    inject(model, LowRankConfig(r=4, lora_alpha=8, rest="frozen", init=init))
    if init == "gradient-svd":
        layers = low_rank_layers(model)
        torch.manual_seed(2)
        gradient_svd_(model, {p: torch.randn(v.out_features, v.in_features) for p, v in layers.items()})
    moved(model)
    save_adapter(model, tmp_path / "ours")
    assert {factors.r for factors in read_adapter(tmp_path / "ours").layers.values()} == {8}
    same(logits(peft.PeftModel.from_pretrained(built(family), tmp_path / "ours")), logits(model))


def test_a_trained_scaling_is_saved(tmp_path: Path) -> None:
    model = trained(built("llama"), trainable_scaling=True)
    save_adapter(model, tmp_path / "ours")
    same(logits(peft.PeftModel.from_pretrained(built("llama"), tmp_path / "ours")), logits(model))


def test_rslora_is_called_so(saved: Path, tmp_path: Path) -> None:
    save_adapter(trained(built("llama"), rslora=True), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["use_rslora"] is True and config["lora_alpha"] == 8 and config["alpha_pattern"] == {}
    assert json.loads((saved / CONFIG).read_text())["use_rslora"] is False


def test_only_chosen_layers(tmp_path: Path) -> None:
    """Their whole paths stand in the file where last names would say more."""
    model = trained(built("llama"), target_modules=("layers.0.self_attn.q_proj", "v_proj"))
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "ours")
    same(logits(loaded), logits(model))
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]


# What is trained in full


@pytest.mark.parametrize(("family", "modules"), [("llama", ("lm_head", "norm")), ("neox", ("final_layer_norm",))])
def test_modules_trained_in_full_go_along(family: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    model = trained(built(family), trained_modules=modules)
    save_adapter(model, tmp_path / "ours")
    same(logits(peft.PeftModel.from_pretrained(built(family), tmp_path / "ours")), logits(model))
    again = built(family)
    report = load_adapter(again, tmp_path / "ours")
    same(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert report.full_rank == sum(p.numel() for p in again.parameters() if p.requires_grad) - report.low_rank > 0
    assert report.frozen == sum(p.numel() for p in again.parameters() if not p.requires_grad)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_biases_of_peft(family: str, bias: str, tmp_path: Path) -> None:
    theirs = in_peft(family, bias=bias)
    theirs.save_pretrained(tmp_path / "theirs")
    model = built(family)
    load_adapter(model, tmp_path / "theirs")
    same(logits(model), logits(theirs))
    save_adapter(model, tmp_path / "ours")
    same(logits(peft.PeftModel.from_pretrained(built(family), tmp_path / "ours")), logits(theirs))


def test_tied_embeddings_go_along_under_both_names(tmp_path: Path) -> None:
    model = trained(built("tied_qwen"), trained_modules=("embed_tokens",))
    save_adapter(model, tmp_path / "ours")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= read_adapter(tmp_path / "ours").others.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights in general
        loaded = peft.PeftModel.from_pretrained(built("tied_qwen"), tmp_path / "ours")
    same(logits(loaded), logits(model))
    again = built("tied_qwen")
    load_adapter(again, tmp_path / "ours")
    same(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_one_side_of_a_tie_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft("tied_qwen", modules_to_save=["embed_tokens"]).save_pretrained(tmp_path / "theirs")
    untouched(built("tied_qwen"), lambda model: load_adapter(model, tmp_path / "theirs"), "one tied weight")


def test_a_classifier(tmp_path: Path) -> None:
    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, **SPECIAL, intermediate_size=48, num_labels=3, pad_token_id=1)
        return LlamaForSequenceClassification(config).double().eval()

    model = trained(classifier(), trained_modules=("score",))
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours")
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    same(logits(loaded), logits(model))


def test_nothing_but_the_adapter_is_saved(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [CONFIG, TENSORS]
    assert all(".lora_" in name for name in shapes(saved)) and len(shapes(saved)) == 28
    model = built("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_training_continues_from_a_loaded_adapter(saved: Path) -> None:
    model = built("llama")
    load_adapter(model, saved, like=LowRankConfig(base="bf16"))
    model(IDS, labels=IDS).loss.backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {f"{path}.{kind}" for path in low_rank_layers(model) for kind in ("lora_A", "lora_B")}
    assert {layer.weight.dtype for layer in low_rank_layers(model).values()} == {torch.bfloat16}


# Patterns


@given(
    st.dictionaries(
        st.from_regex(r"(layers\.[0-9]{1,2}\.)?(q|k_proj|up)", fullmatch=True), st.sampled_from([2, 4, 8]), min_size=1
    )
)
def test_patterns_say_what_every_layer_has(values: dict[str, int]) -> None:
    common, patterns = common_and_patterns(values)
    assert {path: by_pattern(patterns, path, common, "") for path in values} == values
    assert len(patterns) <= len(values)


# What is refused


def edited(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"lora_bias": True}, "`lora_bias` is True"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens`"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"megatron_config": {"a": 1}}, "`megatron_config`"),
        ({"target_parameters": ["experts"]}, "`target_parameters`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"kasa_config": {"beta": 1}}, "`kasa_config`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights` is 'olora'"),
        ({"r": 0}, "`r` is 0"),
        ({"r": "4"}, "`r` is '4'"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"lora_alpha": None}, "`lora_alpha` is None"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"rank_pattern": {"([": 4}}, "not a regular expression"),
        ({"rank_pattern": {"(a+)+b": 4}}, "more repeats"),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, "more repeats"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_keys_that_change_the_function_are_refused(saved: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_adapter(edited(saved, **keys))
    assert message in str(caught.value) and str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_keys_that_do_not_are_passed_over(saved: Path) -> None:
    before = read_adapter(saved)
    after = read_adapter(
        edited(
            saved,
            megatron_core="megatron.core",
            loftq_config={},
            layers_pattern=None,
            qalora_group_size=16,
            auto_mapping={"base_model_class": "X"},
            something_new={"a": [1]},
            peft_version="9",
        )
    )
    assert after.targets == before.targets and after.layers.keys() == before.layers.keys()


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    change(tensors)
    save_file(tensors, folder / TENSORS)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_B is missing"),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "not a finite number"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "not a finite number"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32)}), "are no [r, in] and [out, r]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4)}), "are no [r, in] and [out, r]"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), "not known here"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), "factors and another weight"),
        (lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(4, 3)}), "lora_embedding_B is miss"),
        (lambda t: t.update({"layers.0.lora_A.weight": torch.ones(4, 3)}), "not known here"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector is missing, or"),
        (lambda t: t.clear() or t.update({"base_model.model.norm.weight": torch.ones(3)}), "no low-rank factors"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_adapter(rewritten(saved, change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(saved: Path) -> None:
    whole = (saved / TENSORS).read_bytes()
    for damaged in (b"", whole[:7], whole[:200], whole[:-1], struct.pack("<Q", 1 << 40) + whole[8:], b"{}" * 40):
        (saved / TENSORS).write_bytes(damaged)
        with pytest.raises(UserError, match="damaged, or not a safetensors file"):
            read_adapter(saved)
    (saved / TENSORS).rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled adapter could run code"):
        read_adapter(saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        read_adapter(saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_adapter(saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_adapter(saved)
    (saved / CONFIG).unlink()
    with pytest.raises(UserError, match="not an adapter"):
        read_adapter(saved)
    with pytest.raises(UserError, match="no such folder"):
        read_adapter(saved / "gone")


def test_a_link_out_of_the_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / TENSORS).rename(tmp_path / "elsewhere")
    (saved / TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of its folder"):
        read_adapter(saved)


def untouched(model: PreTrainedModel, attempt: Callable[[PreTrainedModel], object], message: str) -> None:
    """Loading is refused, and the model has not changed."""
    before = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError) as caught:
        attempt(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    after = exact_tensors(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_another_base_is_refused(saved: Path) -> None:
    named = "made for another base model (tiny/llama)"
    first = "this one has no linear layer model.layers.0"
    untouched(built("gpt2"), lambda model: load_adapter(model, saved), f"{named}: {first}")
    config = LlamaConfig(**(SHAPE | {"hidden_size": 64}), **SPECIAL, intermediate_size=48)
    wide = type(built("llama"))(config).double()
    shape = "model.layers.0.self_attn.q_proj is 32 x 32 there, 64 x 64 here"
    untouched(wide, lambda model: load_adapter(model, saved), f"{named}: {shape}")


def test_an_adapter_is_never_written_over_unasked(saved: Path, tmp_path: Path) -> None:
    before = (saved / TENSORS).read_bytes()
    other = trained(built("llama"), r=2)
    with pytest.raises(UserError, match="is there already"):
        save_adapter(other, saved)
    assert (saved / TENSORS).read_bytes() == before
    save_adapter(other, saved, overwrite=True)
    assert {factors.r for factors in read_adapter(saved).layers.values()} == {2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        save_adapter(other, tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]


def test_a_model_without_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no low-rank layers"):
        save_adapter(built("llama"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
