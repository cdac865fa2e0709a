"""Encode texts, or pairs of texts, for a classifier.

A text is encoded as its tokenizer encodes it by default, with special tokens, so that users of the trained model give
it the same ids. If a pair is too long, the longer text loses tokens at its end, until both have the same length or the
pair fits. Where the tokenizer's own template for pairs does not mark the end of the first text, the two are joined by
a newline and encoded as one text.

A classifier predicts from the hidden state of the last token, which transformers takes to be the rightmost one that is
not padding. So padding ids at the end of a text (EOS, where the tokenizer has no padding token) are removed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from relora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ClassEncoder:
    """Encode texts or pairs of texts as at most `length` ids, and count those that were `cut`.

    Args:
        tokenizer: the tokenizer, after `settle_padding`.
        length: most ids of an example.
        pair: whether examples are pairs of texts.

    Raises:
        UserError: there is no room for text beside the special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", length: int, *, pair: bool) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        special_tokens = self._backend.num_special_tokens_to_add(False)
        special_tokens_of_pair = self._backend.num_special_tokens_to_add(True)
        # Without a further special token in a pair, nothing marks the end of its first text.
        self._joined = pair and special_tokens == special_tokens_of_pair
        self._length = length
        self._room = length - (special_tokens_of_pair if pair else special_tokens)
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.cut = 0
        if self._room < (2 if pair else 1):
            raise UserError(
                f"data.sequence_length ({length}) leaves no room for a text beside the special tokens; raise it"
            )

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text or pair, at least one."""
        inputs: list[Any] = ["\n".join(parts) if self._joined or len(parts) == 1 else parts for parts in texts]
        encodings = self._backend.encode_batch(inputs)
        return [self._ids(encoding, len(parts[0])) for encoding, parts in zip(encodings, texts, strict=True)]

    def _ids(self, encoding: tokenizers.Encoding, first_chars: int) -> npt.NDArray[np.uint32]:
        """Return the ids of an encoding, cut to `length` and without padding ids at their end.

        Args:
            encoding: of a text or pair.
            first_chars: characters of the first text.
        """
        ids = np.array(encoding.ids, dtype=np.uint32)
        if len(ids) > self._length:
            ids = ids[self._kept(encoding, first_chars)]
            self.cut += 1
        kept = np.flatnonzero(ids != self.pad_token_id)
        if len(kept):
            return ids[: kept[-1] + 1]
        # The text is empty. A classifier of transformers then predicts from the first position.
        return np.array([self.pad_token_id], dtype=np.uint32)

    def _kept(self, encoding: tokenizers.Encoding, first_chars: int) -> npt.NDArray[np.bool_]:
        """Return which ids are kept: all special tokens, and of each text the first ones that fit; [ids]."""
        kept = np.array(encoding.special_tokens_mask, dtype=np.bool_)
        if self._joined:  # the newline between the texts counts as part of the second
            is_second = np.array([start >= first_chars for start, _ in encoding.offsets])
        else:
            is_second = np.array([text == 1 for text in encoding.sequence_ids])
        first, second = np.flatnonzero(~kept & ~is_second), np.flatnonzero(~kept & is_second)
        keep_first, keep_second = longest_first(len(first), len(second), self._room)
        kept[first[:keep_first]] = kept[second[:keep_second]] = True
        return kept


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each of two texts to keep, which together have more than `room`.

    Tokens are removed one by one from the longer text, as by transformers' strategy `longest_first`. Where `room` is
    odd and both texts are cut, the longer one keeps one token more, or the second one of equally long texts.
    """
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
