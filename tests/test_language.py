"""Every docstring says what the thing does or is, with a verb or a noun at its head."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "relora"
PREPOSITIONS = {
    *("about", "after", "against", "along", "among", "at", "before", "behind", "below", "beside", "between", "beyond"),
    *("by", "for", "from", "in", "inside", "into", "like", "of", "off", "on", "onto", "out", "over", "past", "through"),
    *("to", "toward", "towards", "under", "until", "up", "upon", "with", "within", "without"),
}
HEADLESS = PREPOSITIONS | {"as", "else", "likewise", "so", "than", "that", "what", "which", "who", "whose"}
"""First words after which the reader has to guess what the sentence is about."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring: of modules, classes and functions, and the strings under names and fields."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        before: ast.stmt | None = None
        for statement in body:
            first = before is None and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if isinstance(statement, ast.Expr) and (first or isinstance(before, ast.Assign | ast.AnnAssign)):
                value = statement.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield statement.lineno, value.value
            before = statement


def first_word(text: str) -> str:
    return text.split()[0].strip("`'\",.:;()").lower() if text.split() else ""


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_have_a_head(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(ast.parse(path.read_text()))
        if first_word(text) in HEADLESS
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ['"""Of a run."""', 'def f():\n    """As before."""', 'X = 1\n"""What counts."""', 'def f():\n    """ """\n'],
)
def test_a_headless_docstring_is_seen(source: str) -> None:
    words = [first_word(text) for _, text in docstrings(ast.parse(source))]
    assert words and all(word in HEADLESS or not word for word in words)
