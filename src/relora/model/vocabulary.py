"""More rows for a trained model: a tokenizer to which tokens were added has ids that the model does not have.

    E' = [E; mean(E); ...; mean(E)]        E: embedding [rows, width], and the head likewise

A new row is the mean of the old ones, so nothing is drawn, and the new tokens are at first as probable as an average
one (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from relora.errors import UserError
from relora.messages import first_line
from relora.model.load import quiet_transformers


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel, rows: int) -> str:
    """Give a model more ids, in place; its logits for the old ids do not change.

    On the meta device the shapes change, and are not tried.

    Args:
        rows: number of ids afterwards, more than before.

    Returns:
        A line that says what was added.

    Raises:
        UserError: the architecture's vocabulary cannot be made larger.
    """
    before, dtype = model.get_input_embeddings().num_embeddings, narrowest_dtype(model)
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model.resize_token_embeddings(rows, mean_resizing=False)
        head = model.get_output_embeddings()
        for tensor in (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
            if tensor is not None:
                mean = tensor[:before].mean(0, dtype=torch.float64)
                tensor[before:] = mean.to(dtype).to(tensor.dtype)  # so that the model can still be stored in `dtype`
        fits = model.device.type == "meta" or _has_logits(model, rows)
    except Exception as error:  # of any type: architectures differ in where the number of ids stands
        kind, reason = model.config.model_type, first_line(str(error)) or type(error).__name__
        raise UserError(f"model.resize_vocabulary: a {kind} model cannot be given more ids: {reason}") from None
    if not fits:
        raise UserError(f"model.resize_vocabulary: a {model.config.model_type} model cannot be given more ids")
    return f"vocabulary: {rows - before:,} rows were added to the model's {before:,}, each the mean of those"


def _has_logits(model: PreTrainedModel, rows: int) -> bool:
    """Tell whether the model takes the last of `rows` ids and returns a logit for each of them."""
    last = torch.tensor([[0, rows - 1]], device=model.device)
    training = model.training
    logits = model.eval()(input_ids=last, use_cache=False).logits
    model.train(training)
    return bool(logits.shape[-1] == rows)


def narrowest_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of fewest bits that holds the parameters of a model exactly: that in which they were stored.

    On the meta device, where they have no numbers, it is fp32.
    """
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(parameter, parameter.to(dtype).to(parameter.dtype)) for parameter in model.parameters()):
            return dtype
    return torch.float32
