"""A causal LM as a classifier: its body, and a new head on the hidden state of the last token.

    logits = W_score body(tokens)[length - 1]        W_score: [classes, hidden]; [1, hidden] for a regression

The method is that of Radford et al. 2018 ("Improving language understanding by generative pre-training", section 3.2).
The model is a `...ForSequenceClassification` of transformers, and is saved and opened as such. Under causal attention,
padding on the right changes no hidden state before it, so no attention mask is needed. transformers takes the rightmost
token that is not `config.pad_token_id` for the last one, while here the lengths are given. Both agree if no text ends
in the padding token, which `relora.data.finetuning.classification` ensures.

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
from relora.model.attention import check_causal
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
    """Open a causal LM as a classifier on the CPU: the output head is replaced by one for `labels`.

    The weight of the new head is drawn from a normal distribution, keyed by `seed`, with the standard deviation of the
    model's own initialisation (`initializer_range`, 0.02 if the configuration gives none).

    Args:
        path: folder or hub id of the causal LM.
        labels: names of the classes, in the order of their ids; empty for a regression, which predicts one number.
        pad_token_id: id of the token with which batches are padded on the right.
        dtype: dtype of the weights.

    Raises:
        UserError: `open_model` or `check_causal` refuses the model; there is only one class; the names of the classes
            are too long for a config.json that can be opened again; the model has no row for `pad_token_id`; or
            transformers has no classifier of this kind for the architecture.
    """
    model = open_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    check_causal(model, path)
    rows = model.get_input_embeddings().num_embeddings
    if not 0 <= pad_token_id < rows:
        raise UserError(f"{path}: the model has {rows:,} ids, the tokenizer pads with id {pad_token_id:,}")
    _describe_classes(model.config, labels, pad_token_id, path)
    classifier = _with_head(model, path, trust_remote_code)
    score, body = classifier.score, classifier.base_model
    standard_deviation = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    weight = torch.empty(score.weight.shape, device="cpu")
    weight.normal_(std=standard_deviation, generator=keyed_generator(seed, "head", "score.weight"))
    score.weight = nn.Parameter(weight.to(body.device, body.dtype))
    return classifier


def class_logits(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Compute the logits of the classes from the hidden state of each row's last token.

    Args:
        model: a model of `open_classifier`.
        input_ids: [n, length], padded on the right.
        lengths: [n], number of tokens of each row without the padding.

    Returns:
        [n, classes], or [n, 1] in a regression, in the dtype of the head's weight, also under autocast.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]  # [n, hidden]
    with torch.autocast(last.device.type, enabled=False):
        logits: Tensor = model.score(last.to(model.score.weight.dtype))
    return logits


def logits_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the summed loss, in fp32 or a more precise dtype, and the number of labels that it is summed over.

    Args:
        logits: [n, classes], or [n, 1] in a regression.
        labels: [n]. Integers are classes, whose loss is the cross-entropy in nats; -100 is not scored. Floating-point
            numbers are targets of a regression, whose loss is the squared error.

    Returns:
        Two scalars.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    number = (labels != IGNORED).sum()
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum"), number
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), number


def class_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the summed loss of a batch and the number of scored labels; see `class_logits` and `logits_loss`."""
    return logits_loss(class_logits(model, input_ids, lengths), labels)


def _describe_classes(config: PreTrainedConfig, labels: Sequence[str], pad_token_id: int, path: str | Path) -> None:
    """Write into the configuration what transformers and its pipeline need: names of the classes and the padding token.

    Raises:
        UserError: there is only one class, or the names make config.json larger than `open_model` permits.
    """
    if len(labels) == 1:
        raise UserError(f"{path}: one class ({labels[0]}) leaves nothing to tell apart; give examples of another")
    config.problem_type = "single_label_classification" if labels else "regression"
    config.id2label = dict(enumerate(labels or ["LABEL_0"]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    size, most = len(config.to_json_string().encode()), CONFIG_BYTES["config.json"]
    if size > most:  # such a model could be saved, but not opened again
        raise UserError(
            f"{path}: the names of {len(labels):,} classes make a config.json of {size:,} bytes, more than {most:,}; "
            "is `label_column` the right one?"
        )


def _with_head(model: PreTrainedModel, path: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    """Build transformers' classifier for the architecture around the model's own body; its head is on the meta device.

    Raises:
        UserError: transformers has no such classifier, or it is more than the same body and a linear `score` head.
    """
    refused = f"{path}: no classifier can be made of a {model.config.model_type} model"
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(
                model.config, dtype=model.dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # any error: the library has no class of its own for a missing classifier
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
