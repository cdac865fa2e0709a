"""Every kind of LoRA adapter that PEFT saves is read, used and merged as PEFT computes it, or refused by its key."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.test_save_load import moved
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from relora.adapters.combine import combine
from relora.adapters.merge import merge_adapter, unmerge_adapter
from relora.adapters.multi_adapter import Adapters
from relora.adapters.peft_format import CONFIG, TENSORS, read_adapter, write_adapter
from relora.adapters.save_load import load_adapter
from relora.adapters.show import show_adapter
from relora.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),  # PEFT warns of tied weights
]

SHAPE: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IDS = torch.arange(64).view(2, 32)


@dataclass(frozen=True)
class Kind:
    """One kind of adapter."""

    settings: dict[str, Any]
    trains: bool = True
    """`load_adapter` takes it; otherwise it says why not."""
    trains_tied: bool = True
    """The same on a base with tied embeddings."""
    families: tuple[str, ...] = field(default=("untied", "tied"))


Q: dict[str, Any] = {"target_modules": ["q_proj"]}
KINDS = {
    "plain": Kind(Q),
    "all-linear": Kind({"target_modules": "all-linear"}),
    "regular expression": Kind({"target_modules": r".*\.layers\.[01]\.(self_attn\.q_proj|mlp\.down_proj)"}),
    "excluded": Kind({"target_modules": "all-linear", "exclude_modules": ["v_proj", "mlp.up_proj"]}),
    "some layers": Kind({**Q, "layers_to_transform": [1]}),
    "some layers, named": Kind({**Q, "layers_to_transform": [0], "layers_pattern": "layers"}),
    "rsLoRA": Kind({**Q, "use_rslora": True}),
    "DoRA": Kind({**Q, "use_dora": True}),
    "dropout": Kind({**Q, "lora_dropout": 0.2}),
    "patterns": Kind(
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {r"layers\.1\..*q_proj": 1, r"^model\.layers\.0\..*": 5},
        }
    ),
    "gaussian": Kind({**Q, "init_lora_weights": "gaussian"}),
    "orthogonal": Kind({**Q, "init_lora_weights": "orthogonal"}),
    "random": Kind({**Q, "init_lora_weights": False}),
    "all biases": Kind({**Q, "bias": "all"}),
    "biases of the targets": Kind({**Q, "bias": "lora_only"}),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}, trains_tied=False),
    "head alone": Kind({"target_modules": ["lm_head"]}, trains_tied=False),
    "head, DoRA": Kind({"target_modules": ["lm_head"], "use_dora": True}, trains_tied=False),
    "embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}, trains=False),
    "embedding, rsLoRA": Kind({"target_modules": ["embed_tokens"], "use_rslora": True}, trains=False),
    "embedding, DoRA": Kind({"target_modules": ["embed_tokens"], "use_dora": True}, trains=False),
    "embedding and head": Kind({"target_modules": ["embed_tokens", "lm_head"]}, trains=False),
    "tied": Kind({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, trains=False),
    "head in full": Kind({**Q, "modules_to_save": ["lm_head"]}, trains_tied=False),
    "embedding in full": Kind({**Q, "modules_to_save": ["embed_tokens"]}, trains_tied=False),
    "both in full": Kind({**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "norms in full": Kind({**Q, "modules_to_save": ["norm", "input_layernorm"]}),
    "blocks in full": Kind({**Q, "modules_to_save": ["mlp"]}),
    "tokens": Kind({**Q, "trainable_token_indices": [3, 60]}, trains=False),
    "tokens, by name": Kind({**Q, "trainable_token_indices": {"embed_tokens": [7, 5, 3]}}, trains=False),
    "tokens of both": Kind({**Q, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 3]}}, trains=False),
    "Conv1D": Kind({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, families=("gpt2",)),
    "Conv1D, DoRA": Kind(
        {"target_modules": "all-linear", "fan_in_fan_out": True, "use_dora": True}, families=("gpt2",)
    ),
    "Conv1D and head": Kind(
        {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}, trains=False, families=("gpt2",)
    ),
    "embedding of GPT-2": Kind({"target_modules": ["wte", "wpe"]}, trains=False, families=("gpt2",)),
}
CASES = [(name, family) for name, kind in KINDS.items() for family in kind.families]


def built(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        config: Any = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = LlamaConfig(**SHAPE, tie_word_embeddings=family == "tied")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).double().eval()
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("bases") / family for family in ("untied", "tied", "gpt2")}
    for family, folder in folders.items():
        built(family).save_pretrained(folder)
    return folders


def saved(base: Path, folder: Path, **settings: Any) -> Tensor:
    """Train an adapter of PEFT's, save it, and return the logits of PEFT with the adapter read again."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(opened(base), config).eval()
    moved(model)
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(opened(base), folder))


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model


def logits(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_read_used_and_merged_as_in_peft(name: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, base = KINDS[name], bases[family]
    expected = saved(base, tmp_path / "adapter", **kind.settings)
    assert not torch.allclose(expected, logits(opened(base)), atol=1e-3)
    model = opened(base)
    adapters = Adapters(model)
    adapters.load("theirs", tmp_path / "adapter")
    same(logits(model), logits(opened(base)))
    adapters.use("theirs")
    same(logits(model), expected)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base)
    same(logits(opened(tmp_path / "merged")), expected)
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4
    trains = kind.trains and (family != "tied" or kind.trains_tied)
    model = opened(base)
    if trains:
        load_adapter(model, tmp_path / "adapter")
    else:
        with pytest.raises(UserError, match=r"merge (it|the adapter first) \(`relora adapters merge`\)"):
            load_adapter(model, tmp_path / "adapter")
    same(logits(model), expected if trains else logits(opened(base)))


@pytest.mark.parametrize(
    "name", ["head, DoRA", "embedding and head", "tokens of both", "patterns", "biases of the targets"]
)
def test_what_was_read_is_written_again(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    expected = saved(bases["untied"], tmp_path / "theirs", **KINDS[name].settings)
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / TENSORS) for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    same(logits(peft.PeftModel.from_pretrained(opened(bases["untied"]), tmp_path / "ours")), expected)


@pytest.mark.parametrize("family", ["untied", "tied"])
@pytest.mark.parametrize("name", ["head", "embedding", "tokens", "head in full"])
def test_the_base_comes_back(name: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit with the base at hand; without it one line says that only the base can undo the merge."""
    base = Path(shutil.copytree(bases[family], tmp_path / "base"))
    saved(base, tmp_path / "adapter", **KINDS[name].settings)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base, check=False)
    assert unmerge_adapter(tmp_path / "merged", tmp_path / "again").exact
    before, after = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (base, tmp_path / "again")
    )
    assert before == after
    shutil.rmtree(base)
    with pytest.raises(UserError, match="which only the base"):
        unmerge_adapter(tmp_path / "merged", tmp_path / "subtracted")


@pytest.mark.parametrize(
    "name", ["plain", "head", "embedding", "embedding in full", "head in full", "tokens", "tokens of both"]
)
def test_weights_tied_by_the_configuration_alone(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Where the files hold two values for tied weights, transformers keeps both, and so does the merged model."""
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    expected = saved(base, tmp_path / "adapter", **KINDS[name].settings)
    model = opened(base)
    adapters = Adapters(model)
    adapters.load("theirs", tmp_path / "adapter")
    adapters.use("theirs")
    same(logits(model), expected)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base, check=False)
    same(logits(opened(tmp_path / "merged")), expected)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_an_untied_model_is_whole(shards: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Its files hold both weights under their names, and nothing but the head was added."""
    opened(bases["tied"]).save_pretrained(tmp_path / "base", max_shard_size=shards)
    expected = saved(tmp_path / "base", tmp_path / "adapter", **KINDS["head"].settings)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert report.untied == ["model.embed_tokens.weight", "lm_head.weight"]
    model = opened(tmp_path / "merged")
    assert model.config.tie_word_embeddings is False and model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, opened(tmp_path / "base").model.embed_tokens.weight)
    same(logits(model), expected)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in (tmp_path / "merged").glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held and held.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_copy_of_the_base_counts_where_it_differs(
    factor: float, bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT puts the copy into the base; we do the same and say so, and do not train on it."""
    saved(bases["untied"], tmp_path / "adapter", **KINDS["head, DoRA"].settings)
    file = tmp_path / "adapter" / TENSORS
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    expected = logits(peft.PeftModel.from_pretrained(opened(bases["untied"]), tmp_path / "adapter"))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["untied"])
    same(logits(opened(tmp_path / "merged")), expected)
    line = "its copy of the base's lm_head.weight differs from that of this base, and is used"
    assert (line in caplog.text) == (factor != 1) == (report.full_tensors == 1)
    model = opened(bases["untied"])
    adapters = Adapters(model)
    adapters.load("theirs", tmp_path / "adapter")
    adapters.use("theirs")
    same(logits(model), expected)
    if factor != 1:
        with pytest.raises(UserError, match=r"lm_head\.weight differs from that of this base; merge the adapter first"):
            load_adapter(opened(bases["untied"]), tmp_path / "adapter")


def test_a_copy_of_the_base_is_kept_when_adapters_are_combined(bases: dict[str, Path], tmp_path: Path) -> None:
    saved(bases["untied"], tmp_path / "one", **KINDS["head"].settings)
    one = read_adapter(tmp_path / "one")
    assert combine([one, one], method="cat").base_copies.keys() == {"lm_head.weight"}
    saved(bases["untied"], tmp_path / "two", **KINDS["embedding"].settings)
    for others in ([read_adapter(tmp_path / "two")], [one, read_adapter(tmp_path / "two")]):
        with pytest.raises(UserError, match=r"embed_tokens\.lora_embedding_A, which does not add up; merge it instead"):
            combine(others)


REFUSED: dict[str, dict[str, Any]] = {
    "lora_bias": {**Q, "lora_bias": True},
    "target_parameters": {**Q, "target_parameters": ["mlp.up_proj.weight"]},
    "layer_replication": {**Q, "layer_replication": [(0, 2), (1, 2)]},
    "alora_invocation_tokens": {**Q, "alora_invocation_tokens": [1, 2]},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_makes_another_function_is_refused_by_its_key(key: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **REFUSED[key]})
    peft.get_peft_model(opened(bases["untied"]), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as caught:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["untied"])
    assert f"`{key}` is" in str(caught.value) and "merge_and_unload" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga"])
def test_factors_of_another_base_are_refused(init: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """PiSSA and OLoRA from PEFT itself; the others need data or a GPU to begin, and say it by the same key."""
    real = init if init in ("pissa", "pissa_niter_2", "olora") else True
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=real, **Q)
    peft.get_peft_model(opened(bases["untied"]).float(), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(UserError, match=rf"`init_lora_weights` is '{init}'.*path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_of_another_base_converted_by_peft_are_read(init: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=init, **Q)
    model = peft.get_peft_model(opened(bases["untied"]).float(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = init
    moved(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["untied"])
    assert {factors.r for factors in read_adapter(tmp_path / "adapter").layers.values()} == {8}
    torch.testing.assert_close(logits(opened(tmp_path / "merged")).float(), expected, rtol=1e-5, atol=1e-5)


def test_several_adapters_lie_in_folders_of_their_names(bases: dict[str, Path], tmp_path: Path) -> None:
    model = peft.get_peft_model(opened(bases["untied"]), peft.LoraConfig(r=2, **Q), adapter_name="french")
    model.add_adapter("law", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    moved(model)
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match=r"both: not an adapter .*; below it: french, law"):
        read_adapter(tmp_path / "both")
    for name, r in (("french", 2), ("law", 3)):
        model.set_adapter(name)
        merge_adapter(tmp_path / "both" / name, tmp_path / name, base=bases["untied"])
        assert {factors.r for factors in read_adapter(tmp_path / "both" / name).layers.values()} == {r}
        same(logits(opened(tmp_path / name)), logits(model.eval()))


def test_added_tokens_are_a_base_of_another_size(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT stores resized embeddings; the base must have the tokens, too, and then it is read."""
    base = opened(bases["untied"])
    base.resize_token_embeddings(70)
    base.save_pretrained(tmp_path / "wide")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **Q)).eval()
    moved(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(UserError, match=r"is 70 x 32 there, 64 x 32 here; add the tokens to the base first"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["untied"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "wide")
    same(logits(opened(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("named", [None, [3], [3, 3], [3, 64], {"other": [3, 4]}])
def test_rows_and_their_ids_must_agree(named: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    saved(bases["untied"], tmp_path / "adapter", **KINDS["tokens"].settings)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": named}))
    with pytest.raises(UserError, match=r"trainable_token_indices|rows 3 to 64 of 32 there, 64 x 32 here"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["untied"])


def test_contents_are_shown(bases: dict[str, Path], tmp_path: Path) -> None:
    """A copy of the base's weight is no parameter of the adapter; factors of embeddings are listed as others are."""
    for name, targets, parameters in (
        ("head", ["lm_head", "q_proj"], 4 * (32 + 64) + 2 * 4 * (32 + 32)),
        ("embedding", ["embed_tokens", "q_proj"], 4 * (32 + 64) + 2 * 4 * (32 + 32)),
        ("tokens", ["q_proj"], 2 * 32 + 2 * 4 * (32 + 32)),
    ):
        saved(bases["untied"], tmp_path / name, **KINDS[name].settings)
        contents = show_adapter(tmp_path / name)
        summary = contents.summary
        assert (summary.targets, summary.r, summary.parameters) == (targets, [4], parameters)
        assert contents.base_copies == {
            "head": ["lm_head.weight"],
            "embedding": ["model.embed_tokens.weight"],
        }.get(name, [])
        assert contents.rows == ({"model.embed_tokens.weight": [3, 60]} if name == "tokens" else {})
