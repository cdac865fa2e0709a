"""Initial factors whose product is subtracted from the weight: the function stays the same, the update measurable."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relora.errors import NonFinite, UserError
from relora.lowrank import (
    LowRankConfig,
    LowRankLinear,
    exact_tensors,
    inject,
    load_exact_tensors,
    low_rank_layers,
    merge,
    restart,
    strip,
)
from relora.lowrank.gradient_init import gradient_svd_, update_factors, weight_gradients

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
IDS = torch.arange(24).view(2, 12)
FROM_WEIGHT = ["pissa", "gradient-svd"]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, **SPECIAL, intermediate_size=48)).double().eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**shape, **SPECIAL)).double().eval()


def loss(ids: Tensor, model: nn.Module) -> Tensor:
    return model(ids, labels=ids).loss


BATCHES = [partial(loss, IDS), partial(loss, IDS.flip(0) + 7)]


def injected(model: nn.Module, init: str, **config: object) -> nn.Module:
    """Inject layers with an initialization from the weight or its gradient."""
    inject(model, LowRankConfig(**{"r": 4, "lora_alpha": 8.0, "init": init, "rest": "frozen", **config}))
    if init == "gradient-svd":
        gradient_svd_(model, weight_gradients(model, BATCHES))
    return model


def trained(model: nn.Module) -> nn.Module:
    """Change all factors at random, in the place of training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            for factor in layer.factors.values():
                factor.add_(0.02 * torch.randn_like(factor))
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_function_does_not_change_and_both_factors_have_gradients(
    build: Callable[[], PreTrainedModel], init: str, dora: bool
) -> None:
    before = build()(IDS).logits
    model = injected(build(), init, dora=dora)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-10, atol=1e-10)
    loss(IDS, model).backward()
    for layer in low_rank_layers(model).values():
        assert layer.delta().norm() > 0.01
        assert all(factor.grad.any() for factor in layer.factors.values())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_equals_pefts(kind: str) -> None:
    """The same product of factors and the same residual to 1e-5, in fp32, the only dtype that both support."""
    torch.manual_seed(0)
    models = [nn.Sequential(Conv1D(24, 32) if kind == "conv1d" else nn.Linear(32, 24)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inject(models[0], LowRankConfig(r=5, lora_alpha=7, init="pissa"))
    peft = LoraConfig(
        r=5, lora_alpha=7, target_modules=["0"], init_lora_weights="pissa", fan_in_fan_out=kind == "conv1d"
    )
    twin = get_peft_model(models[1], peft).base_model.model[0]
    ours = low_rank_layers(models[0])["0"]
    torch.testing.assert_close(ours.weight, twin.base_layer.weight, rtol=1e-5, atol=1e-6)
    product = twin.lora_B["default"].weight @ twin.lora_A["default"].weight
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, product, rtol=1e-5, atol=1e-6)


def test_weight_gradients_equal_autograds() -> None:
    """Mean over the batches, [out, in] also for GPT-2's layers; the model does not change."""
    for build in (llama, gpt2):
        plain, model = build(), build()
        sum(batch(plain) for batch in BATCHES).div(2).backward()
        inject(model, LowRankConfig(r=4, init="gradient-svd", rest="frozen"))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = weight_gradients(model, iter(BATCHES))
        assert gradients.keys() == low_rank_layers(model).keys()
        for name, gradient in gradients.items():
            twin = plain.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(gradient, twin.T if build is gpt2 else twin, rtol=1e-9, atol=1e-12)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        loss(IDS, model).backward()  # a hook that was left would change the gradients below
        assert all(
            torch.equal(gradient, again)
            for gradient, again in zip(gradients.values(), weight_gradients(model, BATCHES).values(), strict=True)
        )


def test_the_gradient_of_a_layer_used_twice_is_the_sum() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    model, x = nn.ModuleDict({"a": layer}), torch.randn(5, 8, dtype=torch.float64)

    def twice(model: nn.Module) -> Tensor:
        return model["a"](torch.tanh(model["a"](x))).square().mean()

    expected = torch.autograd.grad(twice(model), layer.weight)[0]
    inject(model, LowRankConfig(r=2, init="gradient-svd"))
    torch.testing.assert_close(weight_gradients(model, [twice])["a"], expected, rtol=1e-10, atol=1e-12)


def test_the_first_step_follows_the_gradient_in_2_r_directions() -> None:
    """Theorem 3.1 of the paper: the first step of both factors is the best approximation of dW that they can make."""
    model = llama()
    inject(model, LowRankConfig(r=4, lora_alpha=8.0, init="gradient-svd", rest="frozen"))
    gradients = weight_gradients(model, BATCHES[:1])
    gradient_svd_(model, gradients, stable_gamma=4.0)
    starts = {name: layer.delta() for name, layer in low_rank_layers(model).items()}
    loss(IDS, model).backward()
    rate = 1e-6
    for name, layer in low_rank_layers(model).items():
        with torch.no_grad():
            layer.lora_A -= rate * layer.lora_A.grad
            layer.lora_B -= rate * layer.lora_B.grad
        u, values, vt = torch.linalg.svd(gradients[name], full_matrices=False)
        best = u[:, :8] @ torch.diag(values[:8]) @ vt[:8]
        factor = layer.scaling**2 * layer.out_features**0.5 / 4.0
        step = (layer.delta() - starts[name]) / -rate
        assert (step - factor * best).norm() < 1e-4 * (factor * best).norm()


@pytest.mark.parametrize("trainable_scaling", [False, True])
@pytest.mark.parametrize("init", [*FROM_WEIGHT, "kaiming"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_update_factors_are_relative_to_the_weight_before_injection(
    build: Callable[[], PreTrainedModel], init: str, trainable_scaling: bool
) -> None:
    weights = {name: parameter.detach().clone() for name, parameter in build().named_parameters()}
    model = trained(injected(build(), init, trainable_scaling=trainable_scaling))
    for name, layer in low_rank_layers(model).items():
        a, b, scaling = update_factors(layer)
        assert len(a) == b.shape[1] == (4 if init == "kaiming" else 8) and scaling == layer.initial_scaling
        layer.merge_()
        merged, weight = (layer.base.reorient(each) for each in (layer.weight, weights[f"{name}.weight"]))
        torch.testing.assert_close(merged, weight + scaling * b @ a, rtol=1e-9, atol=1e-10)
        a, b, _ = update_factors(layer)  # a merged update is no longer in the factors
        assert len(a) == 4 and not b.any()


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_strip_restores_the_weight_and_merge_keeps_the_function(init: str) -> None:
    model = trained(injected(llama(), init))
    outputs = model(IDS).logits
    strip(model)
    for name, parameter in llama().named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-12, atol=1e-12)
    model = trained(injected(llama(), init))
    merge(model)
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_initial_factors_are_saved_and_loaded(init: str) -> None:
    model, other = trained(injected(llama(), init)), llama()
    saved = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    inject(other, LowRankConfig(r=4, lora_alpha=8.0, init=init, rest="frozen"), seed=9)
    load_exact_tensors(other, saved)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    for mine, theirs in zip(low_rank_layers(model).values(), low_rank_layers(other).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(update_factors(mine)[:2], update_factors(theirs)[:2], strict=True))


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_a_coarse_base_keeps_the_exact_residual(base: str) -> None:
    """The master holds W - s·B A; products use the master rounded."""
    torch.manual_seed(0)
    plain = nn.Linear(32, 24)
    weight = plain.weight.detach().clone()
    layer = LowRankLinear(plain, LowRankConfig(r=4, lora_alpha=4, init="pissa", base=base), name="x")
    torch.testing.assert_close(layer.base.exact + layer.delta(), weight, rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 32)
    stored = layer.base.dense(torch.float32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, stored + layer.delta(), layer.bias))


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_a_restart_is_refused(init: str) -> None:
    model = injected(llama(), init)
    with pytest.raises(UserError, match=rf"lowrank\.init: {init} .*need kaiming or orthogonal"):
        restart(model, torch.optim.SGD(model.parameters(), lr=0.1), cycle=1)


def test_gradient_svd_refuses_and_changes_nothing() -> None:
    model = llama()
    inject(model, LowRankConfig(r=4, init="gradient-svd", rank_pattern={"layers.1.mlp.down_proj": 17}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = weight_gradients(model, BATCHES)
    last = "model.layers.1.mlp.down_proj"
    with pytest.raises(UserError, match=r"2 r = 34 directions, and .*down_proj has 32; r may be at most 16"):
        gradient_svd_(model, gradients)
    for bad, error, message in (
        ({}, UserError, "no gradient of model.layers.0"),
        (gradients | {last: torch.zeros(32, 48)}, UserError, f"no gradient of {last}"),
        (gradients | {last: gradients[last].T}, UserError, f"no gradient of {last}"),
    ):
        with pytest.raises(error, match=message):
            gradient_svd_(model, bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    initialized = injected(llama(), "gradient-svd")
    with pytest.raises(UserError, match="has begun already"):
        gradient_svd_(initialized, gradients)
    with pytest.raises(UserError, match="injected with init: pissa"):
        gradient_svd_(injected(llama(), "pissa"), gradients)
    with pytest.raises(NonFinite, match=r"gradient of model\.layers\.0"):
        fresh = llama()
        inject(fresh, LowRankConfig(r=4, init="gradient-svd"))
        gradient_svd_(fresh, {name: gradient / 0 for name, gradient in gradients.items()})


def test_no_batches_and_no_layers_are_refused() -> None:
    with pytest.raises(UserError, match="no low-rank layers"):
        weight_gradients(llama(), BATCHES)
    model = llama()
    inject(model, LowRankConfig(r=4, init="gradient-svd"))
    with pytest.raises(UserError, match="at least one batch"):
        weight_gradients(model, [])


def test_pissa_refuses_a_weight_that_is_not_finite() -> None:
    plain = nn.Linear(8, 6)
    with torch.no_grad():
        plain.weight[1, 1] = torch.nan
    with pytest.raises(NonFinite, match="weight of x is not finite"):
        LowRankLinear(plain, LowRankConfig(r=2, init="pissa"), name="x")
