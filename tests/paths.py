"""Where the tests find what lies outside of `tests/`."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CORPUS = ROOT / "corpus"
DATA = Path(os.environ.get("RELORA_DATA", ROOT.parent / "shared" / "data"))
"""Corpora, tokenizers and models that are too large for the repository; tests that need them skip without it."""
