"""LLaMA-Adapter agrees with PEFT and with its formula, with and without a cache, and can be removed."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from relora.adapters.llama_adapter import add_prompts, load_prompts, prompt_tensors, remove_prompts, save_prompts
from relora.errors import RunStopped, UserError
from relora.lowrank import exact_tensors, load_exact_tensors
from relora.measure import token_loss
from relora.model.blocks import training_blocks
from relora.train.step import dead_tensors

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
GROUPED = {**SHAPE, **ENDS, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**GROUPED)
MISTRAL = MistralConfig(**GROUPED)
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LLAMA,
    "llama, biases and heads of another size": LlamaConfig(**GROUPED, head_dim=6, attention_bias=True),
    "mistral, sliding": MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=6),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "phi3": Phi3Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SHAPE, **ENDS),
}
IDS = torch.arange(20).view(2, 10) * 3


def build(settings: PreTrainedConfig = LLAMA, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model whose random weights and biases are so large that attention is far from uniform."""
    torch.manual_seed(0)
    settings = copy.deepcopy(settings)  # a model keeps the object it is given, and writes its dtype there
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float64).normal_(std=0.3))
    return model


def open_gates(model: nn.Module) -> None:
    """Set all gates to values other than zero, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in prompt_tensors(model).items():
        if name.endswith("gate"):
            nn.init.normal_(tensor, generator=generator)


def adapted(settings: PreTrainedConfig = LLAMA, *, layers: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    model = build(settings, dtype)
    add_prompts(model, length=4, layers=layers, seed=0)
    open_gates(model)
    return model


def logits(model: nn.Module, ids: Tensor = IDS, **settings: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **settings).logits


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return request.param


# The function


def test_at_the_start_the_function_is_the_models_to_the_bit(family: PreTrainedConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family, dtype)
        before, names = logits(model), list(model.state_dict())
        report = add_prompts(model, length=4, layers=2, seed=0)
        assert torch.equal(logits(model), before)
        assert [name for name in model.state_dict() if "adaption_" not in name] == names  # weights keep their names
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        kinds = ("adaption_prompt", "adaption_gate")
        assert trained == [f"{layer}.{kind}" for layer in report.layers for kind in kinds]
        assert list(prompt_tensors(model)) == trained and len(report.layers) == 2
        assert {tensor.dtype for tensor in prompt_tensors(model).values()} == {torch.float32}
        assert report.trainable == 2 * (4 * 32 + 1)
        assert report.trainable + report.frozen == sum(p.numel() for p in model.parameters())


def heads(x: Tensor, size: int) -> Tensor:
    """[batch, length, heads · size] -> [batch, heads, length, size]."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def by_hand(attention: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """g · softmax(q k_Pᵀ/√d) v_P [batch, length, heads · size] of what enters the layer."""
    prompt, gate = attention.adaption_prompt, attention.adaption_gate
    if hasattr(attention, "query_key_value"):
        size = attention.head_size
        query, _, _ = heads(attention.query_key_value(x), 3 * size).chunk(3, dim=-1)
        _, keys, values = heads(attention.query_key_value(prompt), 3 * size).chunk(3, dim=-1)
    elif hasattr(attention, "qkv_proj"):
        size, groups = attention.head_dim, attention.num_key_value_heads
        sizes = [size * attention.config.num_attention_heads, size * groups, size * groups]
        query = heads(attention.qkv_proj(x).split(sizes, dim=-1)[0], size)
        keys, values = (heads(part, size) for part in attention.qkv_proj(prompt).split(sizes, dim=-1)[1:])
    else:
        size = attention.head_dim
        query, keys = heads(attention.q_proj(x), size), heads(attention.k_proj(prompt), size)
        values = heads(attention.v_proj(prompt), size)
        if hasattr(attention, "q_norm"):
            query, keys = attention.q_norm(query), attention.k_norm(keys)
    query, _ = sys.modules[type(attention).__module__].apply_rotary_pos_emb(query, query, *rotation)
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    weights = (query @ keys.mT / size**0.5).softmax(-1)
    return (gate * weights @ values).transpose(1, 2).flatten(2)


def test_what_is_added_is_the_formula(family: PreTrainedConfig) -> None:
    """The difference that prompts make to the input of the output projection is that of the formula."""
    model = adapted(family, layers=1)
    attention = model.get_submodule(next(iter(prompt_tensors(model))).rpartition(".")[0])
    out = attention.dense if hasattr(attention, "dense") else attention.o_proj
    seen: list[Tensor] = []
    entering: dict[str, Any] = {}

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        entering.update(named, x=named.get("hidden_states", *arguments))

    with (
        out.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])),
        attention.register_forward_pre_hook(keep, with_kwargs=True),
        torch.no_grad(),
    ):
        model(input_ids=IDS)
        added = by_hand(attention, entering["x"], entering["position_embeddings"])
        attention.adaption_gate.zero_()
        model(input_ids=IDS)
    assert added.abs().max() > 0.1
    torch.testing.assert_close(seen[0] - seen[1], added, rtol=1e-9, atol=1e-12)


def test_gates_have_a_gradient_at_once_and_prompts_from_the_second_step_on() -> None:
    model = build().train()
    add_prompts(model, length=4, layers=2, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(2):
        token_loss(model, IDS, IDS)[0].backward()
        assert dead_tensors(model) == []
        for name, parameter in model.named_parameters():
            if "adaption_" not in name:
                assert parameter.grad is None
            else:
                assert parameter.grad.abs().max() > 0 or (step == 0 and name.endswith("prompt")), name
        optimizer.step()
        optimizer.zero_grad()
    assert len(dead_tensors(model)) == 4  # gates are open, so no gradient is no longer excused


def test_training_learns() -> None:
    """The frozen model's loss on one batch, halved by prompts alone."""
    model = build(dtype=torch.float32).train()
    add_prompts(model, length=10, layers=30, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[5, 9] * 6])
    losses = []
    for _ in range(60):
        loss, tokens = token_loss(model, ids[:, :-1], ids[:, 1:])
        losses.append(loss.item() / int(tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


# In company


def test_packed_examples_are_what_they_are_alone(family: PreTrainedConfig) -> None:
    model = adapted(family)
    positions = torch.tensor([[*range(4), *range(6)]])
    packed = logits(model, IDS[:1], position_ids=positions, use_cache=False)
    apart = torch.cat([logits(model, IDS[:1, :4]), logits(model, IDS[:1, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


def test_generation_is_the_same_with_a_cache_without_and_beside_a_longer_prompt(family: PreTrainedConfig) -> None:
    model = adapted(family)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, use_cache=False, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(model.generate(IDS, use_cache=True, attention_mask=torch.ones_like(IDS), **settings), plain)
    short = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[1:, 3:]], dim=1)
    batch, mask = torch.cat([IDS[:1], short]), torch.ones_like(IDS)
    mask[1, :3] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(together[0], plain[0])
    alone = model.generate(IDS[1:, 3:], attention_mask=mask[1:, 3:], **settings)
    assert torch.equal(together[1, 3:], alone[0])
    adapted_words = plain[:, 10:].clone()
    remove_prompts(model)
    without = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert not torch.equal(without[:, 10:], adapted_words)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    token_loss(model, IDS, IDS)[0].backward()
    return {name: tensor.grad.clone() for name, tensor in prompt_tensors(model).items() if tensor.grad is not None}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_bit(family: PreTrainedConfig, kind: Any) -> None:
    model = adapted(family, dtype=torch.float32).train()
    plain = gradients(model)
    with training_blocks(model, checkpointing=kind):
        again = gradients(model)
    assert len(plain) == 4 and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_blocks_with_and_without_prompts_are_told_apart() -> None:
    model = adapted(layers=1, dtype=torch.float32).train()
    plain = gradients(model)
    with training_blocks(model, compiled=True, backend="eager"):
        compiled = gradients(model)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    remove_prompts(model)
    before = logits(model.train())
    with training_blocks(model, compiled=True, backend="eager"):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_bf16_and_autocast_stay_near_fp32(family: PreTrainedConfig) -> None:
    exact = adapted(family, dtype=torch.float32)
    near = copy.deepcopy(exact)
    with torch.autocast("cpu", torch.bfloat16):
        token_loss(near, IDS, IDS)[0].backward()
    token_loss(exact, IDS, IDS)[0].backward()
    for (name, tensor), other in zip(prompt_tensors(near).items(), prompt_tensors(exact).values(), strict=True):
        assert tensor.grad is not None and other.grad is not None and tensor.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(tensor.grad.flatten(), other.grad.flatten(), dim=0) > 0.9, name
    low = adapted(family, dtype=torch.bfloat16)
    assert logits(low).dtype == torch.bfloat16
    assert (logits(low).float() - logits(exact)).norm() < 0.1 * logits(exact).norm()


def test_a_copy_stands_alone() -> None:
    model = adapted()
    before = logits(model)
    other = copy.deepcopy(model)
    remove_prompts(other)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


def test_what_a_checkpoint_holds_goes_round() -> None:
    model = adapted()
    saved = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    assert set(prompt_tensors(model)) <= set(saved)
    other = build()
    add_prompts(other, length=4, layers=2, seed=9)
    load_exact_tensors(other, saved)
    assert torch.equal(logits(other), logits(model))


# Adding and removing


def test_draws_depend_on_the_seed_and_the_layer_alone() -> None:
    def prompts(seed: int, layers: int = 2) -> list[Tensor]:
        model = build()
        add_prompts(model, length=4, layers=layers, seed=seed)
        return [tensor for name, tensor in prompt_tensors(model).items() if name.endswith("prompt")]

    first = prompts(5)
    torch.rand(3)
    stream = torch.get_rng_state()
    again = [tensor.clone() for tensor in prompts(5, layers=3)[1:]]
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], prompts(6)[0])
    torch.manual_seed(0)
    model = build()
    stream = torch.get_rng_state()
    add_prompts(model, length=400, layers=3, seed=0)
    assert torch.equal(torch.get_rng_state(), stream)
    many = prompt_tensors(model)["model.layers.0.self_attn.adaption_prompt"]
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_the_report_says_what_was_cut() -> None:
    report = add_prompts(build(), length=4, layers=30, seed=0)
    assert report.layers == tuple(f"model.layers.{number}.self_attn" for number in range(3))
    assert "upper 3 layers, which is all (30 were asked for); 387 parameters train" in str(report)
    assert "upper 2 layers; 258 parameters train" in str(add_prompts(build(), length=4, layers=2, seed=0))


def test_removing_gives_the_plain_model_back_bit_for_bit(family: PreTrainedConfig) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = logits(model)
    add_prompts(model, length=4, layers=2, seed=0)
    open_gates(model)
    assert not torch.equal(logits(model), output)
    remove_prompts(model)
    assert torch.equal(logits(model), output)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(getattr(module, "config", model.config) is model.config for module in model.modules())
    with pytest.raises(UserError, match="no prompts"):
        remove_prompts(model)


def test_what_cannot_take_prompts_says_so_and_is_left_alone() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, **ENDS))
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(LLAMA), attn_implementation="eager")
    twice = adapted()
    for model, message in (
        (gpt2, "not gpt2; `method: lora`"),
        (eager, "sdpa, not eager"),
        (twice, "already; remove them first"),
    ):
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with pytest.raises(UserError, match=message):
            add_prompts(model, seed=0)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    for length, layers, message in ((0, 3, r"prompts.length \(0\)"), (3, 0, r"prompts.layers \(0\)")):
        with pytest.raises(UserError, match=message):
            add_prompts(build(), length=length, layers=layers, seed=0)


# Folders


def test_saved_prompts_come_back_bit_for_bit(family: PreTrainedConfig, tmp_path: Path) -> None:
    model = adapted(family, dtype=torch.float32)
    folder = save_prompts(model, tmp_path / "new" / "adapter", base="some/model")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    other = build(family, torch.float32)
    report = load_prompts(other, folder)
    assert report.length == 4 and len(report.layers) == report.asked_layers == 2
    assert torch.equal(logits(other), logits(model))
    frozen = [name for name, parameter in other.named_parameters() if not parameter.requires_grad]
    assert frozen and not any("adaption_" in name for name in frozen)


def test_nothing_is_overwritten_and_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    model = adapted()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists"):
        save_prompts(model, tmp_path / "there", base=None)
    with pytest.raises(UserError, match="no prompts"):
        save_prompts(build(), tmp_path / "none", base=None)
    with pytest.raises(UserError, match="there: exists"):  # no adapter, so not even then
        save_prompts(model, tmp_path / "there", base=None, overwrite=True)
    (tmp_path / ".blocked.partial").touch()  # in the way of the new folder
    with pytest.raises(RunStopped, match="could not be written"):
        save_prompts(model, tmp_path / "blocked", base=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".blocked.partial", "there"]


def test_an_adapter_is_replaced_if_asked_for(tmp_path: Path) -> None:
    for base in ("first", "second"):
        save_prompts(adapted(), tmp_path / "adapter", base=base, overwrite=True)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def changed(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


GATE = "base_model.model.model.layers.2.self_attn.adaption_gate"
PROMPT = "base_model.model.model.layers.2.self_attn.adaption_prompt"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
    "not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "`peft_type` is None"),
    "another method": (changed("peft_type", "LORA"), "`peft_type` is 'LORA'; that of LLaMA-Adapter is"),
    "a length in words": (changed("adapter_len", "ten"), "`adapter_len` is 'ten'"),
    "a true length": (changed("adapter_len", True), "`adapter_len` is True"),
    "no layers": (changed("adapter_layers", 0), "`adapter_layers` is 0"),
    "too many layers": (changed("adapter_layers", 9), "prompts for 9 layers, the model has 3"),
    "other modules": (changed("target_modules", ["q_proj"]), r"prompts of \['q_proj'\]"),
    "another length": (changed("adapter_len", 5), r"\[1, 4, 32\] where this model takes \[1, 5, 32\]"),
    "fewer layers": (changed("adapter_layers", 1), "layers.1.self_attn.adaption_gate` is none of this model's prompts"),
    "a tensor missing": (rewritten(lambda tensors: tensors.pop(GATE)), "layers.2.self_attn.adaption_gate` is not in"),
    "not finite": (rewritten(lambda tensors: tensors[PROMPT][0, 0].fill_(torch.nan)), "other than finite numbers"),
    "integers": (rewritten(lambda tensors: tensors.update({GATE: torch.ones(1, dtype=torch.long)})), "finite numbers"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x40" + bytes(9)), "damaged"),
    "a link out": (
        lambda folder: (
            (folder / "adapter_model.safetensors").rename(folder.parent / "out")
            and (folder / "adapter_model.safetensors").symlink_to(folder.parent / "out")
        ),
        "leads out",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_folder_is_refused_in_one_line_and_nothing_is_changed(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = save_prompts(adapted(), tmp_path / "adapter", base=None)
    damage(folder)
    model = build()
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(model, folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not prompt_tensors(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_prompts_of_a_wider_model_are_refused(tmp_path: Path) -> None:
    folder = save_prompts(adapted(LlamaConfig(**{**GROUPED, "hidden_size": 64})), tmp_path / "adapter", base=None)
    with pytest.raises(UserError, match=r"\[1, 4, 64\] where this model takes \[1, 4, 32\]; was it trained on another"):
        load_prompts(build(), folder)


def test_prompts_are_not_put_on_top_of_prompts(tmp_path: Path) -> None:
    model = adapted()
    folder = save_prompts(model, tmp_path / "adapter", base=None)
    before = logits(model)
    with pytest.raises(UserError, match="already"):
        load_prompts(model, folder)
    assert torch.equal(logits(model), before)


# PEFT


PEFTS = pytest.mark.parametrize("settings", [LLAMA, MISTRAL], ids=["llama", "mistral"])


def peft_model(settings: PreTrainedConfig) -> Any:
    peft = pytest.importorskip("peft")
    wanted = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    model = peft.get_peft_model(build(settings), wanted)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "adaption_" in name:
            nn.init.normal_(parameter, generator=generator)
    return model


@PEFTS
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks transformers
def test_pefts_prompts_load_and_do_the_same(settings: PreTrainedConfig, tmp_path: Path) -> None:
    """Values and gradients; PEFT takes the softmax in fp32 whatever the model's dtype, hence the tolerance."""
    theirs = peft_model(settings)
    theirs.save_pretrained(tmp_path)
    ours = build(settings)
    load_prompts(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    token_loss(ours, IDS, IDS)[0].backward()
    token_loss(theirs, IDS, IDS)[0].backward()
    gradient = {name: parameter.grad for name, parameter in theirs.named_parameters() if "adaption_" in name}
    assert len(gradient) == 4
    for name, tensor in prompt_tensors(ours).items():
        torch.testing.assert_close(tensor.grad, gradient[f"base_model.model.{name}"], rtol=1e-4, atol=1e-5)


@PEFTS
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks transformers
def test_peft_loads_our_prompts_and_does_the_same(settings: PreTrainedConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(settings)
    folder = save_prompts(ours, tmp_path / "adapter", base="some/model")
    theirs = peft.PeftModel.from_pretrained(build(settings), folder)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    stored = load_file(folder / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in stored)
