"""A folder of the user for figures that were measured on this machine."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Where what was measured of this machine is kept for later processes; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relora"
