"""Learning rates of the command line: what is read, and which mistakes are named."""

import pytest

from relora.errors import UserError
from relora.experiments.rates import parse_rates, rates_by_method


def test_rates_are_read_by_method() -> None:
    assert rates_by_method([], "lora=1e-3") == {}
    found = rates_by_method(["full=1e-3", "lora=1e-3,2e-3", "full=5"], "lora=1e-3")
    assert found == {"full": (5.0,), "lora": (1e-3, 2e-3)}  # the last one of a method counts


@pytest.mark.parametrize("rates", ["", "fast", "1e-3,", "0", "-1", "nan", "inf"])
def test_what_is_no_rate_is_refused(rates: str) -> None:
    with pytest.raises(UserError, match=rf"^--lr lora={rates}: write METHOD=RATE, e\.g\. lora=1e-3$"):
        rates_by_method([f"lora={rates}"], "lora=1e-3")
    with pytest.raises(UserError, match=r"^--rates: write multiples$"):
        parse_rates(rates, "--rates: write multiples")
