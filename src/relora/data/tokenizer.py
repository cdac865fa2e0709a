"""The tokenizer: opened from a folder or the hub, or trained on the corpus; and what identifies it.

A trained one is byte-level BPE (Sennrich et al. 2016, with GPT-2's splitting into words): it has no unknown
token and gives every text back exactly. `<|endoftext|>` ends each document and is also the BOS that generation
starts from, as in GPT-2: what follows an end is the start of a text. Padding is a token of its own, because a
pad that equals EOS makes fine-tuning mask the very EOS a model must learn to give.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from huggingface_hub import snapshot_download
from tokenizers import decoders, models, pre_tokenizers, trainers

from relora.errors import UserError
from relora.files.atomic import sync
from relora.files.untrusted import CONFIG_BYTES, check_folder, check_model_folder, no_address, read_json
from relora.messages import short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2
"""Every byte, and the two special tokens."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder or on the hub; `UserError` unless it opens, is a fast one and has an EOS token.

    `trust_remote_code` runs code that comes with it (see `relora.files.untrusted`).
    """
    from transformers import AutoTokenizer  # here, because it takes seconds to load

    try:
        folder = Path(name) if Path(no_address(name)).is_dir() else _from_hub(name)
    except ValueError as error:
        raise UserError(f"tokenizer: {error}") from None
    check_model_folder(folder, trust_remote_code=trust_remote_code)
    _check_class(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the library and its file formats raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name}: cannot be opened as a tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: has no tokenizer.json (a fast tokenizer); save one with `transformers` first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: has no EOS token, which ends every document; set eos_token in its configuration")
    return tokenizer


def _check_class(folder: Path) -> None:
    """`UserError` unless the classes that a folder names are tokenizers: transformers would open any of its classes."""
    import transformers

    for file in ("tokenizer_config.json", "config.json"):
        there = (folder / file).exists()
        name = read_json(folder / file, CONFIG_BYTES[file]).get("tokenizer_class") if there else None
        found = getattr(transformers, name, None) if isinstance(name, str) else name
        if found is not None and not (
            isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
        ):
            raise UserError(
                f"{folder / file}: `tokenizer_class` is {short_repr(name)}, which is not a tokenizer of transformers"
            )


def _from_hub(name: str) -> Path:
    """The folder that holds a hub tokenizer's files, fetched once."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
    except Exception:  # whatever the hub and the network raise; a wrong name is the commonest reason by far
        raise UserError(f"{name}: no such folder, and the hub gave no tokenizer of that name") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of at most `vocab_size` ids; the same texts give the same tokenizer."""
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
    """`UserError` when a byte-level vocabulary cannot be that small."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--train-tokenizer {vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCABULARY} ids"
        )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id: the rows that a model's embedding needs."""
    largest: int = max(tokenizer.get_vocab().values())
    return largest + 1


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write `folder` in one step, if it is not there yet; `transformers` opens it."""
    _in_one_step(folder, tokenizer.save_pretrained)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The same files in `folder`, in one step, if it is not there yet."""
    check_folder(source)  # or a link would put a file of this machine into a model that is passed on
    _in_one_step(folder, lambda aside: shutil.copytree(source, aside, dirs_exist_ok=True))


def _in_one_step(folder: Path, write: Callable[[Path], object]) -> None:
    if folder.is_dir():
        return
    aside = folder.with_name(folder.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    write(aside)
    for file in aside.iterdir():
        sync(file)
    aside.replace(folder)
    sync(folder.parent)


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """A hash of all that decides which ids a document gets, and of nothing else: not of templates or padding."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    text = json.dumps({**parts, "eos": tokenizer.eos_token_id}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
