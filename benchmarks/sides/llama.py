"""The sides that train transformers' LlamaForCausalLM: at full rank, with PEFT, with a plain module, and ours.

Every low-rank side trains the factors of all linear layers in the blocks, the embedding, the norms and the head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import relora
from relora.lowrank import LowRankConfig
from relora.lowrank.config import Residual
from relora.lowrank.residual import residual_steps
from relora.measure import token_loss
from relora.model.blocks import Checkpointing, training_blocks
from relora.train.optim import OptimizerConfig, build_optimizer
from relora.train.step import train_step
from sides.draws import draw_, next_tokens
from sides.shape import CPU, SEQUENCE, Place, Shape
from sides.side import ALPHA, CLIP, LR, Side, stepping


def llama(shape: Shape, place: Place) -> LlamaForCausalLM:
    """With transformers' own loss and attention (SDPA)."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=False,
        )
    ).to(place.device)
    for name, parameter in model.named_parameters():
        draw_(name, parameter)
    return model.train()


def linears(model: nn.Module, shape: Shape) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in the blocks, by path."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(shape.linears)):
            yield name, module


def full(shape: Shape, rank: int, place: Place = CPU) -> Side:
    model = llama(shape, place)
    return stepping(model, own_loss(model), place)


def peft(shape: Shape, rank: int, place: Place = CPU) -> Side:
    """PEFT trains what is not in a block by `requires_grad`, without the copies that `modules_to_save` makes."""
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=[*shape.linears], bias="none")
    model = get_peft_model(llama(shape, place), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw_(name.removeprefix("base_model.model.").removesuffix(".default.weight"), parameter)
        parameter.requires_grad_("base_layer" not in name)
    return stepping(model, own_loss(model), place)


class PlainLowRank(nn.Module):
    """W x + s B (A x), as one writes it down."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(linear.out_features, rank))
        self.scaling = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)


def plain(shape: Shape, rank: int, place: Place = CPU) -> Side:
    model = llama(shape, place)
    for name, linear in linears(model, shape):
        layer = PlainLowRank(linear, rank)
        draw_(f"{name}.lora_A", layer.lora_A)
        draw_(f"{name}.lora_B", layer.lora_B)
        model.set_submodule(name, layer)
    return stepping(model, own_loss(model), place)


def own_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """As transformers computes it; without the cache of keys and values that it would fill."""
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def ours(
    shape: Shape,
    rank: int,
    place: Place = CPU,
    checkpointing: Checkpointing = "none",
    compiled: bool = False,
    residual: Mapping[str, Any] | None = None,
    **options: Any,
) -> Side:
    """The product's layers, blocks, loss, optimizer and step. `options` are those of `LowRankConfig`."""
    model, following = llama(shape, place), Residual(**residual or {})
    relora.inject(model, LowRankConfig(r=rank, lora_alpha=ALPHA, residual=following, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw_(name, parameter)
    blocks = ExitStack()
    blocks.enter_context(training_blocks(model, checkpointing=checkpointing, compiled=compiled))
    optimizer = build_optimizer(model, OptimizerConfig(lr=LR, lowrank_lr=LR))
    done = 0

    def step(ids: Tensor) -> float:
        nonlocal done
        done += 1
        with residual_steps(model, optimizer, following, done):
            return train_step(
                model,
                optimizer,
                (ids, next_tokens(ids)),
                token_loss,
                seed=0,
                step=done,
                micro_sequences=len(ids),
                clip_grad_norm=CLIP,
                autocast=torch.bfloat16 if place.bf16 else None,
                check_gradients=False,
            ).loss

    return Side(model, optimizer, step, held=blocks)
