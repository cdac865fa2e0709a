"""The table of `relora compare`."""

from tests.cli.tables.screen import Screen

from relora.cli.tables.comparison import print_comparison


def test_no_figure_is_cut_on_a_narrow_terminal() -> None:
    columns = ["method", *(f"figure {index}" for index in range(9))]
    figures = [f"{index}23,456,789" for index in range(9)]
    screen = Screen(width=40)
    print_comparison(columns, [["full", *figures], ["relora", *figures]], screen)
    header, full, relora = screen.text.splitlines()
    assert header.split()[:3] == ["method", "figure", "0"]
    assert full.split() == ["full", *figures] and relora.split() == ["relora", *figures]
