"""How well a classifier does on held-out examples: its loss, and the scores that its task is known by.

`label_metrics` knows no tensors and `relora.measure` no classes, and the training loop needs neither.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from relora.errors import UserError
from relora.evaluation.label_metrics import accuracy, f1, macro_f1, matthews, pearson, spearman
from relora.measure import evaluating
from relora.model.classifier import class_logits, logits_loss


@dataclass(frozen=True)
class ClassEvaluation:
    """What a classifier makes of held-out examples; scores (see `label_metrics`) that the task has not are None."""

    loss: float
    """Mean over the examples: nats, or squared error."""
    accuracy: float | None
    f1: float | None
    """Of class 1 where there are two classes, otherwise the mean over classes."""
    matthews: float | None
    pearson: float | None
    spearman: float | None
    examples: int

    @classmethod
    def of(cls, loss_sum: float, predictions: Sequence[Any], labels: Sequence[Any], classes: int) -> "ClassEvaluation":
        """From the summed loss, predictions and labels: of `classes` classes, or with 1 of numbers."""
        if not labels:
            raise UserError("the held-out data has no example to score")
        loss, examples = loss_sum / len(labels), len(labels)
        sides = predictions, labels
        if classes == 1:
            return cls(loss, None, None, None, pearson(*sides), spearman(*sides), examples)
        f1_score = f1(*sides) if classes == 2 else macro_f1(*sides)
        return cls(loss, accuracy(*sides), f1_score, matthews(*sides), None, None, examples)


def evaluate_classes(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> ClassEvaluation:
    """Score batches of `(input_ids, labels, lengths)` (see `class_loss`); the model comes back in the mode it was in.

    Draws nothing, so training goes on as if it had not been called.

    Args:
        device: where the model is; by default that of its first parameter.
        autocast: the dtype of matrix products, where it is not that of the weights.
        each_batch: called before every batch; what it raises ends the evaluation.
    """
    device = device or next(model.parameters()).device
    loss_sum, predictions, true, classes = 0.0, [], [], 0
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for input_ids, labels, lengths in batches:
            each_batch()
            logits = class_logits(model, input_ids.to(device), lengths.to(device))
            loss_sum += logits_loss(logits, labels.to(device))[0].item()  # a Python float is fp64
            classes = logits.shape[-1]
            predictions += (logits.squeeze(-1) if classes == 1 else logits.argmax(dim=-1)).tolist()
            true += labels.tolist()
    return ClassEvaluation.of(loss_sum, predictions, true, classes)
