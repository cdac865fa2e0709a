"""Held-out text: whole documents, or parts of them where there are too few documents.

A hash of its text decides about each document (`sampling.SplitRule`), so the share is met on average. Few documents may
leave a split empty. Then the one document with the lowest hash is held out. Where that would be more than `MOST_EXCESS`
times the share, e.g. where there is only one document, parts of documents are held out instead: a document is cut at
blank lines, or where there are none at line ends or spaces, into parts of about a hundredth of its length
(`FEWEST_CHARS` to `MOST_CHARS`, and up to twice as much), and the hash decides about each part. Neighbours on the same
side stay together: they are one document, which ends in EOS only where the side changes.

In both cases equal texts are on the same side.
"""

from collections.abc import Callable, Iterable, Iterator

from relora.data.plain_text import pieces_of_about
from relora.data.sampling import DRAWS, SplitRule
from relora.errors import UserError

MOST_EXCESS = 4
PARTS = 100
FEWEST_CHARS = 200
MOST_CHARS = 8192


def settle(documents: Callable[[], Iterable[str]], share: float, seed: int) -> tuple[int, bool]:
    """Return the threshold below which a text is held out, and whether it decides about parts of documents.

    The documents are read until both splits have one of them, which is soon where there are many.

    Args:
        documents: returns all documents, each time anew.
        share: of the text that is to be held out.
        seed: keys the hash.

    Raises:
        UserError: there is no text, or too little to hold any out.
    """
    rule = SplitRule(seed, int(share * DRAWS))
    if share == 0:
        return 0, False
    count = 0
    for within_documents in (False, True):
        lowest, highest, held_out, total = DRAWS, -1, 0, 0
        for text in _parts(documents()) if within_documents else documents():
            draw = rule.draw(text)
            if draw < lowest:
                held_out = 0
            held_out += len(text) if draw <= lowest else 0
            lowest, highest = min(draw, lowest), max(draw, highest)
            total += len(text)
            count += not within_documents
            if lowest < rule.threshold <= highest:
                return rule.threshold, within_documents
        if lowest < highest and (within_documents or held_out <= MOST_EXCESS * share * total):
            return lowest + 1, within_documents
    raise UserError(
        f"{count} document(s), too few to hold any out; "
        "give more text, or --validation 0 and prepare a validation folder from other text"
        if count
        else "the sources hold no text"
    )


def runs(texts: Iterable[str], rule: SplitRule) -> Iterator[tuple[str, bool]]:
    """Yield the texts in runs of parts on the same side: (joined parts, whether they are held out)."""
    for text in texts:
        run: list[str] = []
        side = False
        for part in _parts([text]):
            is_held_out = rule.is_held_out(part)
            if run and is_held_out != side:
                yield "".join(run), side
                run = []
            run.append(part)
            side = is_held_out
        yield "".join(run), side


def _parts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the parts of each text."""
    for text in texts:
        yield from pieces_of_about(text, min(MOST_CHARS, max(FEWEST_CHARS, len(text) // PARTS)))
