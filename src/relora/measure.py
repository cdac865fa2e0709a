"""Held-out loss and what follows from it. The loss of a batch is computed here and nowhere else.

The logits of a batch, tokens x vocabulary, are by far its largest tensor, and are never there at once where the model
lets them be avoided (`relora.model.head`): a chunk of tokens at a time is multiplied by the head, scored, turned into
its own gradient in place and multiplied back, all in the forward pass. Nothing is computed twice; the price is that
the gradient of the head, vocabulary x width, lives from the forward pass on. torch's `linear_cross_entropy` does the
same, but returns a bf16 sum of bf16 products and, at its default chunks, takes several times as long on a CPU.

loss            mean over scored tokens of -ln p(token | the tokens before it), in nats
perplexity      exp(loss)
bits per byte   loss / ln 2 * tokens / bytes; unlike perplexity it compares across tokenizers
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from relora.errors import UserError
from relora.model.head import IGNORED as IGNORED
from relora.model.head import head_input

CHUNK_TOKENS = {"cpu": 256}
"""Tokens whose logits are there at once: the fewest that cost no time (benchmarks/loss.py)."""
_OTHER_DEVICES = 1024
"""Where products are faster beside memory, a gradient must be added to more rarely; not measured."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out data."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the bytes behind the tokens are not known."""
    tokens: int
    """Tokens scored; of a classifier, examples."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of a classifier, by name: accuracy, F1 and what else its task is judged by."""

    @classmethod
    def of(cls, loss_sum: float, tokens: int, byte_count: float | None) -> "Evaluation":
        """From the summed loss (nats), the tokens it was summed over and the bytes that they stand for."""
        if tokens == 0:
            raise UserError("the held-out data has no token to score")
        loss = loss_sum / tokens
        return cls(loss, perplexity(loss), loss_sum / math.log(2) / byte_count if byte_count else None, tokens)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def token_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a batch.

    Args:
        model: a Hugging Face causal LM, or anything that returns `.logits` [batch, length, vocabulary].
        input_ids: [batch, length], integers.
        labels: [batch, length]; `labels[:, i]` is the token after `input_ids[:, i]`, or -100 (not scored).
        position_ids: [batch, length], where several examples are packed into one sequence: each counts from 0, and
            attends to itself alone.

    Returns:
        The sum over scored tokens in nats (fp32, or fp64 of an fp64 model; a scalar) and their number (integer
        scalar), so that a step can divide by the count of all its micro-batches and ranks. The sum can be
        differentiated once.
    """
    labels, tokens = labels.flatten(), (labels != IGNORED).sum()
    placed = {} if position_ids is None else {"position_ids": position_ids}
    found = head_input(model, input_ids, **placed)
    if found is None:
        logits = model(input_ids=input_ids, use_cache=False, **placed).logits.flatten(0, 1)
        logits = logits.to(_wide(logits.dtype))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), tokens
    hidden, head = found
    hidden = hidden.flatten(0, 1)
    if labels.device.type == "cpu" and tokens < len(labels):  # elsewhere asking would wait for the device
        scored = labels != IGNORED
        hidden, labels = hidden[scored], labels[scored]
    return head_loss(hidden, head.weight, head.bias, labels), tokens


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias`, at most a chunk of these logits at a time.

    Products are in the dtype of `hidden` or autocast's; logits, loss and sums over chunks in fp32 or wider.

    Args:
        hidden: [tokens, in_features].
        weight: [vocabulary, in_features].
        bias: [vocabulary].
        labels: [tokens]; -100 is not scored.
    """
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, labels, *wanted)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Gradients are formed in the forward pass, while the logits are there; the backward pass scales them."""

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
        tokens, most = len(labels), CHUNK_TOKENS.get(device, _OTHER_DEVICES)
        size = math.ceil(tokens / max(1, math.ceil(tokens / most)))  # chunks of one size, but for the last
        with torch.autocast(device, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            buffer = hidden.new_empty(size, len(weight), dtype=_wide(dtype))
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
        ctx.gradients = []  # type: ignore[attr-defined]  # autograd may take them over without a copy
        scaled = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return (*scaled, None, None, None, None)


def _score_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """The summed loss of logits [tokens, vocabulary], which become its gradient by them, or are spoilt."""
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
    """`left @ right` in `out`, whatever its dtype."""
    return torch.mm(left, right, out=out) if out.dtype == left.dtype else out.copy_(left @ right)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right`, in place; at first, with no total, as `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are scored: fp32, or that of the products where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    bytes_per_token: float | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score batches as `token_loss` takes them; the model comes back in the mode it was in.

    Draws nothing, so training goes on as if it had not been called.

    Args:
        bytes_per_token: of the text behind the batches, for bits per byte.
        device: where the model is; by default that of its first parameter.
        autocast: the dtype of matrix products, where it is not that of the weights.
        each_batch: called before every batch; what it raises ends the evaluation.
    """
    device = device or next(model.parameters()).device
    loss_sum, tokens = 0.0, 0
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch in batches:
            each_batch()
            batch_loss, batch_tokens = token_loss(model, *(tensor.to(device) for tensor in batch))
            loss_sum += batch_loss.item()  # a Python float is fp64
            tokens += int(batch_tokens.item())
    return Evaluation.of(loss_sum, tokens, bytes_per_token * tokens if bytes_per_token else None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; outside, every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
