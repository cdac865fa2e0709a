"""A simulated step takes as many bytes as a real one, tensor by tensor, and calls them by the right names."""

import copy
from collections.abc import Callable

import pytest
import torch
from tests.model.with_experts import with_experts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DbrxConfig, MixtralConfig, PreTrainedConfig

from relora.lowrank import LowRankConfig, inject, low_rank_layers
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates
from relora.measure import token_loss
from relora.model.blocks import Checkpointing, training_blocks
from relora.model.head import whole_logits_reason
from relora.model.load import build_model
from relora.planning.ledger import Ledger
from relora.planning.step import StepFigures, StepShape, simulate

CPU = torch.device("cpu")
RATES = Rates(fp32=((1, 1e9), (64, 1e11)), bf16=2e11, int8=4e11, bandwidth=1e10)
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def shape(micro_sequences: int = 2, micro_batches: int = 1) -> StepShape:
    return StepShape(
        micro_sequences=micro_sequences, sequence_length=24, micro_batches=micro_batches, device=CPU, rates=RATES
    )


def passing(checkpointing: Checkpointing) -> Callable[[nn.Module, Tensor], None]:
    def run(model: nn.Module, ids: Tensor) -> None:
        with training_blocks(model, checkpointing=checkpointing):
            loss, tokens = token_loss(model, ids, ids)
            torch.autograd.backward(loss / tokens)

    return run


def preparing(low_rank: LowRankConfig | None) -> Callable[[nn.Module], object]:
    return lambda model: inject(model, low_rank) if low_rank else None


def two_moments(parameter: nn.Parameter) -> list[Tensor]:
    return [torch.zeros_like(parameter.data), torch.zeros_like(parameter.data)]


def simulated(
    low_rank: LowRankConfig | None, checkpointing: Checkpointing = "none", of: StepShape | None = None, **overrides: int
) -> StepFigures:
    with torch.device("meta"):
        model = build_model("llama-9m", TINY | overrides, seed=0)
    residual = low_rank.residual if low_rank else None
    prepare = preparing(low_rank)
    return simulate(
        model, of or shape(), passing(checkpointing), prepare=prepare, moments=two_moments, residual=residual
    )


def low_rank_config(**settings: object) -> LowRankConfig:
    return LowRankConfig(r=4, rates=RATES, **settings)  # type: ignore[arg-type]


def real_peak(
    low_rank: LowRankConfig | None,
    checkpointing: Checkpointing,
    of: StepShape,
    build: Callable[[], nn.Module] = lambda: build_model("llama-9m", TINY, seed=0),
) -> int:
    """Return the peak bytes of tensors in real passes of a real model, weights and moments included."""
    model = build()
    preparing(low_rank)(model)
    model.train()
    ledger = Ledger(CPU, RATES)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    for layer in low_rank_layers(model).values():
        if layer.base.master is not None:
            ledger.note(layer.base.master)
    moments = [
        moment for parameter in model.parameters() if parameter.requires_grad for moment in two_moments(parameter)
    ]
    for moment in moments:
        ledger.note(moment)
    if low_rank and low_rank.residual.scale:
        for layer in low_rank_layers(model).values():
            layer.weight.requires_grad_(True)
    ids = torch.zeros(of.micro_sequences, of.sequence_length, dtype=torch.long)
    ledger.note(ids)
    run = passing(checkpointing)
    whole_logits_reason(model)
    with ledger:
        for _ in range(of.micro_batches):
            run(model, ids)
    return ledger.peak.total()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "low_rank",
    [
        None,
        low_rank_config(),
        low_rank_config(base="bf16"),
        low_rank_config(base="int8", frozen="int8"),
        low_rank_config(frozen="bf16"),
        low_rank_config(residual=Residual(scale=1.0)),
    ],
    ids=["full", "fp32", "bf16-base", "int8-base", "bf16-products", "residual"],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_takes_what_it_takes_for_real(
    low_rank: LowRankConfig | None, checkpointing: Checkpointing, micro_batches: int
) -> None:
    of = shape(micro_batches=micro_batches)
    assert simulated(low_rank, checkpointing, of).peak == pytest.approx(
        real_peak(low_rank, checkpointing, of), rel=2e-3
    )


@pytest.mark.parametrize("low_rank", [None, low_rank_config(), low_rank_config(trainable_scaling=True)])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(low_rank: LowRankConfig | None, tied: bool) -> None:
    figures = simulated(low_rank, tie_word_embeddings=tied)
    model = build_model("llama-9m", TINY | {"tie_word_embeddings": tied}, seed=0)
    preparing(low_rank)(model)
    factors = sum(factor.numel() for layer in low_rank_layers(model).values() for factor in layer.factors.values())
    assert figures.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert figures.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert figures.factors == factors
    kept = figures.memory["weights"] + figures.memory.get("factors", 0)
    assert kept == 4 * figures.trained and figures.memory["moments"] == 8 * figures.trained


@pytest.mark.parametrize(("base", "bytes_each"), [("fp32", 4), ("bf16", 2 + 4), ("int8", 1 + 4)])
def test_a_base_takes_its_bytes_and_its_master(base: str, bytes_each: int) -> None:
    figures = simulated(low_rank_config(base=base))
    scales = 4 * sum(out for out in (32, 32, 32, 32, 48, 48, 32)) * TINY["num_hidden_layers"] if base == "int8" else 0
    assert figures.memory["frozen weights"] == bytes_each * figures.frozen + scales


def test_checkpointing_keeps_less_and_takes_longer() -> None:
    none, selective, full = (simulated(None, kind, shape(8)) for kind in ("none", "selective", "full"))
    assert full.memory["activations"] < selective.memory["activations"] < none.memory["activations"]
    assert full.seconds > selective.seconds > none.seconds


def test_a_restart_takes_no_more_than_one_layer_in_addition() -> None:
    figures = simulated(low_rank_config())
    largest = 4 * 32 * 48
    assert largest <= figures.restart - figures.resident <= 2 * largest


def test_a_snapshot_is_all_that_a_checkpoint_holds() -> None:
    figures = simulated(low_rank_config())
    assert figures.snapshot == pytest.approx(4 * (3 * figures.trained + figures.frozen), rel=0.01)  # and the buffers


def test_a_residual_takes_one_more_gradient_a_weight_and_no_moments() -> None:
    """The time is the mean over steps with and without gradients of frozen weights, which take one more product."""
    plain, always, seldom = (
        simulated(low_rank_config(residual=residual), of=shape(64), hidden_size=512, intermediate_size=1024)
        for residual in (Residual(), Residual(scale=1.0), Residual(scale=1.0, every_steps=5))
    )
    for name in ("trained", "frozen", "factors", "resident", "snapshot"):
        assert getattr(plain, name) == getattr(always, name) == getattr(seldom, name)
    assert seldom.memory == always.memory and always.memory["moments"] == plain.memory["moments"]
    assert always.memory["gradients"] - plain.memory.get("gradients", 0) <= 4 * plain.frozen
    two_parts = shape(64, micro_batches=2)  # all gradients of the first are in memory during the second
    plain_two, always_two = (
        simulated(low_rank_config(residual=residual), of=two_parts, hidden_size=512, intermediate_size=1024)
        for residual in (Residual(), Residual(scale=1.0))
    )
    assert always_two.memory["gradients"] - plain_two.memory["gradients"] == 4 * plain.frozen
    assert 1.2 * plain.seconds < always.seconds < 1.6 * plain.seconds  # 1.5 times the products of the layers
    assert seldom.seconds - plain.seconds == pytest.approx((always.seconds - plain.seconds) / 5)


def test_time_is_that_of_the_micro_batches() -> None:
    one, four = (simulated(None, of=shape(micro_batches=n)).seconds for n in (1, 4))
    assert 2 < four / one < 4  # there is one update in both


def simulated_experts(checkpointing: Checkpointing, *, low_rank: bool, in_list: bool) -> StepFigures:
    """Figures of a model whose longest list is not its blocks but, with `in_list`, the experts of a block."""
    with torch.device("meta"):
        model = with_experts(in_list=in_list)
    prepare = preparing(low_rank_config() if low_rank else None)
    return simulate(model, shape(), passing(checkpointing), prepare=prepare, moments=two_moments)


@pytest.mark.parametrize("low_rank", [False, True], ids=["full rank", "low rank"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_experts_in_a_list_are_no_blocks(checkpointing: Checkpointing, low_rank: bool) -> None:
    """The plan is that of the same model whose experts are kept in something other than a list."""
    in_list = simulated_experts(checkpointing, low_rank=low_rank, in_list=True)
    named = simulated_experts(checkpointing, low_rank=low_rank, in_list=False)
    assert in_list == named


EXPERTS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_size": 32}


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(vocab_size=96, num_hidden_layers=2, num_local_experts=4, **EXPERTS),
        DbrxConfig(
            vocab_size=96,
            d_model=32,
            n_layers=2,
            n_heads=2,
            max_seq_len=64,
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ),
    ],
    ids=["grouped products", "masks"],
)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_mixture_of_experts_is_planned(config: PreTrainedConfig, checkpointing: Checkpointing) -> None:
    """Grouped products take any dtype; experts that are chosen by masks are planned as if each got all tokens."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    low_rank = low_rank_config()
    figures = simulate(model, shape(), passing(checkpointing), prepare=preparing(low_rank), moments=two_moments)
    assert figures.seconds > 0
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    report = inject(model, low_rank)
    assert (figures.trained, figures.frozen, figures.factors) == (report.trainable, report.frozen, report.low_rank)
    real = real_peak(low_rank, checkpointing, shape(), lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    assert 0.99 * real < figures.peak < (1.02 if config.model_type == "mixtral" else 2.5) * real


def test_activations_of_all_blocks_are_called_activations() -> None:
    """Each of the 8 experts of each of the 3 blocks keeps at least its two products, of width 48."""
    memory = simulated_experts("none", low_rank=False, in_list=True).memory
    assert memory["activations"] > 3 * 8 * 2 * (4 * 2 * 24 * 48)
