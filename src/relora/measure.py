"""Held-out loss and what follows from it. The loss of a batch is computed here and nowhere else.

loss            mean over scored tokens of -ln p(token | the tokens before it), in nats
perplexity      exp(loss)
bits per byte   loss / ln 2 * tokens / bytes; unlike perplexity it compares across tokenizers
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.errors import UserError

IGNORED = -100
"""The label of a position that is not scored."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out data."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the bytes behind the tokens are not known."""
    tokens: int
    """Tokens scored."""

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


def token_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a batch.

    Args:
        model: a Hugging Face causal LM, or anything that returns `.logits` [batch, length, vocabulary].
        input_ids: [batch, length], integers.
        labels: [batch, length]; `labels[:, i]` is the token after `input_ids[:, i]`, or -100 (not scored).

    Returns:
        The sum over scored tokens in nats (fp32 scalar) and their number (integer scalar), so that a step can
        divide by the count of all its micro-batches and ranks.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (labels != IGNORED).sum()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    bytes_per_token: float | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score batches of `(input_ids, labels)` (see `token_loss`); the model comes back in the mode it was in.

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
        for input_ids, labels in batches:
            each_batch()
            batch_loss, batch_tokens = token_loss(model, input_ids.to(device), labels.to(device))
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
