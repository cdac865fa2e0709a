"""The choice of the next token from the logits after the last one, as transformers makes it.

Temperature, top-k and top-p, in this order, leave some tokens; one of them is drawn. The same numbers in the same order
as in transformers give the same bits, so the same seed draws the same token. What is left out is its bookkeeping, and
the sorting of indices: for top-p only the values are sorted, unless equal ones lie on both sides of the limit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_KNOWN = {
    *("do_sample", "temperature", "top_p", "top_k", "repetition_penalty"),
    *("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version"),
}
"""Settings that are followed here; a text with any other is left to transformers."""


def follows(settings: GenerationConfig) -> bool:
    """Return whether `Choice` follows all settings that differ from their defaults."""
    return all(name in _KNOWN for name, value in settings.to_diff_dict().items() if value is not None)


class Choice:
    """Chooses the next token of several texts.

    Args:
        settings: what `follows` accepts.
        draws: a generator of random numbers for each text; None draws from torch's global one.
    """

    def __init__(self, settings: GenerationConfig, draws: Sequence[torch.Generator | None]) -> None:
        self._draws = draws
        self._samples = bool(settings.do_sample)
        penalty = settings.repetition_penalty
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        temperature, top_k, top_p = settings.temperature, settings.top_k, settings.top_p
        self._temperature = TemperatureLogitsWarper(temperature) if temperature not in (None, 1.0) else None
        self._top_k = TopKLogitsWarper(top_k) if top_k else None
        self._top_p = TopPLogitsWarper(top_p) if top_p is not None and top_p < 1.0 else None

    def next_of(self, ids: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Return the next token of each text, [texts].

        Args:
            ids: tokens of each text so far, [length].
            logits: after the last of them, [texts, ids of the model].
        """
        scores = logits.to(copy=True, dtype=torch.float32)
        if self._penalty is not None:
            scores = torch.cat([self._penalty(ids[row][None], scores[row : row + 1]) for row in range(len(ids))])
        if not self._samples:
            return scores.argmax(dim=-1)
        if self._temperature is not None:
            scores = self._temperature(None, scores)
        if self._top_k is not None:
            scores = self._top_k(None, scores)
        if self._top_p is not None:
            scores = torch.cat([self._likeliest(one) for one in torch.split(scores, 1)])
        shares = scores.softmax(dim=-1)
        drawn = [torch.multinomial(shares[row : row + 1], 1, generator=draw) for row, draw in enumerate(self._draws)]
        return torch.cat(drawn)[:, 0]

    def _likeliest(self, scores: Tensor) -> Tensor:
        """Return scores, [1, ids], of which all but the likeliest that have a share of top_p together are -inf."""
        assert self._top_p is not None
        if scores.device.type == "cpu":
            ordered = torch.from_numpy(np.sort(scores.numpy()))
        else:
            ordered = scores.sort(dim=-1).values
        removed = int((ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - self._top_p.top_p).sum())
        removed = min(removed, scores.shape[-1] - 1)
        least = ordered[0, removed]
        if removed and ordered[0, removed - 1] == least:  # which of the equal ones are removed depends on their indices
            found: Tensor = self._top_p(None, scores)
            return found
        return scores.masked_fill_(scores < least, -torch.inf)
