"""Notes about records: which of their columns and keys are not used, and what became of their messages.

not used: column `id` (60 records), `name` in messages (4 records)
turns whose text the chat template changed or left out: 12, first in a.jsonl, line 3
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from relora.data.readers import MOST_NAMES
from relora.messages import short_name

MOST_KEPT = 1000
"""Most names that are counted; a file with columns of its own in every record would fill the memory."""

_UNDER = re.compile(r" under `.*`$")
"""End of the place of a record that is in a list in an object (`data.readers`)."""

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""


def unused_columns(fields: Mapping[str, Any], used: set[str]) -> list[str]:
    """Return the columns of a record that have a value and are not used, as messages name them."""
    return [
        f"column `{short_name(str(key))}`" for key, value in fields.items() if key not in used and value not in EMPTY
    ]


class RecordNotes:
    """Counts of what is not used of records, and of what became of their messages."""

    def __init__(self) -> None:
        self._unused: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, where: str, unused: Iterable[str], noticed: Iterable[str]) -> None:
        """Count one record.

        Args:
            where: its place.
            unused: names of what is not used of it.
            noticed: what became of its messages, one entry for each.
        """
        room = len(self._unused) < MOST_KEPT
        self._unused.update(name for name in dict.fromkeys(unused) if room or name in self._unused)
        under = [f"records read from the list{found[0]} of a file"] if (found := _UNDER.search(where)) else []
        for what in (*under, *noticed):
            self._counts[what] += 1
            self._first.setdefault(what, where)

    @property
    def lines(self) -> tuple[str, ...]:
        """Return one line for all that is not used, and one for each thing that was noticed."""
        names = [
            f"{name} ({number:,} record{'s' * (number > 1)})" for name, number in self._unused.most_common(MOST_NAMES)
        ]
        more = [f"{len(self._unused) - MOST_NAMES:,} more"] if len(self._unused) > MOST_NAMES else []
        unused = [f"not used: {', '.join(names + more)}"] if names else []
        return (*unused, *(f"{what}: {count:,}, first in {self._first[what]}" for what, count in self._counts.items()))
