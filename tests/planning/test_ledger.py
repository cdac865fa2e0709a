"""The ledger counts the bytes that tensors take while they live, and the seconds of their operations."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora.lowrank.costs import Rates
from relora.planning.ledger import Ledger

RATES = Rates(fp32=((1, 1e9), (64, 1e11)), bf16=2e11, int8=4e11, bandwidth=1e10)


def test_bytes_and_seconds_of_a_product() -> None:
    ledger = Ledger(torch.device("cpu"), RATES)
    with FakeTensorMode(), ledger:
        left, right = torch.empty(100, 200), torch.empty(200, 300)
        before = ledger.live.total()
        ledger.seconds = 0.0
        result = left @ right
        assert before == 4 * (100 * 200 + 200 * 300)
        assert ledger.live.total() == before + 4 * 100 * 300
        assert ledger.seconds == pytest.approx(2 * 100 * 200 * 300 / 1e11)
        del result
        assert ledger.live.total() == before and ledger.peak.total() == before + 4 * 100 * 300
