"""Which modules a pattern names: regular expressions, for whole paths or for their ends.

A pattern for ends matches from any dot on, `(.*\\.)?(PATTERN)$`, as PEFT's rank_pattern and alpha_pattern do
(huggingface/peft, `get_pattern_key`): `q_proj` means every q_proj, `layers.0.mlp.up_proj` that one of the first block,
and `layers\\.[01]\\..*` all that is in the first two.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from relora.errors import UserError
from relora.messages import first_line, short_repr

T = TypeVar("T")


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression out of the setting `key`, for whole paths; `UserError` where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {short_repr(pattern)} is not a regular expression: {first_line(str(error))}") from None


def at_the_end(pattern: str, key: str) -> re.Pattern[str]:
    """Likewise, for the end of a path: its `match` says whether."""
    compiled(pattern, key)  # by itself, so that an unbalanced bracket cannot close ours
    return re.compile(rf"(.*\.)?({pattern})$")


def by_pattern(patterns: Mapping[str, T], path: str, default: T, key: str) -> T:
    """What the first pattern that matches the end of `path` says."""
    return next((value for pattern, value in patterns.items() if at_the_end(pattern, key).match(path)), default)
