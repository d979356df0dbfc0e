"""A table whose rows are printed one by one, while other lines come between them."""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.runtime.console import CONSOLE, Console


class GrowingTable:
    """Rows with aligned columns; the header comes again when it has left the page.

    columns: (heading, width) each; cells are aligned to the right.
    """

    def __init__(self, columns: Sequence[tuple[str, int]], console: Console = CONSOLE):
        self._columns, self._console = tuple(columns), console
        self._header_at: int | None = None  # lines that the console had printed before the header

    def print_row(self, cells: Sequence[str]) -> None:
        """Print a row, after the header if that is not on the page.  Rows are printed with --quiet, too."""
        assert len(cells) == len(self._columns), (cells, self._columns)
        console = self._console
        # The live line takes one line of the page.
        page = console.page_lines - 1
        if self._header_at is None or console.lines_printed - self._header_at >= page:
            self._header_at = console.lines_printed
            self._print([heading for heading, _ in self._columns], "bold underline")
        self._print(cells, "bold")

    def _print(self, cells: Sequence[str], style: str) -> None:
        widths = [max(width, len(heading)) for heading, width in self._columns]
        text = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        self._console.print_line(text, always=True, style=style)
