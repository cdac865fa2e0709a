"""The commands that the documents show are commands that exist, with options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from tests.paths import ROOT

from relora.cli import app

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
