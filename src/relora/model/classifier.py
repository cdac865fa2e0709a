"""A causal LM as a classifier: its body, and a new head that reads what the body makes of the last token.

    logits = W_score body(tokens)[length - 1]        W_score: [classes, hidden], or [1, hidden] for a number

As in Radford et al. 2018 ("Improving language understanding by generative pre-training", section 3.2), and as the
`...ForSequenceClassification` of transformers, in which a trained one is saved and opened. Under causal attention what
is padded on the right changes nothing before it, so no mask is needed. transformers finds the last token by itself: the
rightmost that is not `config.pad_token_id`. Here the lengths say where it is; the two agree where no text ends in that
token, which `relora.data.finetuning.classification` sees to.

The price: a model whose attention is not causal, like BERT, has another kind of head and is refused.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from relora.errors import UserError
from relora.files.untrusted import CONFIG_BYTES
from relora.messages import first_line
from relora.model.head import IGNORED
from relora.model.load import open_model, quiet_transformers
from relora.seeding import keyed_generator


def open_classifier(
    path: str | Path,
    labels: Sequence[str],
    *,
    pad_token_id: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal LM in a folder or on the hub with a head for `labels` in place of its own, on the CPU.

    The head's weight is drawn from `seed`, as wide as the model's own weights were (`initializer_range`).

    Args:
        labels: the names of the classes, in the order of their numbers; none: the model is to give a number.
        pad_token_id: what fills batches up on the right.

    Raises:
        UserError: see `open_model`; one class only, labels too many for a configuration, no such token, or a model
            that transformers makes no such classifier of.
    """
    model = open_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    rows = model.get_input_embeddings().num_embeddings
    if not 0 <= pad_token_id < rows:
        raise UserError(f"{path}: the model has {rows:,} ids, the tokenizer pads with id {pad_token_id:,}")
    _settle_config(model.config, labels, pad_token_id, path)
    classifier = _with_head(model, path, trust_remote_code)
    score, body = classifier.score, classifier.base_model
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    drawn = torch.empty(score.weight.shape, device="cpu")
    drawn.normal_(std=spread, generator=keyed_generator(seed, "head", "score.weight"))
    score.weight = nn.Parameter(drawn.to(body.device, body.dtype))
    return classifier


def class_logits(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """What the head makes of the last tokens, [n, classes] or [n, 1], in the dtype of the weights under autocast, too.

    Args:
        model: of `open_classifier`.
        input_ids: [n, length], padded on the right.
        lengths: [n], tokens of each row without the padding.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]  # [n, hidden]
    with torch.autocast(last.device.type, enabled=False):
        logits: Tensor = model.score(last.to(model.score.weight.dtype))
    return logits


def logits_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and the number of labels that it is summed over, both scalars; the sum in fp32 or wider.

    Args:
        logits: [n, classes]; [n, 1] with labels that are numbers.
        labels: [n], classes (int64; -100 is not scored): cross-entropy in nats; or numbers (floating): squared error.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    number = (labels != IGNORED).sum()
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum"), number
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), number


def class_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a batch and the number of examples in it; see `class_logits` and `logits_loss`."""
    return logits_loss(class_logits(model, input_ids, lengths), labels)


def _settle_config(config: PreTrainedConfig, labels: Sequence[str], pad_token_id: int, path: str | Path) -> None:
    """What transformers and its pipeline read: the classes by number and name, and the token that pads."""
    if len(labels) == 1:
        raise UserError(f"{path}: one class ({labels[0]}) leaves nothing to tell apart; give examples of another")
    config.problem_type = "single_label_classification" if labels else "regression"
    config.id2label = dict(enumerate(labels or ["LABEL_0"]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    size, most = len(config.to_json_string().encode()), CONFIG_BYTES["config.json"]
    if size > most:  # it could be written, but not opened again
        raise UserError(
            f"{path}: the names of {len(labels):,} classes make a config.json of {size:,} bytes, more than {most:,}; "
            "is `label_column` the right one?"
        )


def _with_head(model: PreTrainedModel, path: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    """The classifier of the model's family around the model's own body; its head is without values."""
    refused = f"{path}: no classifier can be made of a {model.config.model_type} model"
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(
                model.config, dtype=model.dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever the library raises about a family that it has no classifier for
        raise UserError(f"{refused}: {first_line(str(error))}") from None
    body, score = model.base_model, getattr(classifier, "score", None)
    has_head = isinstance(score, nn.Linear) and [name for name, _ in score.named_parameters()] == ["weight"]
    if type(classifier.base_model) is not type(body) or not has_head:
        raise UserError(f"{refused}: that of transformers is not its body and a `score` head")
    setattr(classifier, classifier.base_model_prefix, body)
    for name, tensor in chain(classifier.named_parameters(), classifier.named_buffers()):
        if name != "score.weight" and tensor.device != body.device:
            raise UserError(f"{refused}: that of transformers has more than its body and a head (`{name}`)")
    return classifier.train(model.training)
