"""Models are initialised reproducibly, opened whatever their architecture, and checked against data."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.small import SMALL, is_tied, logits
from tests.paths import DATA
from tests.zoo.tiny_models import POSITIONS, make_tiny_model
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    AutoTokenizer,
    Qwen3Config,
)

from relora.errors import UserError
from relora.model import build_model, check_fit, max_positions, open_model

STORIES = DATA / "models" / "stories260K-llama-hf"
needs_data = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared test data is not here")

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""The shortest safetensors file."""


# Building


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model("llama-9m", SMALL, seed=5)
    torch.rand(3)
    stream = torch.get_rng_state()
    again = build_model("llama-9m", SMALL, seed=5)
    assert torch.equal(torch.get_rng_state(), stream)
    other = build_model("llama-9m", SMALL, seed=6)
    for weight, same, different in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, same)
        assert weight.ndim == 1 or not torch.equal(weight, different)


def test_a_new_model_is_drawn_as_published() -> None:
    model = build_model("llama-9m", {"vocab_size": 500}, seed=0, eos_token_id=7)
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.get_input_embeddings().weight[-1].abs().max() > 0  # no padding row that never trains
    assert not is_tied(model)
    assert model.config._attn_implementation == "sdpa"
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (7, 7, None)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 7


def test_what_follows_from_the_shape_follows_from_the_overrides() -> None:
    config = build_model("llama-9m", {**SMALL, "tie_word_embeddings": True}, seed=0).config
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (2, 8, 1024)
    assert is_tied(build_model("llama-9m", {**SMALL, "tie_word_embeddings": True}, seed=0))


def test_heads_with_a_size_of_their_own_keep_it(tmp_path: Path) -> None:
    Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=6).save_pretrained(tmp_path)
    model = open_model(tmp_path, from_scratch=True, overrides={"hidden_size": 20, "num_attention_heads": 3})
    assert (model.config.head_dim, model.config.num_key_value_heads) == (6, 3)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 130}, r"hidden_size \(130\) is not a multiple of model.num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of .*num_key_value_heads \(3\)"),
        ({"hidden_size": 12}, "must be even"),
        ({"n_embd": 12}, r"model.n_embd: a llama model has no such key"),
    ],
)
def test_impossible_shapes(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model("llama-9m", overrides, seed=0)


# Opening


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built() -> None:
    with pytest.raises(UserError, match=r"model: its weights take [\d,]+ GB in fp32, main memory is \d+ GB"):
        build_model("llama-7b", {"hidden_size": 1 << 20, "num_hidden_layers": 100}, seed=0)


def test_every_family_opens_as_it_was_saved(family_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = logits(AutoModel.from_pretrained(family_folder))
    capfd.readouterr()
    model = open_model(family_folder)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(model), expected)
    assert model.dtype == torch.float32
    assert is_tied(model) == (family_folder.name in ("gpt2", "qwen2"))
    assert open_model(family_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_in_several_files_open_as_one(family_folder: Path, tmp_path: Path) -> None:
    whole = open_model(family_folder)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(logits(open_model(tmp_path / "sharded")), logits(whole))


def test_every_family_can_start_from_scratch(family_folder: Path) -> None:
    overrides = {"num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 50}
    first, again = (
        open_model(family_folder, from_scratch=True, overrides=overrides, seed=3, eos_token_id=1) for _ in range(2)
    )
    assert first.get_input_embeddings().weight.shape == (50, 32)
    assert first.config.num_hidden_layers == 3
    for weight, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same)
    assert torch.isfinite(logits(first)).all()
    assert first.config.eos_token_id == 1


@needs_data
def test_a_trained_model_knows_its_trade() -> None:
    model, tokenizer = open_model(STORIES), AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time, there was a little", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model.eval()(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() in ("girl", "boy", "g", "b", "bo", "dog")


def test_on_the_meta_device_only_shapes_are_there(family_folder: Path) -> None:
    expected = {name: weight.shape for name, weight in open_model(family_folder).named_parameters()}
    (family_folder / "model.safetensors").unlink()
    with torch.device("meta"):
        model = open_model(family_folder)
        new = build_model("llama-7b", seed=0)
    assert {name: weight.shape for name, weight in model.named_parameters()} == expected
    assert {weight.device.type for weight in [*model.parameters(), *new.parameters()]} == {"meta"}


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights lack `model.layers.1.mlp.up_proj.weight`"):
        open_model(tmp_path)


def test_unmerged_factors_are_not_ignored(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.lora_A"] = torch.ones(2, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds low-rank factors"):
        open_model(tmp_path)


def test_only_safetensors_are_opened(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no weights"):
        open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(UserError, match=r"pickled.*save_pretrained\('NEW_FOLDER'\)"):
        open_model(tmp_path)


def test_weights_for_other_programs_are_named(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).config.save_pretrained(tmp_path)
    (tmp_path / "model-q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="has no weights in safetensors, only GGUF files"):
        open_model(tmp_path)


def test_a_file_of_weights_that_is_missing_is_named(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path, max_shard_size="4KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(UserError, match=rf"has no {second.name}, which model.safetensors.index.json names"):
        open_model(tmp_path)


def test_weights_of_another_class_are_named_by_it(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its weights lack `lm_head.weight`; they are those of a LlamaModel"):
        open_model(tmp_path)


@pytest.mark.parametrize("quantized", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_quantized_weights_are_refused(tmp_path: Path, quantized: str) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": quantized, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UserError, match="its weights are quantized; give the model in full precision"):
        open_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_open_exactly_in_32(tmp_path: Path, dtype: torch.dtype) -> None:
    half = build_model("llama-9m", SMALL, seed=0).to(dtype)
    half.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, half.state_dict()[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states"])
def test_outputs_that_a_configuration_asks_for_are_no_obstacle(tmp_path: Path, key: str) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: True, "return_dict": False}))
    assert torch.equal(logits(open_model(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("{not json", NO_TENSORS, r"config.json: not valid JSON"),
        ("[]", NO_TENSORS, "config.json: not a JSON object"),
        ('{"model_type": "no-such"}', NO_TENSORS, "not a model that transformers knows"),
        ('{"model_type": "vit"}', NO_TENSORS, "cannot be opened as a causal LM"),
        (json.dumps({"model_type": "llama", **SMALL}), b"\0" * 40, "cannot be opened as a causal LM"),
        (json.dumps({"model_type": "llama", **SMALL}), b"\0", "model.safetensors: damaged"),
    ],
)
def test_broken_folders_give_one_line(tmp_path: Path, config: str, weights: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=message) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    build_model("llama-9m", SMALL, seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"down_proj.weight` is \[16, 24\] where config.json wants \[16, 48\]"):
        open_model(tmp_path)


@pytest.mark.parametrize("path", ["no/such/folder", "/nowhere", "a b c"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_model(path)


def test_other_things_than_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json\)$"):
        open_model(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"no config.json\); give {tmp_path}/model$"):
        open_model(tmp_path)  # a run folder
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        open_model(tmp_path / "file")


# Fit


def test_fit_names_both_numbers_and_the_key(family_folder: Path) -> None:
    model = open_model(family_folder)
    positions = model.config.max_position_embeddings
    check_fit(model, 96, positions)
    with pytest.raises(UserError, match=r"model: has 96 ids, the tokenizer 97; set `model.vocab_size: 97`"):
        check_fit(model, 97, 8)
    with pytest.raises(UserError, match=rf"data\.sequence_length \({positions + 1:,}\).*max_position_embeddings"):
        check_fit(model, 96, positions + 1)


@pytest.mark.parametrize(
    "family, remedy",
    [
        ("llama", "raise `model.max_position_embeddings`$"),
        ("gpt2", r"raise `model.max_position_embeddings` \(`n_positions` in its config.json\)$"),
        ("mpt", r"raise `model.max_position_embeddings` \(`max_seq_len` in its config.json\)$"),
        ("whisper", r"raise `model.max_position_embeddings` \(`max_target_positions` in its config.json\)$"),
        ("gemma4", "raise `max_position_embeddings` of the text part in its config.json$"),
    ],
)
def test_too_long_sequences_name_the_key_of_the_architecture(tmp_path: Path, family: str, remedy: str) -> None:
    make_tiny_model(family, tmp_path)
    with torch.device("meta"):
        model = open_model(tmp_path)
        assert max_positions(model) == POSITIONS
        with pytest.raises(UserError, match=remedy):
            check_fit(model, 300, POSITIONS + 1)
        if "model.max" in remedy:
            key = {"max_position_embeddings": 2 * POSITIONS}
            assert max_positions(open_model(tmp_path, from_scratch=True, overrides=key)) == 2 * POSITIONS


def test_a_number_of_positions_that_is_not_positive_is_no_limit(tmp_path: Path) -> None:
    make_tiny_model("xlnet", tmp_path)
    model = open_model(tmp_path)
    assert model.config.max_position_embeddings == -1 and max_positions(model) is None
    check_fit(model, 300, 10**6)


def test_safetensors_are_taken_and_a_pickle_beside_them_is_not(tmp_path: Path) -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    model.save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.ckpt", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_bytes(b'{"weight_map": {}}')
    assert torch.equal(logits(open_model(tmp_path)), logits(model))
