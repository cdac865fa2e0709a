"""A weight that is no number is named, with whether its file or the dtype is at fault."""

import math
from pathlib import Path

import pytest
import torch
from tests.command import call
from tests.model.small import SMALL
from tests.zoo.stages import Bench
from tests.zoo.tiny_models import make_tiny_model

from relora.errors import NonFinite, UserError
from relora.model import build_model
from relora.model.finite import check_computes, check_weights, why_not_finite

NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_the_damage_of_a_file_in_any_dtype(dtype: torch.dtype) -> None:
    model = build_model("llama-9m", SMALL, seed=0).to(dtype)
    model.get_parameter("model.embed_tokens.weight").data[3, 1] = math.inf
    model.get_parameter(NORM).data[2] = math.nan
    line = (
        rf"{NORM} holds 1 entries that are not numbers, so the checkpoint itself is damaged; copy or download it again"
    )
    with pytest.raises(NonFinite, match=line):
        check_computes(model, "somewhere")
    with pytest.raises(UserError, match=f"^somewhere: {line}"):
        check_weights(model, "somewhere")


def test_infinite_weights_are_of_the_dtype_in_fp16_alone() -> None:
    model = build_model("llama-9m", SMALL, seed=0)
    check_weights(model, "somewhere")
    model.get_parameter(NORM).data[2] = 1e6
    assert why_not_finite(model.half()).startswith(f"{NORM} holds 1 infinite entries, in float16")
    assert why_not_finite(model.float()) == f"{NORM} holds 1 infinite entries: they are in its files"
    check_weights(model, "somewhere")


def test_no_run_begins_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    bench = Bench(folder, tmp_path / "work")
    model = bench.opened()
    model.get_parameter("model.embed_tokens.weight").data[299] = math.nan  # a token that no text has
    model.save_pretrained(folder)
    for verb, config, run in (
        ("pretrain", bench.config, bench.run),
        ("finetune", bench.finetune_config, bench.tuned),
    ):
        words = ("model.embed_tokens.weight holds 64 entries that are not numbers", "damaged")
        assert call(verb, config).complaint(2, *words) is None
        assert not run.exists()
