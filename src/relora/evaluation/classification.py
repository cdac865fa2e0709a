"""Score a classifier on held-out examples: its loss, and the metrics by which its task is judged.

This module joins `label_metrics`, which knows no tensors, with `relora.measure`, which knows no classes. The training
loop needs neither.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from relora.errors import UserError
from relora.evaluation.label_metrics import accuracy, f1, macro_f1, matthews, pearson, spearman
from relora.measure import Evaluation, evaluating, perplexity
from relora.model.classifier import class_logits, logits_loss


@dataclass(frozen=True)
class ClassEvaluation:
    """Loss and metrics of a classifier on held-out examples.

    Accuracy, F1 and Matthews' correlation are those of classes, the correlations of Pearson and Spearman those of
    numbers (regression); the metrics of the other kind are None. `label_metrics` defines them.
    """

    loss: float
    """Mean over the examples: cross-entropy in nats, or squared error for numbers."""
    accuracy: float | None
    f1: float | None
    """F1 of class 1 if there are two classes, otherwise the mean of F1 over the classes."""
    matthews: float | None
    pearson: float | None
    spearman: float | None
    examples: int
    """Number of scored examples."""

    def as_evaluation(self) -> Evaluation:
        """Return the same measurement in the form in which a run reports the held-out loss of any model."""
        names = ("accuracy", "f1", "matthews", "pearson", "spearman")
        scores = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Evaluation(self.loss, perplexity(self.loss), None, self.examples, scores)

    @classmethod
    def of(cls, loss_sum: float, predictions: Sequence[Any], labels: Sequence[Any], classes: int) -> "ClassEvaluation":
        """Compute the metrics.

        Args:
            loss_sum: sum of the loss over all examples.
            predictions: predicted class, or number, of each example.
            labels: true class, or number, of each example.
            classes: number of classes; 1 means that predictions and labels are numbers.

        Raises:
            UserError: there is no example.
        """
        if not labels:
            raise UserError("the held-out data has no example to score")
        loss, examples = loss_sum / len(labels), len(labels)
        if classes == 1:
            return cls(loss, None, None, None, pearson(predictions, labels), spearman(predictions, labels), examples)
        f1_score = f1(predictions, labels) if classes == 2 else macro_f1(predictions, labels)
        return cls(loss, accuracy(predictions, labels), f1_score, matthews(predictions, labels), None, None, examples)


def evaluate_classes(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> ClassEvaluation:
    """Score a classifier on batches of examples.

    The model's mode is as before when this returns. No random numbers are drawn, so training goes on as if this had not
    been called.

    Args:
        batches: (input ids, labels, lengths) of each batch, see `relora.model.classifier.class_loss`.
        device: the device of the model; by default that of its first parameter.
        autocast: dtype of matrix products, if it differs from that of the weights.
        each_batch: called before every batch; an exception that it raises ends the evaluation.

    Raises:
        UserError: there is no example.
    """
    device = device or next(model.parameters()).device
    loss_sum, predictions, all_labels, classes = 0.0, [], [], 0
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for input_ids, labels, lengths in batches:
            each_batch()
            logits = class_logits(model, input_ids.to(device), lengths.to(device))  # [n, classes]
            loss_sum += logits_loss(logits, labels.to(device))[0].item()  # a Python float is fp64
            classes = logits.shape[-1]
            predicted = logits.squeeze(-1) if classes == 1 else logits.argmax(dim=-1)  # [n]
            predictions += predicted.tolist()
            all_labels += labels.tolist()
    return ClassEvaluation.of(loss_sum, predictions, all_labels, classes)
