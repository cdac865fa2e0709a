"""A hundredth of the campaign: every row passes, and the peak stands in it."""

from tests.faults.large import campaign


def test_large_sources() -> None:
    rows = campaign(1, 0)
    assert len(rows) == 3 and all(passed == of and "MB of memory" in what for what, passed, of in rows), rows
