"""Fingerprints of the data and the model that a configuration only points at; they are saved with every checkpoint."""

import hashlib
from pathlib import Path

from relora.runs.changes import SAMPLE, WHOLE


def held_out_choice(measured: int, whole: int) -> str:
    """Return how held-out tokens are chosen in training, as it stands in the manifest of a checkpoint."""
    return SAMPLE if measured < whole else WHOLE


def fingerprint_of(*parts: bytes) -> str:
    """Hash of the contents that a run depends on; saved with its checkpoints."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def file_digest(file: Path) -> bytes:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()
