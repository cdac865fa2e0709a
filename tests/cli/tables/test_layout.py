"""The form that all tables share."""

import pytest
from rich.table import Column
from tests.cli.tables.screen import Screen

from relora.cli.tables.layout import build_table, console_or_stdout

ROWS = [["lora", "7"], ["relora", "12"]]


def columns() -> list[Column]:
    return [Column("method"), Column("loss", justify="right")]


def test_a_table_without_a_title_is_plain() -> None:
    screen = Screen()
    screen.print(build_table(columns(), ROWS))
    assert screen.text == "method  loss\nlora       7\nrelora    12"


def test_a_table_with_a_title_has_a_frame() -> None:
    screen = Screen()
    screen.print(build_table(columns(), ROWS, title="methods"))
    lines = screen.text.splitlines()
    assert lines[0] == "methods" and lines[1].startswith("┏") and lines[-1].startswith("└")


def test_the_console_is_standard_output_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    assert console_or_stdout(screen) is screen
    console_or_stdout(None).print("a line")
    assert capsys.readouterr().out == "a line\n" and screen.text == ""
