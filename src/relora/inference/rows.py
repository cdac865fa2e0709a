"""Texts that grow together, token by token, in the cache of a `Decoder`; and the cache of a text that is kept.

The weights are read once for the next token of all texts. A text's tokens are those that it gets alone: it has its own
draws, and sees no other text. Only the sums of a product may be rounded otherwise with more rows in it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import GenerationConfig

from relora.inference.choice import Choice
from relora.inference.decoder import Decoder, KeyValues

Ends = Callable[[Tensor], bool]
"""Takes the tokens of a text so far, [length], after every one of them; returns whether the text ends."""


class Heard:
    """Keys and values of one text, kept for the next one that begins with the same tokens: a chat's next prompt.

    They belong to the weights that made them; whoever changes these, by another adapter for example, calls `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop what is kept."""
        self._cache: KeyValues | None = None
        self._ids: list[int] = []

    def cache(self, decoder: Decoder, ids: Sequence[int], capacity: int) -> KeyValues:
        """Return a cache that holds the tokens with which both `ids` and the last text begin, but not all of `ids`.

        Args:
            capacity: tokens for which the cache must have room.
        """
        pairs = zip(self._ids, ids[:-1], strict=False)  # the last token is read anew, for the logits after it
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        before, cache = self._cache, self._cache
        if before is None or cache is None or before.capacity < capacity:
            cache = KeyValues(decoder, 1, max(capacity, 2 * before.capacity if before else 0))
            if before is not None:
                for old, new in zip(before.keys + before.values, cache.keys + cache.values, strict=True):
                    new[:, :, :common] = old[:, :, :common]
        cache.length = common
        self._cache, self._ids = cache, list(ids[:common])  # all that is certain until `keep` says more
        return cache

    def keep(self, ids: Sequence[int]) -> None:
        """Note the tokens of the text for which `cache` was given; the cache need not hold the last of them."""
        assert self._cache is not None
        self._ids = list(ids[: self._cache.length])


def grow(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    draws: Sequence[torch.Generator] | None = None,
    ends: Sequence[Ends | None] | None = None,
    heard: Heard | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts, and yield the number of a prompt with its generated tokens as soon as its text has ended.

    Args:
        settings: what `choice.follows` accepts.
        draws: random numbers of each text; by default those of torch's global generator, for a single text only.
        ends: what may end a text before it has an end token or is as long as it may be.
        heard: keys and values kept from an earlier text; they are used, and replaced by those of this one text.
    """
    most, stops = settings.max_new_tokens, _end_tokens(settings)
    place = max(map(len, prompts))
    if heard is None:
        cache = KeyValues(decoder, len(prompts), place + most)
    else:
        cache = heard.cache(decoder, prompts[0], place + most)
    if len(prompts) == 1:
        logits = decoder.read(prompts[0][cache.length :], cache)
    else:
        logits = torch.cat([decoder.read(ids, cache, row, place) for row, ids in enumerate(prompts)])
        cache.align([len(ids) for ids in prompts])
    ids = torch.zeros(len(prompts), place + most, dtype=torch.long, device=logits.device)
    for row, prompt in enumerate(prompts):
        ids[row, place - len(prompt) : place] = torch.tensor(prompt)
    choice = Choice(settings, draws or [None] * len(prompts))
    growing: list[list[int] | None] = [[] for _ in prompts]
    while any(each is not None for each in growing):
        starts = [place - len(prompt) for prompt in prompts]
        length = cache.length
        tokens = choice.next_of([row[start:length] for row, start in zip(ids, starts, strict=True)], logits)
        ids[:, length] = tokens
        for row, (token, text) in enumerate(zip(tokens.tolist(), growing, strict=True)):
            if text is None:
                continue
            text.append(token)
            end = ends[row] if ends is not None else None
            asked = end is not None and end(ids[row, starts[row] : length + 1])
            if asked or token in stops or len(text) == most:
                growing[row] = None
                if heard is not None:
                    heard.keep([*prompts[0], *text])
                yield row, text
        if any(each is not None for each in growing):
            logits = decoder.step(tokens, cache)


def _end_tokens(settings: GenerationConfig) -> set[int]:
    """Return the ids that end a text."""
    ends = settings.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
