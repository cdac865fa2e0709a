"""The kept outcomes of the zoo: what docs/models.md is written from, and what the reduced zoo must give again."""

import json
from pathlib import Path
from typing import Any

OUTCOMES = Path(__file__).with_name("outcomes.json")

Record = dict[str, Any]
"""Outcomes of one family, as `tests.zoo.run` gives them."""


def read_outcomes() -> dict[str, Record]:
    """Return the kept records by family; none if there is no file."""
    if not OUTCOMES.exists():
        return {}
    records: dict[str, Record] = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return records


def write_outcomes(records: dict[str, Record]) -> None:
    """Keep records, without the seconds that a stage took."""
    kept = {family: _without_seconds(record) for family, record in records.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(record, ensure_ascii=False)}" for name, record in kept.items()]
    OUTCOMES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # a line for each family


def outcome_by_stage(record: Record) -> dict[str, str]:
    """Return stage -> `ok`, `refused`, `failed` or `not run`."""
    return {name: stage["outcome"] for name, stage in record.get("stages", {}).items()}


def _without_seconds(tree: Any) -> Any:
    """Return a copy of a JSON tree without the keys `seconds` and `stage`, and without empty texts and notes."""
    if isinstance(tree, dict):
        kept = {key: value for key, value in tree.items() if key not in ("seconds", "stage") and value not in ("", {})}
        return {key: _without_seconds(value) for key, value in kept.items()}
    return tree
