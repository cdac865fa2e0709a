"""Settings of the low-rank layers that cannot be are refused where they are given, also from Python."""

import math

import pytest

from relora.errors import UserError
from relora.lowrank import LowRankConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "int4"}, r"lowrank\.base: 'int4' is none of auto, fp32, bf16, int8, nf4"),
        ({"frozen": "fp8"}, r"lowrank\.frozen: 'fp8' is none of native, bf16, int8"),
        ({"init": "zero"}, r"lowrank\.init: 'zero' is none of"),
        ({"rest": "all"}, r"lowrank\.rest: 'all' is none of trained, frozen"),
        ({"lora_dropout": 1.0}, r"lowrank\.lora_dropout: 1\.0 must be at least 0 and less than 1"),
        ({"lora_dropout": math.nan}, r"lowrank\.lora_dropout"),
        ({"lora_alpha": 0.0}, r"lowrank\.lora_alpha: 0\.0 must be a positive number"),
        ({"lora_alpha": math.inf}, r"lowrank\.lora_alpha"),
    ],
)
def test_an_impossible_setting_names_its_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowRankConfig(**settings)
