"""Tokenizers: open one from a folder or the hub, train one on a corpus, save it, and compute its fingerprint.

A trained tokenizer is byte-level BPE (Sennrich et al. 2016, with GPT-2's splitting into words): it has no unknown
token, and decoding the ids of a text returns exactly that text. `<|endoftext|>` ends each document. As in GPT-2 it is
also the BOS token from which generation starts, because in the training data an EOS is followed by the beginning of a
document. Padding has a token of its own: if it were EOS, fine-tuning would mask the EOS that a model has to learn to
generate.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from relora.errors import UserError
from relora.files.atomic import atomic_folder
from relora.files.hub import TOKENIZER_FILES, hub_folder
from relora.files.untrusted import CONFIG_BYTES, check_folder, check_model_folder, no_address, read_json
from relora.messages import short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2
"""One id for every byte, and the two special tokens."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerFast":
    """Open the tokenizer in a folder or on the hub.

    Args:
        name: a folder, or a hub id.
        trust_remote_code: run code that comes with the tokenizer (see `relora.files.untrusted`).

    Raises:
        UserError: it cannot be opened, has no tokenizer.json (is not a fast tokenizer), or has no EOS token.
    """
    from transformers import AutoTokenizer  # not at the top, because it takes seconds to load

    try:
        folder = Path(no_address(name))
    except ValueError as error:
        raise UserError(f"tokenizer: {error}") from None
    if not folder.is_dir():
        folder = hub_folder(name, "tokenizer", TOKENIZER_FILES)
    check_model_folder(folder, trust_remote_code=trust_remote_code)
    _check_class(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any type: the library and its file formats raise many
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name}: cannot be opened as a tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: has no tokenizer.json (a fast tokenizer); save one with `transformers` first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: has no EOS token, which ends every document; set eos_token in its configuration")
    return tokenizer


def _check_class(folder: Path) -> None:
    """Raise `UserError` unless the classes that a folder's configurations name are tokenizers.

    transformers would otherwise open any of its own classes that is named.
    """
    for file in ("tokenizer_config.json", "config.json"):
        if not (folder / file).exists():
            continue
        name = read_json(folder / file, CONFIG_BYTES[file]).get("tokenizer_class")
        if name is not None and not _may_be_tokenizer(name):
            raise UserError(
                f"{folder / file}: `tokenizer_class` is {short_repr(name)}, which is not a tokenizer of transformers"
            )


def _may_be_tokenizer(name: object) -> bool:
    """Return whether `name` is a tokenizer of transformers, or a class that transformers does not know.

    A name that no tokenizer has is not looked up, since that would import the module of any class, e.g. the trainer.
    """
    import transformers

    if not isinstance(name, str):
        return False
    if "Token" not in name and not name.endswith("Backend") and name in dir(transformers):
        return False
    found = getattr(transformers, name, None)
    return found is None or (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer of at most `vocab_size` ids; the same texts give the same tokenizer."""
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` if `vocab_size` is too small for a byte-level vocabulary."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--train-tokenizer {vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCABULARY} ids"
        )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id plus one: the number of rows that a model's embedding needs."""
    largest: int = max(tokenizer.get_vocab().values())
    return largest + 1


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a tokenizer to `folder` in one step, unless the folder exists; `transformers` can open it."""
    if not folder.is_dir():
        with atomic_folder(folder, replace=False, parents=True) as partial:
            tokenizer.save_pretrained(partial)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of `source` to `folder` in one step, unless the folder exists."""
    check_folder(source)  # a link could put any file of this machine into a model that is published
    if not folder.is_dir():
        with atomic_folder(folder, replace=False, parents=True) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a hash of everything that determines the ids of a document; templates and padding do not enter it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    text = json.dumps({**parts, "eos": tokenizer.eos_token_id}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
