"""A reduced zoo: a dozen families of different kinds give the outcomes that are kept in outcomes.json.

The whole zoo is `python -m tests.zoo`, minutes long; it rewrites outcomes.json and docs/models.md.
"""

import os
from pathlib import Path

import pytest
from tests.zoo.document import DOCUMENT, document
from tests.zoo.outcomes import outcome_by_stage, read_outcomes
from tests.zoo.run import run_family
from tests.zoo.stages import STAGES
from tests.zoo.tiny_models import CANNOT_BE_BUILT, FAMILIES, tiny_config

REDUCED = (
    *("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "gpt_neo", "mamba", "qwen3_moe"),
    *("llama4_text", "falcon_h1", "gemma3n_text", "bloom"),
)
"""Families of different kinds: Conv1D, fused projections, parallel blocks, soft caps, state spaces, experts."""


@pytest.mark.parametrize("family", REDUCED)
def test_a_family_gives_the_outcomes_that_are_kept(family: str) -> None:
    record = run_family(family, cache=Path(os.environ["XDG_CACHE_HOME"]))
    texts = "\n".join(f"{name}: {found['text']} {found['place']}" for name, found in record["stages"].items())
    kept = outcome_by_stage(read_outcomes()[family])
    assert outcome_by_stage(record) == kept, f"if this is meant, run python -m tests.zoo --only {family}\n{texts}"


def test_every_family_of_transformers_has_an_outcome() -> None:
    records = read_outcomes()
    assert list(records) == list(FAMILIES), "run python -m tests.zoo --only and the new families"
    for family, record in records.items():
        assert ("cannot_be_built" in record) == (family in CANNOT_BE_BUILT), family
        if "stages" in record:
            assert set(outcome_by_stage(record)) == {"build", *STAGES}, family
            assert record["stages"]["build"]["outcome"] == "ok", family


def test_the_table_is_that_of_the_outcomes() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(read_outcomes())


def test_a_tiny_configuration_keeps_every_kind_of_layer() -> None:
    config = tiny_config("gemma2")
    assert config.hidden_size == 64 and set(config.layer_types) == {"sliding_attention", "full_attention"}
