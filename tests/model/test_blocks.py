"""Decoder blocks: which modules they are, and that checkpointing and compiling change neither results nor modules."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tests.model.with_experts import BLOCKS, EXPERTS, with_experts
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GitConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from relora.errors import UserError
from relora.lowrank import LowRankConfig, inject, merge
from relora.lowrank.inject import low_rank_layers
from relora.measure import evaluating, token_loss
from relora.model import blocks as blocks_module
from relora.model.blocks import Checkpointing, decoder_blocks, training_blocks

ENDS = {"bos_token_id": 0, "eos_token_id": 0}
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2)
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LLAMA,
    "gpt_neox": GPTNeoXConfig(**SHAPE, intermediate_size=48, hidden_dropout=0.1, attention_dropout=0.1),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, **ENDS),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "falcon": FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True, attention_dropout=0.1, **ENDS),
}
"""GPT-2, GPT-NeoX, OPT and Falcon draw dropout; Falcon's blocks add in place to the result of a product."""
pytestmark = [  # torch's compiler, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]
Measured = tuple[Tensor, dict[str, Tensor]]


def build(settings: PreTrainedConfig = LLAMA) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).train()


def add_factors(model: nn.Module, dropout: float = 0.1, r: int = 4) -> None:
    """Inject factors with a B that is not zero, as in the middle of a cycle."""
    inject(model, LowRankConfig(r=r, lora_dropout=dropout))
    for layer in low_rank_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))


def measure(model: nn.Module, sequences: int = 2) -> Measured:
    """Loss and gradients of one micro-batch."""
    model.zero_grad()
    torch.manual_seed(3)
    ids = torch.randint(0, 64, (sequences, 16))
    loss, _ = token_loss(model, ids, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(one: Measured, other: Measured) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


def assert_close(one: Measured, other: Measured) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def warmed(model: nn.Module) -> nn.Module:
    """Run a first pass, in which results about the model are cached, and return the model."""
    measure(model)
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    """Number of compilations of blocks; trying the compiler is one more."""
    return counters["stats"]["unique_graphs"] - 1


@pytest.mark.parametrize("low_rank", [False, True], ids=["full rank", "low rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(family: str, low_rank: bool) -> None:
    """Dropout of the model and of the low-rank layer included."""
    model = build(FAMILIES[family])
    if low_rank:
        add_factors(model, r=1 if "moe" in family else 4)  # a gate has one output
    plain = measure(model)
    for kind in ("selective", "full"):
        with training_blocks(model, checkpointing=kind):
            assert_same_bits(measure(model), plain)
            assert_same_bits(measure(model), plain)  # nothing of one micro-batch is left for the next


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_under_autocast_too(kind: Checkpointing) -> None:
    model = build()
    add_factors(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = measure(model)
        with training_blocks(model, checkpointing=kind):
            assert_same_bits(measure(model), plain)


class Operations(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: torch._ops.OpOverload, _: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def operations(model: nn.Module) -> Counter[str]:
    """How often each operator ran in one forward and backward pass."""
    with Operations() as counted:
        measure(model)
    return counted.counts


def test_what_is_computed_again() -> None:
    """`selective` repeats no product and no attention; `full` repeats all of them except the last ones."""
    model = build()
    plain = operations(warmed(model))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    with training_blocks(model, checkpointing="selective"):
        selective = operations(model)
    with training_blocks(model, checkpointing="full"):
        full = operations(model)
    assert selective["mm"] == plain["mm"] < full["mm"]
    assert selective[attention] == plain[attention] == 3 and full[attention] == 6
    assert plain["silu"] == 3 and selective["silu"] == full["silu"] == 6


def test_a_product_of_weights_is_not_kept() -> None:
    """W + s B A has as many entries as W: kept for every layer it would be a second model."""
    tokens, addmm = 32, torch.ops.aten.addmm.default
    weight, factors, x = torch.zeros(24, 16), (torch.zeros(24, 4), torch.zeros(4, 16)), torch.zeros(tokens, 16)
    policy = blocks_module._selective_policy
    assert policy(tokens, None, addmm, weight, *factors) is blocks_module.CheckpointPolicy.PREFER_RECOMPUTE
    assert policy(tokens, None, torch.ops.aten.mm.default, x, weight.T) is blocks_module.CheckpointPolicy.MUST_SAVE


def test_attention_that_drops_within_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, attention draws dropout inside one operator; if its result were kept, later dropout would differ."""
    drops = torch.library.custom_op("tests::drops", _dropped, mutates_args=())
    drops.register_autograd(
        lambda ctx, grad: (2 * grad * (ctx.saved_tensors[0] != 0), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )
    monkeypatch.setattr(blocks_module, "_ATTENTION_PRODUCTS", {torch.ops.tests.drops.default})
    blocks = nn.ModuleList(Dropping() for _ in range(2))
    gradients = []
    for kind in ("none", "selective"):
        with training_blocks(blocks, checkpointing=kind):
            torch.manual_seed(0)
            x = torch.ones(4, 64, requires_grad=True)
            blocks[1](blocks[0](x)).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def _dropped(x: Tensor, dropout_p: float) -> Tensor:
    return nn.functional.dropout(x, dropout_p)


class Dropping(nn.Module):
    """A block with dropout in the attention and after it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.ops.tests.drops(x, 0.5).exp(), 0.5)


def test_evaluation_and_the_end_meet_plain_blocks() -> None:
    """Eval mode runs the block's own forward pass, and after the context no module has a replaced one."""
    model = build()
    names, attributes = list(model.state_dict()), [set(vars(module)) for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    ids = torch.arange(10).reshape(1, 10)
    with evaluating(model):
        logits = model(ids).logits
    with training_blocks(model, checkpointing="full", compiled=True, backend="eager"):
        assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
        with evaluating(model):
            assert torch.equal(model(ids).logits, logits)
            text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert text.shape[1] <= 13
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_the_blocks_are_put_back_after_an_error() -> None:
    model = build()
    with pytest.raises(ZeroDivisionError), training_blocks(model, checkpointing="full"):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_asked_for_nothing_nothing_is_touched() -> None:
    with training_blocks(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("asked", [{"compiled": True}, {"checkpointing": "selective"}])
def test_a_model_without_blocks_is_refused(asked: dict[str, bool | Checkpointing]) -> None:
    with pytest.raises(UserError, match="no repeated blocks"):
        training_blocks(nn.Sequential(nn.Linear(2, 2)), **asked)


# Which modules are the blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_structure(family: str) -> None:
    found = decoder_blocks(build(FAMILIES[family]))
    assert len(found) == 3 and all(
        "Layer" in type(block).__name__ or "Block" in type(block).__name__ for block in found
    )


def test_checkpointing_and_injection_agree_on_the_blocks_of_a_mixture_of_experts() -> None:
    """There are more experts in a block than blocks, so the longest list of modules is the experts of one block."""
    model = with_experts()
    assert EXPERTS > BLOCKS
    layers = list(model.model.layers)
    assert decoder_blocks(model) == layers
    with training_blocks(model, checkpointing="full"):
        assert [module for module in model.modules() if "forward" in vars(module)] == layers
    linear = {f"model.layers.{n}.{name}" for n, block in enumerate(layers) for name in linear_layers(block)}
    assert len(linear) == BLOCKS * (4 + 3 * EXPERTS)
    assert inject(model, LowRankConfig(r=2)).targets.keys() == linear
    assert decoder_blocks(model) == layers  # factors do not change the answer


def linear_layers(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def image_and_text() -> PreTrainedModel:
    """GIT with an image tower that is longer and larger than the decoder."""
    vision = {"hidden_size": 64, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    text = {**SHAPE, "num_hidden_layers": 2, "intermediate_size": 48}
    return build(GitConfig(**text, **ENDS, vision_config={**vision, "intermediate_size": 96}))


def test_an_image_tower_larger_than_the_decoder_does_not_count() -> None:
    model = image_and_text()
    assert decoder_blocks(model) == list(model.git.encoder.layer)
    kept = []
    for kind in ("none", "full"):
        saved: list[Tensor] = []
        with (
            training_blocks(model, checkpointing=kind),
            torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor),
        ):
            model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False)
        kept.append(sum(tensor.numel() for tensor in saved))
    assert kept[1] < kept[0]


def test_other_lists_beside_the_blocks_do_not_count() -> None:
    model = nn.Module()
    model.adapters = nn.ModuleList(nn.Linear(8, 2) for _ in range(6))
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for _ in range(2))
    model.rotations = nn.ModuleList(nn.Identity() for _ in range(9))
    assert decoder_blocks(model) == list(model.blocks)


def test_blocks_that_are_lists_of_sublayers_are_taken_apart() -> None:
    """Only modules with a forward pass can be checkpointed or compiled."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleList([nn.Linear(8, 8), nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})])
        for _ in range(2)
    )
    expected = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(expected) == 6
    assert decoder_blocks(model) == expected
    with training_blocks(model, checkpointing="full"):
        assert all("forward" in vars(module) for module in expected)


def test_a_model_without_lists_has_no_blocks() -> None:
    assert decoder_blocks(nn.Sequential(nn.Linear(2, 2))) == []


# Compilation


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_compilation_a_phase(kind: Checkpointing) -> None:
    """Blocks, restarts, evaluations and a return to the full-rank phase cause no further compilation."""
    model = build()
    factors = build()
    add_factors(factors, dropout=0.0)
    with training_blocks(model, checkpointing=kind, compiled=True, backend="aot_eager"):
        full_rank = [measure(model) for _ in range(2)][-1]
        assert compilations() == 1
        with evaluating(model):
            model(torch.zeros(1, 7, dtype=torch.long))
        add_factors(model, dropout=0.0)
        low_rank = [measure(model) for _ in range(2)][-1]
        assert compilations() == 2
        for cycle in range(1, 4):
            for layer in low_rank_layers(model).values():
                layer.merge_()
                layer.redraw_(cycle)
            measure(model)
        merge(model)
        measure(model)
        assert compilations() == 2
    assert not counters["graph_break"]
    assert_close(full_rank, measure(build()))
    assert_close(low_rank, measure(factors))


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_that_read_their_own_number_stay_below_the_limit() -> None:
    settings = GPT2Config(
        n_embd=8, n_layer=5, n_head=2, vocab_size=64, n_positions=32, scale_attn_by_inverse_layer_idx=True, **ENDS
    )
    model = build(settings)
    with training_blocks(model, compiled=True, backend="eager"):
        measure(model)
        add_factors(model)
        measure(model)
    assert compilations() == 10 and not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_the_real_compiler_gives_the_same_to_a_few_digits() -> None:
    model = build()
    add_factors(model, dropout=0.0)
    plain = measure(model)
    with training_blocks(model, checkpointing="selective", compiled=True):
        compiled = measure(model)
        assert_same_bits(measure(model), compiled)  # a run that is continued meets the same bits
    assert_close(compiled, plain)
    assert compilations() == 1


class ScaledProduct(torch.autograd.Function):
    """A function like the low-rank layer's kernel: it saves x, refers to weights and forms W + s B A twice."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return (x.flatten(0, -2) @ torch.addmm(weight, b, a, alpha=0.5).T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, weight, a, b = ctx.saved_tensors
        dense = 0.5 * grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad @ torch.addmm(weight, b, a, alpha=0.5), None, b.T @ dense, dense @ a.T


class Kernelled(nn.Module):
    """A residual block around `ScaledProduct`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(4, 16) / 4), nn.Parameter(torch.randn(16, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(ScaledProduct.apply(self.norm(x), self.weight, self.a, self.b))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_custom_function_in_the_block_goes_along(kind: Checkpointing, compiled: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Kernelled(), Kernelled()])

    def gradients() -> Measured:
        model.zero_grad()
        x = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16).requires_grad_()
        y = x
        for block in model:
            y = block(y)
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with training_blocks(model, checkpointing=kind, compiled=compiled, backend="aot_eager"):
        (assert_close if compiled else assert_same_bits)(gradients(), plain)
    assert not counters["graph_break"]


def test_a_machine_that_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"compile: needs a C\+\+ compiler .*set `compile: false`") as caught:
        training_blocks(build(), compiled=True)
    assert "\n" not in str(caught.value)
