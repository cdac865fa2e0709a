"""The table of families, docs/models.md, out of the outcomes of the zoo."""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from tests.paths import ROOT
from tests.zoo.outcomes import Record
from tests.zoo.stages import STAGES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCUMENT = ROOT / "docs" / "models.md"

OWN_STAGES = tuple(name for name in STAGES if name != "peft")
"""Stages that are the package's own doing; what PEFT makes of an adapter is a column of its own."""

HEAD = """# Models

Which families of causal language models work, by the zoo of the tests: a tiny random model of every family that
transformers {transformers} opens with `AutoModelForCausalLM` goes through these stages on a CPU in fp32.

| stage | what must hold |
|---|---|
{stages}

Written by `python -m tests.zoo` from `tests/zoo/outcomes.json`; do not edit. `refused`: the package says in one line
what is wrong and ends with status 2. A tiny random model shows that the code paths work; it says nothing about how
well a family trains.

{counts}
"""


def document(records: Mapping[str, Record]) -> str:
    """Return the text of docs/models.md."""
    built = {family: record for family, record in records.items() if "stages" in record}
    unbuilt = [family for family in records if family not in built]
    rows = [_row(family, record) for family, record in built.items()]
    stages = "\n".join(f"| {name} | {_first_sentence(stage.__doc__)} |" for name, (stage, _) in STAGES.items())
    parts = [
        HEAD.format(transformers=version("transformers"), stages=stages, counts=_counts(built)),
        "## Families\n",
        "`factors`: share of the parameters of the blocks that are in linear layers and so get factors with "
        "`target_modules: all-linear`; the rest, such as the fused experts of a mixture, trains at full rank in "
        "pretraining and is frozen in fine-tuning.\n",
        _table(("family", "class", "own stages", "factors", "PEFT", "GGUF"), rows),
        "\n## What does not work\n",
        _table(("family", "stage", "outcome", "reason"), _shortcomings(built)),
        "\n## Families of which no tiny model can be built\n",
        _table(("family", "reason"), [(family, records[family]["cannot_be_built"]) for family in unbuilt]),
    ]
    return "\n".join(parts) + "\n"


def works(record: Record) -> bool:
    """Tell whether every stage of the package's own is ok."""
    return all(record["stages"][name]["outcome"] == "ok" for name in OWN_STAGES)


def _counts(built: Mapping[str, Record]) -> str:
    """Return how many families work, and how many pass each stage."""
    working = sum(map(works, built.values()))
    passed = {name: sum(r["stages"][name]["outcome"] == "ok" for r in built.values()) for name in STAGES}
    by_stage = ", ".join(f"{name} {count}" for name, count in passed.items())
    share = working / max(len(built), 1)
    sentence = f"Of {len(built)} families, {working} ({share:.0%}) pass every stage of the package's own."
    return f"{sentence} By stage: {by_stage}."


def _row(family: str, record: Record) -> tuple[str, ...]:
    """Return the row of a family that can be built."""
    stages = record["stages"]
    failing = [name for name in OWN_STAGES if stages[name]["outcome"] in ("refused", "failed")]
    own = "work" if works(record) else ", ".join(f"{name} {stages[name]['outcome']}" for name in failing)
    share = stages["inject"].get("notes", {}).get("share")
    gguf = stages["export"].get("notes", {}).get("gguf", "")
    return (
        family,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family],
        own,
        "" if share is None else f"{share:.0%}",
        {"ok": "ok", "failed": "differs", "refused": "refused", "not run": ""}[stages["peft"]["outcome"]],
        "yes" if gguf == "ok" else "no" if gguf else "",
    )


def _shortcomings(built: Mapping[str, Record]) -> Iterable[tuple[str, ...]]:
    """Yield the stages that were refused or failed, by family, with their messages."""
    for family, record in built.items():
        for name in STAGES:
            found = record["stages"][name]
            if found["outcome"] in ("refused", "failed"):
                yield family, name, found["outcome"], _cell(found.get("text", ""))


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring, with the marks of a table cell escaped."""
    return _cell((text or "").strip().partition("\n")[0])


def _cell(text: str) -> str:
    """Return a text for a table cell: one line, at most 240 characters."""
    line = re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
    return line if len(line) <= 240 else f"{line[:239]}…"
