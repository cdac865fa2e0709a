"""Draw docs/results.svg from the first table of docs/results.md.

    python docs/draw_results.py

Each method is a bar: its mean over the seeds relative to full rank by AdamW of the same seeds. A dot is one seed. The
figures are read from the table, so that picture and table cannot disagree; a test compares them.
"""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

TABLE = Path(__file__).with_name("results.md")
PICTURE = Path(__file__).with_name("results.svg")
HEAD = "## The default"
BASELINE = "full"
WIDTH, LEFT, RIGHT, ROW, TOP = 960, 300, 40, 26, 64
STYLE = """text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #24292f }
    .head { font-weight: 600; font-size: 15px }
    .soft { fill: #5b6570; font-size: 12px }
    .end { text-anchor: end }
    .middle { text-anchor: middle }
    .other { fill: #8c96a1; fill-opacity: .45 }
    .ours { fill: #2f6fdb; fill-opacity: .75 }
    .seed { fill: #24292f; fill-opacity: .55 }
    .grid { stroke: #d5dae0; stroke-width: 1 }
    .level { stroke: #c2571a; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6e9ed } .soft { fill: #a3acb6 } .grid { stroke: #3a424b } .seed { fill: #e6e9ed }
    }"""


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    name: str
    is_ours: bool
    """Whether the table prints it in bold: the default."""
    seeds: tuple[float, ...]
    group: str
    """The line in italics above it, empty for the baselines."""


def rows_of(text: str) -> list[Row]:
    """Read the rows of the first table after the heading."""
    table = text[text.index(HEAD) :].split("\n\n| ", 1)[1].split("\n\n", 1)[0]
    rows, group = [], ""
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].startswith("*") and not cells[0].startswith("**"):
            group = cells[0].strip("*")
        else:
            seeds = tuple(float(number) for number in re.findall(r"\d+\.\d+", cells[2]))
            rows.append(Row(cells[0].strip("*"), cells[0].startswith("**"), seeds, group))
    return rows


def drawn(rows: list[Row]) -> str:
    """Draw the rows as SVG."""
    full = next(row.seeds for row in rows if row.name == BASELINE)
    dots = {row.name: [seed / of for seed, of in zip(row.seeds, full, strict=False)] for row in rows}
    means = {row.name: sum(row.seeds) / sum(full[: len(row.seeds)]) for row in rows}
    ratios = [dot for found in dots.values() for dot in found]
    low, high = min(*ratios, 0.97), max(ratios) + 0.02

    def x(ratio: float) -> float:
        return LEFT + (ratio - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts, y, group = [], TOP, ""
    for row in rows:
        if row.group != group:
            group, y = row.group, y + ROW
            parts.append(f'<text class="soft" x="16" y="{y}">{escape(group)}</text>')
        y += ROW
        start, end = sorted((x(1.0), x(means[row.name])))
        kind = "ours" if row.is_ours else "other"
        parts.append(f'<text class="end" x="{LEFT - 14}" y="{y}">{escape(row.name)}</text>')
        width = max(end - start, 1)
        parts.append(f'<rect class="{kind}" x="{start:.1f}" y="{y - 13}" width="{width:.1f}" height="17"/>')
        parts += [f'<circle class="seed" cx="{x(dot):.1f}" cy="{y - 4.5}" r="2.6"/>' for dot in dots[row.name]]
        right = max(end, *(x(dot) for dot in dots[row.name]))
        parts.append(f'<text x="{right + 8:.1f}" y="{y}">{means[row.name]:.3f}</text>')
    height = y + 24
    grid = []
    for percent in range(int(low * 100) + 1, int(high * 100) + 1, 2):
        place = x(percent / 100)
        grid.append(f'<line class="grid" x1="{place:.1f}" y1="{TOP}" x2="{place:.1f}" y2="{height - 12}"/>')
        grid.append(f'<text class="soft middle" x="{place:.1f}" y="{TOP - 8}">{percent / 100:.2f}</text>')
    grid.append(f'<line class="level" x1="{x(1.0):.1f}" y1="{TOP}" x2="{x(1.0):.1f}" y2="{height - 12}"/>')
    title = "Held-out perplexity relative to full-rank AdamW, equal tokens (left is better)"
    spoken = "; ".join(f"{row.name} {means[row.name]:.3f}" for row in rows)
    body = "\n  ".join([*grid, *parts])
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc">
  <title id="title">{title}</title>
  <desc id="desc">{escape(spoken)}</desc>
  <style>
    {STYLE}
  </style>
  <text class="head" x="16" y="26">{title}</text>
  {body}
</svg>
"""


def main() -> None:
    PICTURE.write_text(drawn(rows_of(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
