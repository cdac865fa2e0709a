"""The reporter of a rank that does not write: with several processes, rank 0 reports for all of them."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from relora.report.metrics import Record
from relora.report.reporter import Reporter

_Item = TypeVar("_Item")


class SilentReporter(Reporter):
    """Reporter that writes no file and shows nothing."""

    def __init__(self) -> None:
        pass

    def train(self, record: Record) -> None:
        pass

    def incident(self, record: Record) -> None:
        pass

    def evaluation(self, record: Record) -> None:
        pass

    def final(self, record: Record) -> None:
        pass

    def measuring(self, batches: Iterable[_Item], total: int, size: str) -> Iterable[_Item]:
        return batches

    def decision(self, record: Record) -> None:
        pass

    def restart(self, record: Record) -> None:
        pass

    def progress(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def positions(self) -> dict[str, int]:
        """Return the names of the metric files, which rank 0 writes."""
        return {"metrics.jsonl": 0, "restarts.jsonl": 0}

    def rewind(self, positions: Mapping[str, int]) -> None:
        pass

    def rewinds_to(self, step: int) -> list[Record]:
        """Return nothing: rank 0 reads its file."""
        return []

    def close(self) -> None:
        pass
