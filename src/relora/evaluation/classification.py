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

from relora.distributed.group import ALONE, Group
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
    group: Group = ALONE,
) -> ClassEvaluation:
    """Score a classifier on batches of examples.

    The model's mode is as before when this returns. No random numbers are drawn, so training goes on as if this had not
    been called. Several ranks share the batches, and the figures are the same for every number of them.

    Args:
        batches: (input ids, labels, lengths) of each batch, see `relora.model.classifier.class_loss`.
        device: the device of the model; by default that of its first parameter.
        autocast: dtype of matrix products, if it differs from that of the weights.
        each_batch: called before every batch (see `relora.measure.evaluate`); an exception that it raises ends the
            evaluation.
        group: the processes that measure the model together, each of which has it and all batches.

    Raises:
        UserError: there is no example.
    """
    device = device or next(model.parameters()).device
    losses, predictions, all_labels = [], [], []
    classes = len(model.score.weight)
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for number, (input_ids, labels, lengths) in enumerate(batches):
            if number % group.world == 0:
                each_batch()
            all_labels += labels.tolist()
            losses.append(0.0)
            if number % group.world != group.rank:
                predictions += [0.0] * len(labels)
                continue
            logits = class_logits(model, input_ids.to(device), lengths.to(device))  # [n, classes]
            losses[-1] = logits_loss(logits, labels.to(device))[0].item()
            predicted = logits.squeeze(-1) if classes == 1 else logits.argmax(dim=-1)  # [n]
            predictions += predicted.tolist()
    loss_sum = 0.0
    for batch_loss in group.sum_(torch.tensor(losses, dtype=torch.float64)).tolist():
        loss_sum += batch_loss  # a Python float is fp64
    predictions = group.sum_(torch.tensor(predictions, dtype=torch.float64)).tolist()
    whole = predictions if classes == 1 else [int(label) for label in predictions]
    return ClassEvaluation.of(loss_sum, whole, all_labels, classes)
