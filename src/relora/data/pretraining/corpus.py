"""The documents of all sources of text, in a fixed order.

A document is the text in one field of a record (`text_field`), or a plain text file, or one of several in it with
separators between them; a long one is cut at blank lines (see `data.plain_text`). `data.sources` says which sources
there are and how they are read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from relora.data.plain_text import PLAIN_TEXT_KINDS, Separators, separators_of
from relora.data.pretraining.shards import Source
from relora.data.readers import column_names, file_kind
from relora.data.sources import ResolvedSource, SourceReader
from relora.errors import UserError


class Corpus(SourceReader[str]):
    """The documents of all sources, in order, as often as asked.

    Args:
        sources: paths or hub ids, see `data.sources`.
        text_field: field of JSON records, column of tables.
        take: at most this many documents of each source.
        skip_bad: count records that cannot be used instead of refusing them.
        leave_out: a folder whose files are no part of a source that contains it: the one that is being written.

    Raises:
        UserError: a source is not there; while reading, that a file or record cannot be used.
    """

    preferred_kinds = (".txt", ".md", ".jsonl", ".parquet")
    item_name = "text"
    skip_option = "--skip-bad"
    field_option: ClassVar[str] = "--text-field"
    """The name under which the user knows `text_field`."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        text_field: str = "text",
        take: int | None = None,
        skip_bad: bool = False,
        leave_out: Path | None = None,
    ) -> None:
        super().__init__(sources, column=text_field, skip_bad=skip_bad, leave_out=leave_out)
        self._text_field = text_field
        self._take = take
        self.noticed = self.separators
        """Separators that are counted where they are trained as text."""
        self.separators_in_text = 0
        """Separators that part nothing, since they stand inside a text, in the last or current pass."""

    def part_at(self, given: str | None, eos: str) -> None:
        """Set what parts the documents of a plain text file; a record of any other kind of file is one document.

        Args:
            given: the user's separator; without one, the defaults of `separators_of` do it.
            eos: text of the tokenizer's EOS token.

        Raises:
            UserError: a separator is given that cannot be used, or no source is a plain text file.
        """
        self.separators = separators_of(given, eos)
        self.noticed = Separators(tuple(dict.fromkeys([*self.separators.texts, *separators_of(None, eos).texts])))
        if given is not None and not self.has_plain_text:
            raise UserError(
                f"--document-separator: parts plain text files ({', '.join(PLAIN_TEXT_KINDS)}), and the sources have "
                "none; a record of another kind of file is one document"
            )

    def is_parted(self) -> bool:
        """Return whether a plain text file holds a separator that parts documents, reading up to the first one."""
        return self.has_plain_text and (any(self.parted_at for _ in self.documents()) or self.parted_at > 0)

    @property
    def has_plain_text(self) -> bool:
        """Whether a source has a plain text file."""
        return any(
            file_kind(file) in PLAIN_TEXT_KINDS
            for source in self.sources
            if not source.is_saved_dataset
            for file in source.files
        )

    @property
    def total_bytes(self) -> int | None:
        """Bytes on disk of all sources; None when one is streamed, or `take` may end one early."""
        if self._take is not None or not all(source.files for source in self.sources):
            return None
        return sum(sum(source.sizes) for source in self.sources)

    def identity(self) -> tuple[Source, ...]:
        """Return each source with a fingerprint; when these are equal, the documents are equal, too."""
        return tuple(
            Source(
                source=source.name.encode(errors="surrogateescape").decode(errors="backslashreplace"),
                files=len(source.files),
                bytes=source.bytes,
                fingerprint=source.fingerprint,
            )
            for source in self.sources
        )

    def documents(self) -> Iterator[str]:
        """Yield all documents, in one pass; none of them is empty."""
        self.start_pass()
        self.separators_in_text = 0
        for source in self.sources:
            yield from islice(self._source_documents(source), self._take)

    def samples(self, text_chars: int) -> Iterator[str]:
        """Yield whole documents of about `text_chars` characters in all.

        Every file gives the same share of them, from its beginning.
        """
        parts = sum(max(1, len(source.files)) for source in self.sources)
        for source in self.sources:
            for part in self.parts(source):
                remaining_chars = text_chars // parts
                for text in islice(part, self._take):
                    yield text
                    remaining_chars -= len(text)
                    if remaining_chars <= 0:
                        break

    def bad(self, message: str) -> None:
        """Raise `UserError` about a record or file that cannot be used, or count it; see `SourceReader.bad`."""
        lacks_text = re.search(r": no (field|column) `", message)
        super().bad(f"{message}; {self.field_option} names another" if lacks_text else message)

    def item_of(self, where: str, fields: Mapping[str, Any]) -> str | None:
        """Return the text of a record; None if it is empty, since there is nothing to train on, or not a text."""
        field = self._text_field
        if field not in fields:
            self.bad(f"{where}: no field `{field}`; there are {column_names(fields)}")
            return None
        text = fields[field]
        if not isinstance(text, str):
            self.bad(f"{where}: field `{field}` is not text but {type(text).__name__}")
            return None
        if not text.isascii() and not _is_unicode(text):
            self.bad(f"{where}: half of a surrogate pair in field `{field}`")
            return None
        self.separators_in_text += self.noticed.count(text)
        return text or None

    def _source_documents(self, source: ResolvedSource) -> Iterator[str]:
        """Yield the documents of a source, file by file."""
        for part in self.parts(source):
            yield from part


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded; JSON can spell half of a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
