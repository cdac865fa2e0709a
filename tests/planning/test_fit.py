"""The search for the fastest configuration that fits finds what trying every candidate finds."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from relora.planning.fit import Candidate, Fit, best_fit

LISTS = {"micro_sequences": (1, 2, 4, 8), "activation_checkpointing": ("none", "full"), "bases": ("fp32", "int8")}


@given(
    limit=st.integers(1, 4000),
    per_sequence=st.integers(1, 200),
    fixed=st.integers(0, 500),
    slower=st.floats(1.01, 2),
    rank_bytes=st.integers(0, 20),
)
def test_the_fastest_that_fits_is_found(
    limit: int, per_sequence: int, fixed: int, slower: float, rank_bytes: int
) -> None:
    def cost(candidate: Candidate) -> tuple[int, float]:
        kept = per_sequence // (3 if candidate.activation_checkpointing == "full" else 1)
        base = fixed // (4 if candidate.base == "int8" else 1)
        seconds = (slower if candidate.activation_checkpointing == "full" else 1.0) + 1 / candidate.micro_sequences
        return base + kept * candidate.micro_sequences + rank_bytes * candidate.r, seconds

    fit = best_fit(cost, limit, ranks=(16, 8), **LISTS)  # type: ignore[arg-type]
    for r in (16, 8):
        every = [Candidate(*choice, r) for choice in product(*LISTS.values())]  # type: ignore[arg-type]
        fits = [Fit(candidate, *cost(candidate)) for candidate in every if cost(candidate)[0] <= limit]
        if fits:
            assert fit is not None and fit in fits and fit.seconds == min(other.seconds for other in fits)
            return
    assert fit is None
