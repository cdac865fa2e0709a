"""Cross-entropy of a batch, for training and evaluation alike, and the held-out measures that derive from it.

    loss            mean over scored tokens of -ln p(token | the tokens before it), in nats
    perplexity      exp(loss)
    bits per byte   loss / ln 2 * tokens / bytes; unlike perplexity, comparable across tokenizers

The logits of a batch, [tokens, vocabulary], are by far its largest tensor. Where the model's head can be separated from
the rest (`relora.model.head`), they are computed in chunks of tokens, all in the forward pass: the hidden states of a
chunk are multiplied by the head, its loss is added up, its logits are overwritten by their gradient, and that is
multiplied by the head again. Nothing is computed twice. The price: the gradient of the head, [vocabulary, width],
exists from the forward pass on. torch's `linear_cross_entropy` does the same, but returns a bf16 sum of bf16 products
and, at its default chunks, takes several times as long on a CPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from relora.distributed.group import ALONE, Group
from relora.distributed.sharding import passes
from relora.errors import UserError
from relora.model.head import IGNORED as IGNORED
from relora.model.head import head_input
from relora.model.own_loss import auxiliary_loss

CHUNK_TOKENS = {"cpu": 256}
"""Tokens of a chunk by type of device: the fewest that cost no time (benchmarks/loss.py)."""
DEFAULT_CHUNK_TOKENS = 1024
"""Tokens of a chunk on other devices. Products are faster there, compared with memory, so the gradient of the head
must be added up less often. Not measured."""


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on held-out data, and the measures that derive from it."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the number of bytes that the tokens stand for is not known."""
    tokens: int
    """Number of tokens scored; for a classifier, number of examples."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Measures of a classifier by name: accuracy, F1 and others that its task uses."""
    whole_tokens: int | None = None
    """Number of tokens (or examples) that there are, where those scored are a sample of them; None where all were."""

    @classmethod
    def of(cls, loss_sum: float, tokens: int, byte_count: float | None) -> "Evaluation":
        """Compute the measures from the summed loss in nats, the number of tokens it is over, and that of their bytes.

        Raises:
            UserError: there are no tokens.
        """
        if tokens == 0:
            raise UserError("the held-out data has no token to score")
        loss = loss_sum / tokens
        bits_per_byte = loss_sum / math.log(2) / byte_count if byte_count else None
        return cls(loss, perplexity(loss), bits_per_byte, tokens)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that exceeds a float."""
    return math.exp(loss) if loss < 700 else math.inf


def token_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy of a batch.

    Args:
        model: a Hugging Face causal LM, or anything that returns `.logits` [batch, length, vocabulary].
        input_ids: [batch, length], integers.
        labels: [batch, length]; `labels[:, i]` is the token after `input_ids[:, i]`, or -100 (not scored).
        position_ids: [batch, length], only where several examples are packed into one sequence: the positions of each
            example count from 0, and its tokens attend to that example alone.

    Returns:
        The loss summed over scored tokens in nats (scalar; fp32, or fp64 for an fp64 model) and the number of these
        tokens (integer scalar). In training mode the loss holds what `auxiliary_loss` adds, for each token. They are
        returned apart so that a step can divide by the tokens of all its micro-batches and ranks. The sum can be
        differentiated once.
    """
    labels, tokens = labels.flatten(), (labels != IGNORED).sum()
    positions = {} if position_ids is None else {"position_ids": position_ids}
    found = head_input(model, input_ids, **positions)
    if found is None:
        output = model(input_ids=input_ids, use_cache=False, **positions)
        logits = output.logits.flatten(0, 1)
        logits = logits.to(_scoring_dtype(logits.dtype))
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return _with_auxiliary(loss, tokens, model, output), tokens
    hidden, head, output = found
    hidden = hidden.flatten(0, 1)
    if labels.device.type == "cpu" and tokens < len(labels):  # on other devices the comparison would synchronise
        scored = labels != IGNORED
        hidden, labels = hidden[scored], labels[scored]
    return _with_auxiliary(head_loss(hidden, head.weight, head.bias, labels), tokens, model, output), tokens


def _with_auxiliary(loss: Tensor, tokens: Tensor, model: nn.Module, output: Any) -> Tensor:
    """Add, in training mode, the loss that balances the experts of a mixture; it is a mean, so it counts per token."""
    auxiliary = auxiliary_loss(model, output) if model.training else None
    return loss if auxiliary is None else loss + tokens * auxiliary


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Compute the summed cross-entropy of the logits `hidden @ weight.T + bias`, a chunk of them at a time.

    Products are in the dtype of `hidden`, or in that of autocast; logits, loss and sums over chunks in fp32 or wider.

    Args:
        hidden: [tokens, in_features].
        weight: [vocabulary, in_features].
        bias: [vocabulary].
        labels: [tokens]; -100 is not scored.
    """
    with_grad = torch.is_grad_enabled()
    needs_grad = [with_grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, labels, *needs_grad)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a head whose forward pass computes the gradients; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        for_hidden: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        tokens, limit = len(labels), CHUNK_TOKENS.get(device, DEFAULT_CHUNK_TOKENS)
        size = math.ceil(tokens / max(1, math.ceil(tokens / limit)))  # all chunks have this size except the last
        with torch.autocast(device, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            buffer = hidden.new_empty(size, len(weight), dtype=_scoring_dtype(dtype))
            grad_hidden = torch.empty_like(hidden) if for_hidden else None
            grad_weight = grad_bias = None
            losses = []
            for start in range(0, max(tokens, 1), max(size, 1)):
                rows, targets = hidden[start : start + size], labels[start : start + size]
                logits = _product(rows, weight.T, buffer[: len(rows)])  # [chunk, vocabulary]
                if bias is not None:
                    logits += bias
                losses.append(_score_(logits, targets, gradient=for_hidden or for_weight or for_bias))
                grad_logits = logits.to(dtype) if for_hidden or for_weight else logits
                if grad_hidden is not None:
                    _product(grad_logits, weight, grad_hidden[start : start + size])
                if for_weight:
                    grad_weight = _add_product(grad_weight, grad_logits.T, rows, buffer.dtype)
                if for_bias:
                    grad_bias = logits.sum(0) if grad_bias is None else grad_bias.add_(logits.sum(0))
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]  # type: ignore[attr-defined]
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = ctx.gradients  # type: ignore[attr-defined]
        if not gradients:
            raise RuntimeError("the gradients of this loss were taken before; they are not kept for a second pass")
        ctx.gradients = []  # type: ignore[attr-defined]  # released, so that autograd can use them without a copy
        scaled = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return (*scaled, None, None, None, None)


def _score_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Return the summed loss of logits [tokens, vocabulary], in place.

    The logits are overwritten: by their gradient with `gradient`, otherwise by values of no use.
    """
    scored = labels != IGNORED
    index = torch.where(scored, labels, 0).unsqueeze(1)
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, index)
    total = logits.exp_().sum(1, keepdim=True)
    counted = scored.unsqueeze(1).to(logits.dtype)
    loss = ((total.log() - chosen) * counted).sum()
    if gradient:
        logits *= counted / total
        logits.scatter_(1, index, logits.gather(1, index) - counted)
    return loss


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write `left @ right` into `out`, which may have another dtype, and return it."""
    return torch.mm(left, right, out=out) if out.dtype == left.dtype else out.copy_(left @ right)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add `left @ right` to `total` in place and return it; without a total, return the product in `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _scoring_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that logits are scored in: fp32, or the dtype of the products where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    bytes_per_token: float | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
    group: Group = ALONE,
) -> Evaluation:
    """Measure the loss of a model on batches, without gradients and in evaluation mode; restore its mode afterwards.

    Nothing is drawn from a random generator, so training continues as if this had not been called. Several ranks share
    the batches; each adds up the losses of all batches in their order, so the figure is the same for every number.

    Args:
        batches: arguments of `token_loss` after the model, one tuple for each batch.
        bytes_per_token: mean bytes of a token in the text that was tokenized, for bits per byte.
        device: device of the model; by default that of its first parameter.
        autocast: dtype of matrix products, where it is not that of the weights.
        each_batch: called before every batch, on several ranks by all of them alike before each batch of the first; an
            exception that it raises ends the evaluation.
        group: the processes that measure the model together, each of which has it and all batches.

    Raises:
        UserError: the batches have no token to score.
    """
    device = device or next(model.parameters()).device
    losses: list[tuple[float, int]] = []
    own: tuple[Tensor, ...] = ()
    precision = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with evaluating(model), precision, passes(model) as together:
        for number, batch in enumerate(batches):
            if number % group.world == 0:
                each_batch()
            if number % group.world == group.rank or not own:
                own = batch
            if number % group.world != group.rank:
                losses.append((0.0, 0))
                continue
            batch_loss, batch_tokens = token_loss(model, *(tensor.to(device) for tensor in batch))
            losses.append((batch_loss.item(), int(batch_tokens.item())))
        if together and own and 0 < len(losses) % group.world <= group.rank:  # the last batches are others' alone
            token_loss(model, *(tensor.to(device) for tensor in own))
    loss_sum, tokens = 0.0, 0
    for batch_loss_sum, count in group.sum_(torch.tensor(losses, dtype=torch.float64).reshape(-1, 2)).tolist():
        loss_sum += batch_loss_sum  # a Python float is fp64
        tokens += int(count)
    return Evaluation.of(loss_sum, tokens, bytes_per_token * tokens if bytes_per_token else None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients inside the block; restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
