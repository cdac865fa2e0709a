"""Patterns that name modules: regular expressions for whole paths, or for the ends of paths.

A pattern for the end of a path must match from the start of the path or from just after one of its dots,
`(.*\\.)?(PATTERN)$`, as in PEFT's rank_pattern and alpha_pattern (huggingface/peft, `get_pattern_key`): `q_proj` names
every q_proj, `layers.0.mlp.up_proj` the one of the first block, and `layers\\.[01]\\..*` everything in the first two
blocks.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from relora.errors import UserError
from relora.messages import first_line, short_repr

T = TypeVar("T")


def compile_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """Compile a regular expression for whole paths.

    Args:
        key: the setting that holds the pattern, for the message.

    Raises:
        UserError: the pattern is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {short_repr(pattern)} is not a regular expression: {first_line(str(error))}") from None


def compile_end_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """Compile a pattern for the end of a path; the result's `match` is given the whole path.

    Raises:
        UserError: the pattern is not a regular expression.
    """
    compile_pattern(pattern, key)  # checked alone, so that an unbalanced bracket cannot close the one around it below
    return re.compile(rf"(.*\.)?({pattern})$")


def by_pattern(patterns: Mapping[str, T], path: str, default: T, key: str) -> T:
    """Return the value of the first pattern that matches the end of `path`, or `default`.

    Raises:
        UserError: a pattern of the setting `key` is not a regular expression.
    """
    for pattern, value in patterns.items():
        if compile_end_pattern(pattern, key).match(path):
            return value
    return default
