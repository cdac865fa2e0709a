"""Output of a run for people: metrics.jsonl, the console, trackers, the HTML report. Imports no other wing."""

from relora.report.console import Console
from relora.report.html import write_report
from relora.report.metrics import JsonLines, mean_effective_rank, mean_relative_update, read_json_lines
from relora.report.reporter import Reporter
from relora.report.trackers import Tracker, open_trackers

__all__ = [
    "Console",
    "JsonLines",
    "Reporter",
    "Tracker",
    "mean_effective_rank",
    "mean_relative_update",
    "open_trackers",
    "read_json_lines",
    "write_report",
]
