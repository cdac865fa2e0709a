"""Plain text files: one document, or several with a separator between them; a long document in pieces.

    one.<|endoftext|> in a line of its own       the layout of GPT-2's training text and of TinyStories
    two.

A separator parts documents where it is a line of its own, with at most `MOST_BLANKS` spaces or tabs on each side; the
line belongs to neither document. One that the user names parts them wherever it stands. A document that is only white
space between two separators is none.

A document of up to `WHOLE_FILE_CHARS` characters is one record. A longer one, which is more likely a book, is cut at
blank lines into records of `PIECE_CHARS` to 2 * `PIECE_CHARS` characters, so memory is bounded. Joined, the pieces are
the whole document.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from relora.data.tokenizer import END_OF_TEXT
from relora.errors import UserError
from relora.messages import short_name

PLAIN_TEXT_KINDS = (".txt", ".md")

WHOLE_FILE_CHARS = 128 * 1024
"""Characters up to which a document of a plain text file is one record."""

PIECE_CHARS = 32 * 1024
"""A longer document is cut into records of `PIECE_CHARS` to 2 * `PIECE_CHARS` characters."""

LONGEST_SEPARATOR = 1000
"""Most characters of a separator."""

MOST_BLANKS = 16
"""Most spaces and tabs on either side of a separator that is still a line of its own."""

LOOKAHEAD = LONGEST_SEPARATOR + MOST_BLANKS + 1
"""Characters that have to be known behind the place where a separator may begin."""

LINE_BEGIN = re.compile(rf"(\n)[ \t]{{0,{MOST_BLANKS}}}\Z")
LINE_END = re.compile(rf"[ \t]{{0,{MOST_BLANKS}}}(\n|\Z)")

BadRecord = Callable[[str], None]
"""Callback that is given one line about a record that cannot be used; it raises an exception or counts the record."""


@dataclass(frozen=True)
class Separators:
    """Texts that stand between the documents of a plain text file.

    Raises:
        UserError: a text is empty, or longer than `LONGEST_SEPARATOR`.
    """

    texts: tuple[str, ...] = (END_OF_TEXT,)
    anywhere: bool = False
    """Whether they part documents inside a line, too."""

    def __post_init__(self) -> None:
        for text in self.texts:
            if not 0 < len(text) <= LONGEST_SEPARATOR:
                raise UserError(
                    f"--document-separator: {len(text):,} characters; give at least 1 and at most {LONGEST_SEPARATOR:,}"
                )

    def __str__(self) -> str:
        """Return the separators for a message."""
        return " or ".join(f"`{short_name(text)}`" for text in self.texts)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.texts, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first)))

    def count(self, text: str) -> int:
        """Return how often a separator stands in `text`, wherever it is."""
        return sum(1 for _ in self._pattern.finditer(text)) if any(part in text for part in self.texts) else 0

    def spans(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the (begin, end) of what parts documents: a whole line, or the separator alone inside a line.

        Args:
            text: begins with the character before `start`.
            start: where to begin, at least 1.
            stop: a separator that ends behind it is not yet looked at.
        """
        for found in self._pattern.finditer(text, start):
            begin, end = found.span()
            if end > stop:
                return
            before = LINE_BEGIN.search(text, max(0, begin - MOST_BLANKS - 1), begin)
            after = LINE_END.match(text, end)
            if before and after:
                yield before.end(1), after.end()
            elif self.anywhere:
                yield begin, end


def separators_of(given: str | None, eos: str) -> Separators:
    """Return what parts documents: the text that the user gives; without one `<|endoftext|>` and the EOS token's text.

    An EOS that is a word could be a line of its own in any text, so only one with other characters counts.
    """
    if given is not None:
        return Separators((given.replace("\r\n", "\n").replace("\r", "\n"),), anywhere=True)
    is_marked = 2 < len(eos) <= LONGEST_SEPARATOR and not eos.isalnum() and not re.search(r"\s", eos)
    return Separators(tuple(dict.fromkeys([END_OF_TEXT, *([eos] if is_marked else [])])))


def read_text(
    stream: BinaryIO,
    name: str,
    bad: BadRecord,
    column: str | None = None,
    *,
    separators: Separators = Separators(),
    note_separator: Callable[[], None] = lambda: None,
    cut: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Yield the documents of a plain UTF-8 text, long ones in pieces, as records of one field.

    Line ends become \\n, and a byte order mark is dropped. A document that holds a NUL character is reported to `bad`.

    Args:
        stream: the file's bytes, decompressed.
        name: of the file.
        bad: see `readers`.
        column: name of the field; `text` unless given.
        separators: what parts documents.
        note_separator: called at every separator.
        cut: cut long documents into pieces; otherwise the file is read as a whole.
    """
    field = column or "text"
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    document, piece = 1, 0
    try:
        for text, at_separator, is_piece in _parts(reader, separators, cut):
            piece += is_piece
            is_numbered = document > 1 or (at_separator and not is_piece)
            where = f"{name}, document {document}" if is_numbered else name
            where += f", piece {piece}" if is_piece else ""
            if "\0" in text:
                bad(f"{where}: holds a NUL character, so it is not plain UTF-8 text; convert it, e.g. with iconv")
            elif text.strip() or (text if is_piece else not is_numbered):
                yield where, {field: text}
            if at_separator:
                note_separator()
                document, piece = document + 1, 0
    finally:
        reader.detach()  # closing the stream is left to the caller


def _parts(reader: io.TextIOWrapper, separators: Separators, cut: bool) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, whether a separator follows, whether it is one of several pieces) of a file, in order."""
    text, start, at_end = "\n", 1, False  # `text` begins with the character before `start`, the file as after a line
    in_pieces = False
    while not at_end:
        more = reader.read(WHOLE_FILE_CHARS if cut else -1)
        text, start, at_end = text[start - 1 :] + more, 1, not (more and cut)
        for begin, end in separators.spans(text, start, len(text) if at_end else len(text) - LOOKAHEAD):
            yield from _closed(text[start:begin], in_pieces, cut, at_separator=True)
            start, in_pieces = end, False
        enough = 2 * PIECE_CHARS + 2 * LOOKAHEAD  # no separator begins in the first 2 * PIECE_CHARS
        while not at_end and len(text) - start > (enough if in_pieces else WHOLE_FILE_CHARS):
            piece = text[start : start + piece_end(text[start : start + 2 * PIECE_CHARS], PIECE_CHARS)]
            yield piece, False, True
            start, in_pieces = start + len(piece), True
    yield from _closed(text[start:], in_pieces, cut, at_separator=False)


def _closed(text: str, in_pieces: bool, cut: bool, at_separator: bool) -> Iterator[tuple[str, bool, bool]]:
    """Yield the end of a document as `_parts` does; its beginning has been yielded already if `in_pieces`."""
    if not cut or (not in_pieces and len(text) <= WHOLE_FILE_CHARS):
        yield text, at_separator, False
        return
    pieces = list(pieces_of_about(text, PIECE_CHARS)) or [""]
    for number, piece in enumerate(pieces, start=1):
        yield piece, at_separator and number == len(pieces), True


def pieces_of_about(text: str, chars: int) -> Iterator[str]:
    """Yield a text in pieces of `chars` to 2 * `chars` characters, the last of which may be shorter."""
    start = 0
    while start < len(text):
        piece = text[start : start + 2 * chars]
        piece = piece[: piece_end(piece, chars)]
        yield piece
        start += len(piece)


def piece_end(text: str, chars: int) -> int:
    """Return where to end a piece: after the first blank line behind `chars`, else a line end, else a space.

    A text of fewer than 2 * `chars` characters is the last piece, and is not cut.
    """
    if len(text) < 2 * chars:
        return len(text)
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, chars)
        if found >= 0:
            return found + len(separator)
    return len(text)
