"""Model folders and a tokenizer to save with them."""

import json
from pathlib import Path

import pytest
import torch
from tests.model.small import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(33 + number): number for number in range(94)}
    core = Tokenizer(models.BPE(vocab={**letters, "<eos>": 94}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    folder = tmp_path_factory.mktemp("tokenizer")
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of each family, saved by transformers."""
    torch.manual_seed(0)
    folder = tmp_path / request.param
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(folder)
    return folder
