"""Tokens that a user added to a tokenizer: rows for them in the model, and training of these rows alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.errors import UserError
from relora.lowrank.patterns import compile_end_pattern
from relora.lowrank.token_rows import fold_rows, train_rows, trained_rows
from relora.messages import short_repr
from relora.model.load import check_fit
from relora.model.vocabulary import grow_vocabulary

TrainableTokens = Literal["new"] | Sequence[int | str]


def fit_vocabulary(model: PreTrainedModel, ids: int, sequence_length: int, *, resize: bool) -> list[str]:
    """Give the model a row for every id of the tokenizer, if it may be resized, and check that it fits the data.

    Args:
        ids: number of ids that the tokenizer has.
        sequence_length: longest sequence in tokens.
        resize: add rows for ids that have none (`model.resize_vocabulary: auto`).

    Returns:
        Lines that say what was added.

    Raises:
        UserError: the tokenizer has ids without a row, or the model has too few positions.
    """
    lines = []
    if resize and ids > model.get_input_embeddings().num_embeddings:
        lines.append(grow_vocabulary(model, ids))
    remedy = "set `model.resize_vocabulary: auto` to add rows for the others, or give the tokenizer of the model"
    check_fit(model, ids, sequence_length, remedy=remedy)
    return lines


def train_token_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: TrainableTokens,
    trained_modules: Sequence[str],
    rows_before: int,
) -> list[str]:
    """Let the rows of some tokens train while the other rows stay frozen.

    Args:
        tokens: `lowrank.trainable_tokens`: ids or texts of tokens, or `new` for the rows that were added.
        trained_modules: `lowrank.trained_modules`, none of which may hold the rows.
        rows_before: rows of the model before some were added.

    Returns:
        A line that says which rows train, or that added ones do not.

    Raises:
        UserError: there is no such token, or a row is to train in full as well.
    """
    rows = model.get_input_embeddings().num_embeddings
    modules = _with_rows(model)
    in_full = {name for name in modules for pattern in trained_modules if _matches(pattern, name)}
    if not tokens:
        frozen = rows > rows_before and len(in_full) < len(modules)
        return ["the added rows stay as they are; train them with `lowrank.trainable_tokens: new`"] if frozen else []
    if in_full:
        raise UserError(f"lowrank.trainable_tokens: {min(in_full)} trains in full by lowrank.trained_modules; drop one")
    ids = list(range(rows_before, rows)) if tokens == "new" else [_id_of(token, tokenizer) for token in tokens]
    if not ids:
        raise UserError("lowrank.trainable_tokens: `new`, but the model has a row for every id; name the tokens")
    number = train_rows([model.get_submodule(name) for name in modules], sorted(set(ids)))
    return [f"rows of {len(set(ids)):,} tokens train in {' and '.join(modules)}: {number:,} parameters"]


@contextmanager
def without_token_rows(model: PreTrainedModel) -> Iterator[None]:
    """Put the plain embedding and head back within the context, with the rows as they are."""
    ids = next((list(rows) for rows in trained_rows(model).values()), [])
    fold_rows(model)
    try:
        yield
    finally:
        if ids:
            train_rows([model.get_submodule(name) for name in _with_rows(model)], ids)


def _with_rows(model: PreTrainedModel) -> list[str]:
    """Return the paths of the embedding and of the head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def _matches(pattern: str, path: str) -> bool:
    return bool(compile_end_pattern(pattern, "lowrank.trained_modules").match(path))


def _id_of(token: int | str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of a token that is given as an id or as its text; `UserError` if there is none."""
    if isinstance(token, int):
        return token
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(f"lowrank.trainable_tokens: the tokenizer has no token {short_repr(token)}")
    return int(found)
