"""A console that keeps what is printed on it."""

import io

from rich.console import Console


class Screen(Console):
    """A console of a given width; `text` is what was printed so far, without blanks at the ends of lines."""

    def __init__(self, width: int = 200) -> None:
        self.stream = io.StringIO()
        super().__init__(file=self.stream, width=width, highlight=False)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.stream.getvalue().splitlines())
