"""Division of parameters among processes: every row is somebody's, and a layer's rows go together."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank.config import LowRankConfig
from relora.lowrank.costs import NOMINAL_RATES
from relora.lowrank.divided_layer import check_divisible, divide_layer_
from relora.lowrank.division import Division, Part, divide_, division_of, part_of, whole_shape
from relora.lowrank.linear import LowRankLinear


def refuse(*_: object) -> Tensor:
    raise AssertionError("nothing is exchanged here")


def divisions(count: int) -> list[Division]:
    return [Division(rank, count, refuse, refuse, nullcontext) for rank in range(count)]


@given(size=st.integers(1, 40), count=st.integers(1, 9))
def test_the_parts_are_those_of_chunk(size: int, count: int) -> None:
    whole = torch.arange(size)
    parts = [whole[division.own(size)] for division in divisions(count)]
    chunks = list(torch.chunk(whole, count))
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=False))
    assert sum(map(len, parts)) == size


@given(dim=st.integers(0, 1), count=st.integers(1, 5))
def test_a_parameter_remembers_its_whole(dim: int, count: int) -> None:
    whole = torch.randn(6, 7)
    parts = []
    for division in divisions(count):
        parameter = nn.Parameter(whole.clone())
        divide_(parameter, division, dim)
        assert whole_shape(parameter) == whole.shape and part_of(parameter) == Part(division, dim, whole.shape[dim])
        assert parameter.is_contiguous()
        parts.append(parameter.detach())
    assert torch.equal(torch.cat(parts, dim), whole)


def test_scalars_and_models_that_were_not_divided_stay_whole() -> None:
    scalar = nn.Parameter(torch.tensor(2.0))
    divide_(scalar, divisions(2)[1])
    assert part_of(scalar) is None and whole_shape(scalar) == torch.Size()
    assert division_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("base", ["auto", "bf16", "int8", "nf4"])
def test_the_rows_of_a_layer_are_stored_as_in_the_whole(base: str) -> None:
    """Codes, scales, master and factors of the parts, put together, are those of the undivided layer."""

    def layer() -> LowRankLinear:
        torch.manual_seed(0)
        config = LowRankConfig(r=3, base=base, rates=NOMINAL_RATES)  # type: ignore[arg-type]
        return LowRankLinear(nn.Linear(64, 10), config, name="layer", seed=1)

    whole, parts = layer(), [layer() for _ in range(3)]
    for division, part in zip(divisions(3), parts, strict=True):
        divide_layer_(part, division)
        assert part.base.rows == part.base.shape[0] == len(part.lora_B)
        assert torch.equal(part.base.exact, whole.base.exact[division.own(10)])
    for name in ("weight", "lora_A", "lora_B", *whole.divided_buffers):
        if (tensor := getattr(whole, name)) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), tensor), name


def test_codes_that_two_parts_would_share_are_refused() -> None:
    check_divisible("layer", 10, 64, 3)
    check_divisible("layer", 64, 176, 2)
    with pytest.raises(UserError, match=r"lowrank.base: nf4 codes of layer .* 3 processes"):
        check_divisible("layer", 64, 176, 3)
