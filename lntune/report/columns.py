"""Tables for people: plain columns, one line a row, and never a cut figure.

On a terminal the columns that matter least are left out until a row fits its width, and a line says which; where even the
key columns do not fit, rows become blocks of `name value`. In a pipe or a file every column is there, however wide.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

WIDE = 1_000_000
"""The width of what is not a terminal: nothing is left out or broken."""
GAP = "  "
"""Between columns. No cell is empty or has two spaces in a row, so that programs can split lines at them."""
KEY = 0
"""The rank of columns without which a table has no point."""

Cell: TypeAlias = str | Text


@dataclass(frozen=True)
class Column:
    """A column. Of those that do not fit the highest `rank` goes first, KEY never.

    `shared`: where all rows have the same and space is short, it is said once above the table.
    """

    name: str
    rank: int = KEY
    right: bool = True
    shared: bool = False


def key(*names: str) -> list[Column]:
    """Columns of words that say what a row is about."""
    return [Column(name, right=False, shared=name not in ("case", "operator")) for name in names]


class Table:
    """A title, columns and rows of a cell for each column. Prints itself on a Rich console."""

    def __init__(self, title: str, columns: Iterable[Column]) -> None:
        self.title = title
        self.columns = list(columns)
        self.rows: list[list[Text]] = []

    def add(self, *cells: Cell) -> None:
        """One more row; an empty cell is a dash."""
        assert len(cells) == len(self.columns)
        self.rows.append([(cell if isinstance(cell, Text) else Text(cell)) if cell else Text("-") for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width if console.is_terminal else WIDE)

    def lines(self, width: int) -> list[Text]:
        """The table for a terminal of that many columns."""
        shown, said, left = self._fit(width)
        title = ", ".join(part for part in (self.title, *said) if part)
        made = [Text(title, style="bold")] if title else []
        if self._width(shown) <= width:
            made += self._grid(shown)
        else:
            made += self._blocks(shown, width)
        if left:
            names = ", ".join(self.columns[i].name for i in left)
            made.append(Text(f"not shown for want of width: {names}; --wide or a pipe shows all", style="dim"))
        return made

    def _widths(self, shown: Sequence[int]) -> list[int]:
        return [max(cell_len(self.columns[i].name), *(row[i].cell_len for row in self.rows), 0) for i in shown]

    def _width(self, shown: Sequence[int]) -> int:
        return sum(self._widths(shown)) + len(GAP) * (len(shown) - 1)

    def _fit(self, width: int) -> tuple[list[int], list[str], list[int]]:
        """The columns to show, what all rows share and is said above instead, and the columns that are left out."""
        shown, said, left = list(range(len(self.columns))), [], []
        if self._width(shown) > width and len(self.rows) > 1:
            for i in [i for i in shown if self.columns[i].shared and len({row[i].plain for row in self.rows}) == 1]:
                shown.remove(i)
                said.append(f"{self.columns[i].name} {self.rows[0][i].plain}")
        while self._width(shown) > width and any(self.columns[i].rank for i in shown):
            last = max(shown, key=lambda i: (self.columns[i].rank, i))
            shown.remove(last)
            left.append(last)
        return shown, said, sorted(left)

    def _grid(self, shown: Sequence[int]) -> list[Text]:
        header = [Text(column.name, style="bold") for column in self.columns]
        widths = self._widths(shown)
        made = []
        for row in (header, *self.rows):
            line = Text(no_wrap=True, overflow="ignore")
            for i, size in zip(shown, widths, strict=True):
                padding = " " * (size - row[i].cell_len)
                line.append(GAP if i != shown[0] else "")
                line.append_text(Text(padding) + row[i] if self.columns[i].right else row[i] + padding)
            line.rstrip()
            made.append(line)
        return made

    def _blocks(self, shown: Sequence[int], width: int) -> list[Text]:
        """Each row as lines of `name value`, as many of these on a line as fit."""
        made = []
        for row in self.rows:
            line = Text()
            for n, i in enumerate(shown):
                pair = Text(f"{self.columns[i].name} ", style="dim") + row[i]
                if n and line.cell_len + len(GAP) + pair.cell_len > width:
                    made.append(line)
                    line = Text(GAP)
                elif n:
                    line.append(GAP)
                line.append_text(pair)
            made.append(line)
        return made


def hanging(out: Console, lead: Cell, text: str) -> None:
    """Print a sentence behind a lead; on a terminal its further lines stand below its first word."""
    first = Text(lead) if isinstance(lead, str) else lead
    room = out.width - first.cell_len
    lines = [text]
    if out.is_terminal and room >= first.cell_len:
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    for i, line in enumerate(lines):
        out.print(Text.assemble(" " * first.cell_len if i else first, line), soft_wrap=not out.is_terminal)
