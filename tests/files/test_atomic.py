"""Files that last, and can be given to others."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from relora.files.atomic import apply_umask


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_gets_the_mode_of_any_other(tmp_path: Path, mask: int, mode: int) -> None:
    file = tmp_path / "x.safetensors"
    before = os.umask(mask)
    try:
        save_file({"x": torch.zeros(1)}, file)
        apply_umask(file)
        assert stat.S_IMODE(file.stat().st_mode) == mode
        assert os.umask(mask) == mask  # as it was
    finally:
        os.umask(before)
