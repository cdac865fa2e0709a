"""The cache folder of the user, for figures that were measured on this machine."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder in which measurements of this machine are kept for later processes; it may not exist yet.

    It is `$XDG_CACHE_HOME/relora`, or `~/.cache/relora` if that variable is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relora"
