"""The page of a comparison: a table of what each method reached and took, and their answers side by side."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from relora.durable import write_durably
from relora.report.html import table


def write_comparison(
    folder: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    answers: Sequence[tuple[str, Sequence[tuple[str, str]]]],
) -> Path:
    """Write FOLDER/comparison.html; `answers` are prompts with (who, what they answered)."""
    body = [f"<header><h1>{escape(folder.name)}</h1></header>", "<h2>Methods</h2>", table(columns, rows)]
    if answers:
        body.append("<h2>Answers to held-out prompts</h2>")
    for prompt, given in answers:
        lines = "".join(f"<p><b>{escape(who)}</b>: {escape(text)}</p>" for who, text in given)
        body.append(f"<blockquote><pre>{escape(prompt)}</pre>{lines}</blockquote>")
    page = Template(files("relora.report").joinpath("page.html").read_text(encoding="utf-8"))
    path = folder / "comparison.html"
    title = escape(f"{folder.name} · relora")
    write_durably(path, page.substitute(title=title, body="\n".join(body), figures="{}", plotly=""))
    return path
