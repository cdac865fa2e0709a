"""The page of a comparison has table, charts and answers, and escapes every string."""

import json
import re
from pathlib import Path

from relora.report.comparison import COLORS, Curve, loss_chart, markdown, rate_chart, write_comparison


def curves(count: int) -> list[Curve]:
    return [
        Curve(f"m{n}", [(100 * step, step, 5.0 - 0.1 * step - 0.01 * n) for step in range(1, 9)]) for n in range(count)
    ]


def test_every_method_is_a_line_of_its_own() -> None:
    chart = loss_chart(curves(COLORS + 2))
    looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in chart.figure["data"]]
    assert (
        len(set(looks)) == COLORS + 2
        and looks[0] == ("--series-0", "solid")
        and looks[COLORS] == ("--series-0", "dash")
    )
    assert chart.figure["data"][3]["x"] == [100 * step for step in range(1, 9)]
    low, high = chart.figure["layout"]["yaxis"]["range"]
    assert low < 4.1 < high < 5.0  # without the high losses of the first steps


def test_rates_have_a_logarithmic_axis() -> None:
    chart = rate_chart([Curve("full", [(1e-3, 25, 5.0), (2e-3, 25, 4.5), (4e-3, 25, 4.8)])])
    axis = chart.figure["layout"]["xaxis"]
    assert axis["type"] == "log" and 1e-3 in axis["tickvals"]
    assert rate_chart([]).lines == []


def test_the_page_has_table_charts_and_answers(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    path = write_comparison(
        tmp_path,
        ("method", "loss"),
        [("full", "4.1"), (evil, "4.2")],
        charts=[loss_chart([*curves(2), Curve(evil, [(1, 1, 2.0)])]), rate_chart([])],
        answers=[(evil, [("reference", evil)])],
        note=f"tuned {evil}",
    )
    page = path.read_text(encoding="utf-8")
    assert evil not in page and page.count("<blockquote>") == 1
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])  # type: ignore[index]
    assert list(figures) == ["loss"]  # a chart without lines is left out
    assert 'id="loss"' in page and 'id="rates"' not in page
    for color in {trace["line"]["color"] for trace in figures["loss"]["data"]}:
        assert page.count(f"{color}:") == 2  # once in the light theme, once in the dark one


def test_without_charts_the_page_is_small(tmp_path: Path) -> None:
    page = write_comparison(tmp_path, ("method",), [("full",)]).read_text(encoding="utf-8")
    assert len(page) < 20_000 and "<td>full</td>" in page


def test_markdown() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
