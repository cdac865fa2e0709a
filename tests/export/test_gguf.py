"""A GGUF file holds the model: read back number by number, and by transformers' reader to the same logits and ids."""

import json
import resource
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.test_load import STORIES, needs_data
from tests.paths import CORPUS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from relora.data.tokenizer import load_tokenizer, train_tokenizer
from relora.errors import RunStopped, UserError
from relora.export.gguf import write_gguf

SIZE = 300
"""Ids of the model; its tokenizer has two fewer."""
SHAPE = {"vocab_size": SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
WIDE = {**SHAPE, "intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **WIDE, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    ),
    "llama-tied": LlamaConfig(**WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=24),
    "qwen2": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=SIZE, **ENDS),
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=96),
    "gpt_neox-tied": GPTNeoXConfig(**SHAPE, intermediate_size=96, tie_word_embeddings=True),
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "gpt2")
TEXTS = (
    "The cat sat.",
    "It's 2024, and they'll pay 1,234 dollars;\n\n\tdon't!",
    "naïve café, 東京 🙂  two spaces",
    "one<|endoftext|>two<|pad|>",
    "x",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    book = sorted(CORPUS.glob("*.txt"))[0].read_text(encoding="utf-8")
    return train_tokenizer([book[start : start + 2000] for start in range(0, 20_000, 2000)], SIZE - 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A model of every family, none of its numbers zero or one."""
    torch.manual_seed(0)
    found = {}
    for name, config in FAMILIES.items():
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def numbers(file: Path) -> dict[str, Tensor]:
    reader = gguf.GGUFReader(file)
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }


def kinds(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def keys(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row i of a head and the row half a head below it, one after the other."""
    size = len(weight) // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def by_part(weight: Tensor, heads: int) -> Tensor:
    """All of q, then all of k, then all of v."""
    size = len(weight) // heads // 3
    return weight[[h * 3 * size + part * size + i for part in range(3) for h in range(heads) for i in range(size)]]


def llama_names(layer: int) -> dict[str, str]:
    block = f"model.layers.{layer}."
    return {
        "attn_norm": f"{block}input_layernorm",
        "attn_q": f"{block}self_attn.q_proj",
        "attn_k": f"{block}self_attn.k_proj",
        "attn_v": f"{block}self_attn.v_proj",
        "attn_output": f"{block}self_attn.o_proj",
        "ffn_norm": f"{block}post_attention_layernorm",
        "ffn_gate": f"{block}mlp.gate_proj",
        "ffn_up": f"{block}mlp.up_proj",
        "ffn_down": f"{block}mlp.down_proj",
    }


def neox_names(layer: int) -> dict[str, str]:
    block = f"gpt_neox.layers.{layer}."
    return {
        "attn_norm": f"{block}input_layernorm",
        "attn_qkv": f"{block}attention.query_key_value",
        "attn_output": f"{block}attention.dense",
        "ffn_norm": f"{block}post_attention_layernorm",
        "ffn_up": f"{block}mlp.dense_h_to_4h",
        "ffn_down": f"{block}mlp.dense_4h_to_h",
    }


def gpt2_names(layer: int) -> dict[str, str]:
    block = f"transformer.h.{layer}."
    return {
        "attn_norm": f"{block}ln_1",
        "attn_qkv": f"{block}attn.c_attn",
        "attn_output": f"{block}attn.c_proj",
        "ffn_norm": f"{block}ln_2",
        "ffn_up": f"{block}mlp.c_fc",
        "ffn_down": f"{block}mlp.c_proj",
    }


def expected(folder: Path) -> dict[str, Tensor]:
    """Arrange the folder's tensors as llama.cpp needs them, written independently of the code under test."""
    config, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    kind = config["model_type"]
    block = {"gpt2": gpt2_names, "gpt_neox": neox_names}.get(kind, llama_names)
    ends = {
        "gpt2": {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
        },
        "gpt_neox": {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "gpt_neox.embed_in" if config["tie_word_embeddings"] else "embed_out",
        },
    }.get(kind, {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})
    names = ends | {f"blk.{layer}.{name}": key for layer in (0, 1) for name, key in block(layer).items()}
    found = {}
    for name, key in names.items():
        for end in (".weight", ".bias"):
            if key + end in stored:
                weight = stored[key + end]
                part = name.rpartition(".")[2]
                if kind == "llama" and part in ("attn_q", "attn_k"):
                    weight = interleaved(
                        weight, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                    )
                if kind == "gpt_neox" and part == "attn_qkv":
                    weight = by_part(weight, config["num_attention_heads"])
                if kind == "gpt2" and weight.dim() == 2 and name.startswith("blk"):
                    weight = weight.T
                found[name + end] = weight
    assert {stored[key].data_ptr() for key in stored} and len(found) >= len(stored)
    return found


# Tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_models(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    file = write_gguf(folders[family], tmp_path / "model.gguf", tokenizer)
    wanted, found = expected(folders[family]), numbers(file)
    assert found.keys() == wanted.keys() and set(kinds(file).values()) == {"F32"}
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(
    folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    dtype: str,
) -> None:
    kind, torch_dtype = {"fp16": ("F16", torch.float16), "bf16": ("BF16", torch.bfloat16)}[dtype]
    file = write_gguf(folders["gpt2"], tmp_path / "model.gguf", tokenizer, dtype)
    wanted, found, stored = expected(folders["gpt2"]), numbers(file), kinds(file)
    for name, weight in wanted.items():
        kept = weight.dim() == 1 or name == "position_embd.weight"
        assert stored[name] == ("F32" if kept else kind)
        assert torch.equal(found[name], weight if kept else weight.to(torch_dtype).float()), name


def test_q8_0_is_within_half_a_quantum(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write_gguf(folders["llama"], tmp_path / "model.gguf", tokenizer, "q8_0")
    wanted, found, stored = expected(folders["llama"]), numbers(file), kinds(file)
    for name, weight in wanted.items():
        if weight.dim() == 1:
            assert stored[name] == "F32" and torch.equal(found[name], weight)
            continue
        assert stored[name] == "Q8_0"
        largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        error = (found[name] - weight).unflatten(-1, (-1, 32)).abs()
        # half a quantum of the scale, which is rounded to fp16 (at most 2^-11 of it) for all numbers up to the largest
        assert (error <= largest * (0.5 / 127 + 2**-11) * 1.0001).all(), name
        assert error.max() > 0


def test_rows_of_no_multiple_of_32_stay_fp16(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = LlamaConfig(**{**WIDE, "intermediate_size": 90})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    stored = kinds(write_gguf(tmp_path / "model", tmp_path / "model.gguf", tokenizer, "q8_0"))
    assert stored["blk.0.ffn_down.weight"] == "F16" and stored["blk.0.ffn_up.weight"] == "Q8_0"


def test_shards_and_one_file_give_the_same_bytes(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = write_gguf(folders["llama"], tmp_path / "whole.gguf", tokenizer)
    sharded = write_gguf(tmp_path / "sharded", tmp_path / "sharded.gguf", tokenizer)
    assert whole.read_bytes() == sharded.read_bytes()


def test_a_file_of_the_model_without_its_head(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GPT-2's files on the hub have keys that do not begin with `transformer.`."""
    folder = shutil.copytree(folders["gpt2"], tmp_path / "bare")
    weights = load_file(folder / "model.safetensors")
    bare = {key.removeprefix("transformer."): weight.clone() for key, weight in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a mask, which old files hold
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    written = write_gguf(folder, tmp_path / "bare.gguf", tokenizer)
    assert written.read_bytes() == write_gguf(folders["gpt2"], tmp_path / "model.gguf", tokenizer).read_bytes()


# Keys


def test_the_keys_say_the_shape(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = keys(write_gguf(folders["llama"], tmp_path / "a.gguf", tokenizer, "bf16"))
    assert found["general.architecture"] == "llama" and found["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert {key.removeprefix("llama."): value for key, value in found.items() if key.startswith("llama.")} == {
        "vocab_size": SIZE,
        "context_length": 2048,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 5e4,
        "rope.dimension_count": 16,
    }
    neox = keys(write_gguf(folders["gpt_neox"], tmp_path / "b.gguf", tokenizer))
    assert neox["gptneox.rope.dimension_count"] == 4 and neox["gptneox.use_parallel_residual"] is True
    gpt2 = keys(write_gguf(folders["gpt2"], tmp_path / "c.gguf", tokenizer))
    assert gpt2["gpt2.feed_forward_length"] == 256 and gpt2["gpt2.context_length"] == 1024


def test_the_tokenizer_is_in_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folders["llama"]))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    found = keys(write_gguf(folders["llama"], tmp_path / "a.gguf", tokenizer))
    ours = {key.removeprefix("tokenizer."): value for key, value in found.items() if key.startswith("tokenizer.")}
    assert ours["ggml.model"] == "gpt2" and ours["ggml.pre"] == "gpt-2"
    assert ours["ggml.bos_token_id"] == ours["ggml.eos_token_id"] == 0 and ours["ggml.padding_token_id"] == 1
    assert ours["ggml.add_bos_token"] is False and ours["ggml.add_eos_token"] is False
    assert ours["chat_template"] == tokenizer.chat_template
    assert len(ours["ggml.tokens"]) == len(ours["ggml.token_type"]) == SIZE
    assert ours["ggml.tokens"][:3] == ["<|endoftext|>", "<|pad|>", "!"]
    assert ours["ggml.tokens"][-2:] == ["[PAD298]", "[PAD299]"] and ours["ggml.token_type"][-2:] == [5, 5]


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_scaled_rotary_positions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, scaling: str) -> None:
    """The file's factors turn transformers' scaled frequencies into the plain ones."""
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 8.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE, rope_parameters=rope))
    model.save_pretrained(tmp_path / "model")
    factors = numbers(write_gguf(tmp_path / "model", tmp_path / "model.gguf", tokenizer))["rope_freqs.weight"]
    plain = torch.tensor([1e4 ** -(2 * pair / 16) for pair in range(8)])
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() == pytest.approx(8, rel=1e-5) and (factors.min() < 2) == (scaling == "llama3")


# Other readers


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    file = write_gguf(folders[family], tmp_path / "model.gguf", tokenizer)
    ours = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.arange(48).view(2, 24) * 5 % SIZE
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    reread = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in TEXTS:
        assert reread(text).input_ids == tokenizer(text).input_ids, text
    assert (reread.eos_token, reread.bos_token, reread.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")


@needs_data
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 0.02), ("q8_0", 0.4)])
def test_a_real_model_by_transformers(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """SentencePiece BPE, grouped heads, tied embeddings: the same logits, ids and greedy text."""
    tokenizer = load_tokenizer(str(STORIES))
    file = write_gguf(STORIES, tmp_path / "stories.gguf", tokenizer, dtype)
    assert file.stat().st_size < (STORIES / "model.safetensors").stat().st_size * {"fp32": 1.2}.get(dtype, 0.7)
    ours = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    reread = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    prompts = ("Once upon a time, there was a little girl named Lily.", "Tom's café — 3 dogs 🙂!", "a\n\nb")
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id and reread(prompt).input_ids == ids[0].tolist()
        with torch.no_grad():
            torch.testing.assert_close(read(ids).logits, ours(ids).logits, rtol=1e-4, atol=tolerance)
    if dtype == "fp32":
        ids = tokenizer(prompts[0], return_tensors="pt")
        texts = [model.generate(**ids, max_new_tokens=60, do_sample=False) for model in (ours, read)]
        assert torch.equal(*texts)


# What is refused


def refused(folder: Path, tokenizer: PreTrainedTokenizerFast, match: str, dtype: str = "fp32") -> None:
    file = folder.parent / "out" / "refused.gguf"
    with pytest.raises(UserError, match=match) as refusal:
        write_gguf(folder, file, tokenizer, dtype)
    assert "\n" not in str(refusal.value)
    assert not file.parent.exists() or not list(file.parent.iterdir())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (OPTConfig(**SHAPE, ffn_dim=64), "'opt'.*llama, qwen2, gpt2, gpt_neox"),
        (LlamaConfig(**WIDE, hidden_act="relu"), "the activation 'relu'"),
        (Qwen2Config(**WIDE, use_sliding_window=True, max_window_layers=0), "sliding-window"),
        (
            GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=SIZE, **ENDS, scale_attn_by_inverse_layer_idx=True),
            "scale",
        ),
        (GPTNeoXConfig(**SHAPE, intermediate_size=64, attention_bias=False), "without biases"),
        (LlamaConfig(**WIDE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (Qwen2Config(**WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "'linear'"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_what_llama_cpp_does_not_compute(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, config: PreTrainedConfig, match: str
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", tokenizer, match)


def spoiled(folder: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy of a model folder with other tensors; None takes one out. `__` stands for a dot."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for name, weight in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if weight is not None:
            weights[key] = weight
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_are_not_all_there(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lacking = spoiled(folders["llama"], tmp_path / "lacking", model__norm__weight=None)
    refused(lacking, tokenizer, "lack `model.norm.weight`")
    small = spoiled(folders["llama"], tmp_path / "small", model__norm__weight=torch.ones(32))
    refused(small, tokenizer, r"`model.norm.weight` is \[32\] where config.json wants \[64\]")
    factors = {"model__layers__0__self_attn__q_proj__lora_A": torch.ones(4, 64)}
    refused(spoiled(folders["llama"], tmp_path / "factors", **factors), tokenizer, "low-rank factors")
    damaged = shutil.copytree(folders["llama"], tmp_path / "damaged")
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[:-100])
    refused(damaged, tokenizer, "damaged, or not a safetensors file")
    (damaged / "model.safetensors").unlink()
    refused(damaged, tokenizer, "has no model.safetensors")


def test_a_head_that_is_stored_apart_from_a_tied_embedding(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """transformers opens two weights where the files hold two values, so the file has two."""
    for family, head in (("llama-tied", "lm_head.weight"), ("gpt_neox-tied", "lm_head.weight")):
        weight = torch.randn(SIZE, 64)
        folder = spoiled(folders[family], tmp_path / family, **{head.replace(".", "__"): weight})
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight, weight)
        held = numbers(write_gguf(folder, tmp_path / f"{family}.gguf", tokenizer))
        assert torch.equal(held["output.weight"], weight)
    embedding = load_file(folders["llama-tied"] / "model.safetensors")["model.embed_tokens.weight"]
    same = spoiled(folders["llama-tied"], tmp_path / "same", lm_head__weight=embedding.clone())
    assert "output.weight" not in numbers(write_gguf(same, tmp_path / "same.gguf", tokenizer))


def test_weights_of_another_head(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The scores of a classifier, for example, are not dropped in silence; constants of old files are."""
    constants = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)}
    write_gguf(spoiled(folders["llama"], tmp_path / "old", **constants), tmp_path / "old.gguf", tokenizer)
    scores = spoiled(folders["llama-tied"], tmp_path / "scores", score__weight=torch.ones(3, 64))
    refused(scores, tokenizer, "holds `score.weight`, which is no part of a llama language model")


def test_end_tokens_of_the_generation_settings(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [0, 7]}))
    fields = gguf.GGUFReader(write_gguf(folder, tmp_path / "model.gguf", tokenizer)).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 7


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(float("nan"), "fp32"), (float("inf"), "bf16"), (7e4, "fp16"), (1e7, "q8_0"), (float("nan"), "q8_0")],
)
def test_numbers_that_the_dtype_cannot_hold(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, number: float, dtype: str
) -> None:
    weight = torch.ones(96, 64)
    weight[3, 5] = number
    folder = spoiled(folders["llama"], tmp_path / "model", model__layers__1__mlp__up_proj__weight=weight)
    refused(folder, tokenizer, f"blk.1.ffn_up.weight: .* {dtype}", dtype)


def test_a_file_that_is_there_stays(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("precious")
    with pytest.raises(UserError, match="exists and was left as it is"):
        write_gguf(folders["llama"], file, tokenizer)
    assert file.read_text() == "precious"
    with pytest.raises(UserError, match="`q4_k` is none of fp32, fp16, bf16, q8_0"):
        write_gguf(folders["llama"], tmp_path / "other.gguf", tokenizer, "q4_k")


def test_a_disk_that_is_full(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes of a file: beyond them a write fails
    try:
        with pytest.raises(RunStopped, match=r"model\.gguf: could not be written"):
            write_gguf(folders["llama"], tmp_path / "model.gguf", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_without_the_package(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'relora\[gguf\]'"):
        write_gguf(folders["llama"], tmp_path / "model.gguf", tokenizer)


def test_a_tokenizer_of_more_ids_than_the_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**{**WIDE, "vocab_size": 290})).save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", tokenizer, "id 297 but the model has 290")
