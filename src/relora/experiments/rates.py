"""Learning rates as the options of `relora compare` give them: `--lr METHOD=RATE,RATE` and `--rates 0.5,1,2`."""

import math
from collections.abc import Sequence

from relora.errors import UserError


def rates_by_method(options: Sequence[str], example: str) -> dict[str, tuple[float, ...]]:
    """Read the values of `--lr`: `["lora=1e-3,2e-3"]` -> `{"lora": (1e-3, 2e-3)}`.

    Args:
        example: a correct value of the option, for the error message.

    Raises:
        UserError: a value is not METHOD=RATE,RATE, or a rate is not positive and finite.
    """
    found = {}
    for option in options:
        method, _, rates = option.partition("=")
        found[method] = parse_rates(rates, f"--lr {option}: write METHOD=RATE, e.g. {example}")
    return found


def parse_rates(text: str, mistake: str) -> tuple[float, ...]:
    """Read positive, finite numbers that commas separate; `UserError(mistake)` if that is not what `text` holds."""
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise UserError(mistake) from None
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(mistake)
    return rates
