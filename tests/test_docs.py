"""Documents and program agree: commands and options exist, links lead somewhere, the page of all keys is complete."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from docs.draw_results import PICTURE, TABLE, drawn, rows_of
from docs.generate_configuration import DOCUMENT, REQUIRED, generate
from tests.paths import ROOT

from relora.cli import app
from relora.config import FinetuneConfig, RunConfig, load_config, load_finetune_config

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "Makefile",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
]
COMMANDS = typer.main.get_command(app)


def shown(document: Path) -> list[list[str]]:
    """Every `relora VERB ...` that opens a line of code, a Makefile recipe or a comment; continuation lines joined."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:#.*|[ \t]+[^a-z\n]*(?:echo[^a-z]*)?)?\brelora ([a-z]+ .*)$", text, re.MULTILINE)
    return [shlex.split(line.rstrip('"'), comments=True) for line in lines]


def test_every_kind_of_document_shows_commands() -> None:
    assert all(shown(ROOT / name) for name in ("README.md", "Makefile", "configs/quickstart.yaml"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document: Path) -> None:
    for verb, *arguments in shown(document):
        assert verb in COMMANDS.commands, f"{document.name}: there is no `relora {verb}`"
        COMMANDS.commands[verb].make_context(verb, arguments)  # raises for an option that is not there


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def dotted(tree: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested sections to dotted keys; an empty mapping is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        path: value
        for name, below in tree.items()
        for path, value in dotted(below, f"{prefix}.{name}".removeprefix(".")).items()
    }


def complete_file(number: int) -> str:
    """Return the text of one of the two complete YAML files in docs/configuration.md."""
    return re.findall(r"^```yaml\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[number]


def test_the_page_of_all_keys_is_what_the_schema_says() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == generate(document), "run `python docs/generate_configuration.py`"


def test_the_picture_of_the_results_is_drawn_from_their_table() -> None:
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    assert {"full", "relora", "relora-scratch", "lora"} <= {row.name for row in rows}
    assert [row.name for row in rows if row.is_ours] == ["relora-scratch", "relora"]
    assert PICTURE.read_text(encoding="utf-8") == drawn(rows), "run `python docs/draw_results.py`"


@pytest.mark.parametrize("kind", [RunConfig, FinetuneConfig], ids=["pretraining", "fine-tuning"])
def test_a_complete_file_has_every_key_at_its_default(tmp_path: Path, kind: type[RunConfig | FinetuneConfig]) -> None:
    """Filled in with the required keys alone, it loads, and says nothing that the defaults do not say."""
    text = complete_file(0 if kind is RunConfig else 1)
    least = kind.model_validate(REQUIRED[kind])
    assert dotted(yaml.safe_load(text)).keys() == dotted(least.model_dump(mode="json")).keys()
    (tmp_path / "complete.yaml").write_text(text, encoding="utf-8")
    load = load_config if kind is RunConfig else load_finetune_config
    overrides = [f"{path}={value}" for path, value in dotted(REQUIRED[kind]).items()]
    assert load(tmp_path / "complete.yaml", overrides) == least


def test_the_tables_have_every_key_of_pretraining_and_short_cells() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    keys = dotted(RunConfig.model_validate(REQUIRED[RunConfig]).model_dump(mode="json")).keys()
    assert keys <= {key for key, _ in rows}
    assert [meaning for _, meaning in rows if len(meaning) > 110] == []
