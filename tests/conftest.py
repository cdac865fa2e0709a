"""What several test files share: one small prepared folder of real text."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tests.paths import CORPUS

from relora.data.pretraining.prepare import prepare

settings.register_profile("relora", deadline=None)  # a busy machine is not a failure
settings.load_profile("relora")
torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and sums must not depend on it


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured under the load of a test suite must not stay with the user."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pages of the packaged corpus in 512 ids: `train` and `validation`."""
    folder = tmp_path_factory.mktemp("prepared")
    book = sorted(CORPUS.glob("*.txt"))[0].read_text(encoding="utf-8")
    for part in range(20):
        (folder / f"{part:02}.txt").write_text(book[part * 2000 : (part + 1) * 2000], encoding="utf-8")
    prepare([str(folder)], folder / "out", tokenizer=None, train_tokenizer=512, validation=0.2, workers=1)
    return folder / "out"
