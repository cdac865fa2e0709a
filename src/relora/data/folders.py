"""The files of a folder: which of them are data, and what else the folder holds, counted, so that it can be said.

Each use prefers some kinds of files: documents are usually in .txt, .md, .jsonl and .parquet files, records in .json,
.jsonl, .csv, .tsv and .parquet files. A folder that has files of the preferred kinds gives only those, because the
other ones are usually about the data (a licence beside records, a `dataset_infos.json` beside documents); a folder
that has none gives all readable files. Linked files are read, linked folders are not entered.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from relora.data.readers import COMPRESSIONS, file_kind
from relora.messages import short_name

MOST_SHOWN = 8
"""Most kinds of files that a line about a folder lists."""

OTHER, UNKNOWN, LINK, FOLDER, SPECIAL, README, HIDDEN, SPLIT = REASONS = (
    "read only where a folder has none of the preferred kinds",
    "not a kind that can be read",
    "broken link",
    "linked folder",
    "pipe or device",
    "README",
    "hidden",
    "another split of the dataset",
)
"""Why a file of a folder is not read; what is most likely a mistake comes first."""

PLAIN_REASONS = (HIDDEN, README, LINK, SPECIAL, FOLDER)
"""Reasons for which the kind of a file does not matter."""


@dataclass(frozen=True)
class LeftOut:
    """Files of a folder that are not read, of one kind and for one reason."""

    why: str
    """One of `REASONS`."""
    kind: str
    """Suffix of the files; the name of a split; empty where there is none, or it does not matter."""
    files: int
    bytes: int

    def __str__(self) -> str:
        """Return a part of a line, such as `3 .png (1.2 MB)`."""
        size = f" ({format_size(self.bytes)})" if self.bytes else ""
        what = {
            UNKNOWN: self.kind or "without a suffix",
            OTHER: self.kind,
            SPLIT: f"of split `{short_name(self.kind)}`",
        }
        plural = "s" if self.files > 1 and self.why in (LINK, FOLDER) else ""
        return f"{self.files:,} {what.get(self.why, self.why)}{plural}{size}"


def files_of(path: Path, preferred_kinds: Sequence[str], excluded: Path | None) -> tuple[list[Path], list[LeftOut]]:
    """Return the files of a folder to read, sorted by path, and what is left out.

    Args:
        path: the folder.
        preferred_kinds: the kinds to which it is restricted if it has any of them.
        excluded: an absolute path of a folder whose files are passed over, uncounted: the one that is being written.

    Raises:
        OSError: a folder cannot be listed.
    """
    readable: list[Path] = []
    unread: list[tuple[str, Path]] = []
    for file in sorted(_walk(path, excluded)):
        why = _why_unreadable(file, file.relative_to(path))
        if why is None:
            readable.append(file)
        else:
            unread.append((why, file))
    chosen = [file for file in readable if file_kind(file) in preferred_kinds] or readable
    others = set(readable) - set(chosen)
    return chosen, _counted([*unread, *((OTHER, file) for file in readable if file in others)])


def dataset_files(path: Path, excluded: Path | None) -> tuple[list[Path], list[LeftOut]]:
    """Return all files of a folder from `datasets.save_to_disk`, and those of splits that are not read.

    Args:
        path: the folder.
        excluded: see `files_of`.

    Raises:
        OSError: a folder cannot be listed.
    """
    files = [file for file in sorted(_walk(path, excluded)) if file.is_file()]
    sizes: dict[str, list[int]] = {}
    if (path / "dataset_dict.json").exists():  # a folder for each split
        for file in files:
            split, *inner = file.relative_to(path).parts
            if inner and split != "train":
                sizes.setdefault(split, []).append(file.stat().st_size)
    return files, [LeftOut(SPLIT, split, len(each), sum(each)) for split, each in sizes.items()]


def describe(left_out: Sequence[LeftOut], preferred_kinds: Sequence[str]) -> str:
    """Return one line about what is left out of a folder, and how it could be read."""
    shown = [str(one) for one in left_out[:MOST_SHOWN]]
    if more := sum(one.files for one in left_out[MOST_SHOWN:]):
        shown.append(f"{more:,} more")
    line = ", ".join(shown)
    if any(one.why == OTHER for one in left_out):
        kinds = sorted({one.kind for one in left_out if one.why == OTHER})
        line += (
            f"; a folder that has {', '.join(preferred_kinds)} files gives only those: name its {', '.join(kinds)} "
            "files themselves to read them, too"
        )
    for why, what in ((SPLIT, "the folder of a split"), (FOLDER, "a linked folder")):
        if any(one.why == why for one in left_out):
            line += f"; name {what} to read it"
    return line


def format_size(size: int) -> str:
    """Return a number of bytes in bytes, kB, MB or GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _walk(path: Path, excluded: Path | None) -> Iterator[Path]:
    """Yield everything below a folder but the folders themselves; linked folders are not entered but yielded."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(path, onerror=refuse):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for file in (Path(root, name) for name in (*names, *links)):
            if excluded is None or excluded not in file.absolute().parents:
                yield file


def _why_unreadable(file: Path, relative: Path) -> str | None:
    """Return why a file in a folder is not data; None if it can be read."""
    if any(part.startswith(".") for part in relative.parts):
        return HIDDEN
    if file.is_dir():
        return FOLDER
    if relative.name.startswith("README"):
        return README
    if not file.is_file():
        return SPECIAL if file.exists() else LINK
    return UNKNOWN if file_kind(file) is None else None


def _counted(unread: Iterable[tuple[str, Path]]) -> list[LeftOut]:
    """Count files by reason and kind; the most frequent ones of each reason first."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for why, file in unread:
        key = (why, "" if why in PLAIN_REASONS else _suffix(file))
        counts[key] += 1
        sizes[key] += file.stat().st_size if file.is_file() else 0
    ordered = sorted(counts, key=lambda key: (REASONS.index(key[0]), -counts[key], key[1]))
    return [LeftOut(*key, counts[key], sizes[key]) for key in ordered]


def _suffix(file: Path) -> str:
    """Return the suffix of a file, in small letters, with that below a compression; a number is no suffix."""
    name = Path(file.name.lower())
    inner = Path(name.stem).suffix if name.suffix in COMPRESSIONS else ""
    suffix = name.suffix
    return short_name("" if suffix[1:].isdigit() else inner + suffix)
