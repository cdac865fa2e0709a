import io

from rich.console import Console

from relora.data.pretraining.progress import ConsoleProgress, PrepareProgress


def _show(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with ConsoleProgress(console, every_seconds=0.0) as progress:
        progress(PrepareProgress("tokenizer"))
        progress(PrepareProgress("tokens", text_bytes=1_000_000, tokens=250_000, read_share=0.25))
        progress(PrepareProgress("tokens", text_bytes=2_000_000, tokens=500_000, read_share=0.5))
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    lines = _show(terminal=False).splitlines()
    assert lines[0] == "preparing: training the tokenizer"
    assert lines[1].startswith("preparing: 25% · 1.0 MB · 0.2 M tokens")
    assert all(part in lines[2] for part in ("50% · 2.0 MB · 0.5 M tokens", "MB/s", "M tokens/s", "0:00 left"))


def test_a_bar_on_a_terminal() -> None:
    shown = _show(terminal=True)
    assert "50% · 2.0 MB" in shown
    assert "━" in shown


def test_an_unknown_size_is_not_made_up() -> None:
    console = Console(file=io.StringIO(), width=200)
    with ConsoleProgress(console, every_seconds=0.0) as progress:
        progress(PrepareProgress("tokens", text_bytes=1_000_000))
        progress(PrepareProgress("tokens", text_bytes=3_000_000))
    assert "%" not in console.file.getvalue()
    assert "left" not in console.file.getvalue()
    assert "MB/s" in console.file.getvalue()
