"""Tables for people: plain columns, one line a row, and never a cut figure.

On a terminal the columns that matter least are left out until a row fits its width, and a line says
which; where even the key columns do not fit, rows become blocks of `name value`. In a pipe or a
file every column is there, however wide, but for bars, which are figures drawn once more.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lntune.report import bars
from lntune.words import visible

WIDE = 1_000_000
"""The width of what is not a terminal: nothing is left out or broken."""
GAP = "  "
"""Between columns. No cell is empty or has two spaces in a row: programs can split lines there."""
KEY = 0
"""The rank of columns without which a table has no point."""

Cell: TypeAlias = str | Text


@dataclass(frozen=True)
class Column:
    """A column. Of those that do not fit what is all dashes goes first, then the highest `rank`,
    KEY never.

    `shared`: where all rows have the same and space is short, it is said once above the table.
    `drawn`: bars, for terminals alone. `below`: on a terminal it has a line of its own below the
    row.
    """

    name: str
    rank: int = KEY
    right: bool = True
    shared: bool = False
    drawn: bool = False
    below: bool = False


def key(*names: str) -> list[Column]:
    """Columns of words that say what a row is about."""
    return [Column(name, right=False, shared=name not in ("case", "operator")) for name in names]


class Table:
    """A title, columns, rows of a cell for each column, and notes: the sentences that stand below
    it. Prints itself, without these, on a Rich console.

    `grouped`: on a terminal what the shared columns have is said once above each group of rows that
    have the same.
    """

    def __init__(
        self,
        title: str,
        columns: Iterable[Column],
        notes: Iterable[str] = (),
        grouped: bool = False,
    ) -> None:
        self.title = title
        self.columns = list(columns)
        self.notes = list(notes)
        self.grouped = grouped
        self.rows: list[list[Text]] = []

    def add(self, *cells: Cell) -> None:
        """One more row; an empty cell is a dash."""
        assert len(cells) == len(self.columns)
        filled = [cell or "-" for cell in cells]
        self.rows.append([c if isinstance(c, Text) else Text(visible(c)) for c in filled])

    def undrawn(self) -> list[int]:
        """The places of the columns but for bars."""
        return [i for i, column in enumerate(self.columns) if not column.drawn]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines(options.max_width):
            yield bars.plain(line) if options.ascii_only else line

    def lines(self, width: int) -> list[Text]:
        """The table for a terminal of that many columns."""
        shown, shared, omitted = self._fit(width)
        title = visible(", ".join(part for part in (self.title, *shared) if part))
        lines = [Text(title, style="bold")] if title else []
        grid = self._width(shown) <= width
        lines += self._grid(shown, width) if grid else self._blocks(shown, width)
        if omitted:
            named = (self.columns[i].name for i in omitted if not self.columns[i].drawn)
            names = ", ".join(dict.fromkeys(named))
            note = f"not shown for want of width: {names}; --wide or a pipe shows all"
            lines += [Text(note, style="dim")] if names else []
        return lines

    def _widths(self, shown: Sequence[int]) -> list[int]:
        return [
            max(cell_len(self.columns[i].name), *(row[i].cell_len for row in self.rows), 0)
            for i in shown
        ]

    def _width(self, shown: Sequence[int]) -> int:
        return sum(self._widths(shown)) + len(GAP) * (len(shown) - 1)

    def _fit(self, width: int) -> tuple[list[int], list[str], list[int]]:
        """The columns to show, what all rows share and is said above instead, and the columns that
        are left out.
        """
        apart = self._of_groups(width) + self._below(width)
        fitting = self.undrawn() if width == WIDE else range(len(self.columns))
        shown, shared, omitted = [i for i in fitting if i not in apart], [], []
        if self._width(shown) > width and len(self.rows) > 1:
            for i in [i for i in shown if self._same(i)]:
                shown.remove(i)
                shared.append(f"{self.columns[i].name} {self.rows[0][i].plain}")
        while self._width(shown) > width and any(self.columns[i].rank for i in shown):
            last = max(shown, key=lambda i: (self._says_nothing(i), self.columns[i].rank, i))
            shown.remove(last)
            omitted.append(last)
        return shown, shared, sorted(omitted)

    def _says_nothing(self, i: int) -> bool:
        """Whether a column is not of those without which a table has no point, and all dashes: it
        goes before all others.
        """
        return self.columns[i].rank != KEY and all(row[i].plain == "-" for row in self.rows)

    def _same(self, i: int) -> bool:
        """Whether a column may be said once above the table: all rows have the same."""
        return self.columns[i].shared and len({row[i].plain for row in self.rows}) == 1

    def _of_groups(self, width: int) -> list[int]:
        """The columns that are said above groups of rows."""
        if not self.grouped or width == WIDE:
            return []
        return [i for i, column in enumerate(self.columns) if column.shared]

    def _below(self, width: int) -> list[int]:
        """The columns that have lines of their own."""
        return [i for i, column in enumerate(self.columns) if column.below and width != WIDE]

    def _groups(self, width: int) -> list[tuple[list[Text], list[list[Text]]]]:
        """Rows in their order, with what is said above them."""
        of_groups = self._of_groups(width)

        def shared(row: Sequence[Text]) -> str:
            return " ".join(row[i].plain for i in of_groups)

        return [
            ([Text(heading, style="bold")] if heading else [], list(rows))
            for heading, rows in itertools.groupby(self.rows, shared)
        ]

    def _grid(self, shown: Sequence[int], width: int) -> list[Text]:
        header = [Text(column.name, style="bold") for column in self.columns]
        widths = self._widths(shown)
        lines = [self._line(header, shown, widths)]
        for heading, rows in self._groups(width):
            lines += heading
            for row in rows:
                lines.append(self._line(row, shown, widths))
                for i in self._below(width):
                    broken = textwrap.wrap(row[i].plain, width - 2 * len(GAP))
                    lines += [Text(2 * GAP + part, style="dim") for part in broken]
        return lines

    def _line(self, row: Sequence[Text], shown: Sequence[int], widths: Sequence[int]) -> Text:
        line = Text(no_wrap=True, overflow="ignore")
        for i, size in zip(shown, widths, strict=True):
            padding = " " * (size - row[i].cell_len)
            line.append(GAP if i != shown[0] else "")
            line.append_text(Text(padding) + row[i] if self.columns[i].right else row[i] + padding)
        line.rstrip()
        return line

    def _blocks(self, shown: Sequence[int], width: int) -> list[Text]:
        """Each row as lines of `name value`, as many of these on a line as fit."""
        pairs = sorted({*shown, *self._of_groups(width), *self._below(width)})
        lines = []
        for row in self.rows:
            line = Text()
            for n, i in enumerate(pairs):
                pair = Text(f"{self.columns[i].name} ", style="dim") + row[i]
                if n and line.cell_len + len(GAP) + pair.cell_len > width:
                    lines.append(line)
                    line = Text(GAP)
                elif n:
                    line.append(GAP)
                line.append_text(pair)
            lines.append(line)
        for line in lines:
            # a path, which is to be copied
            if max(map(cell_len, line.plain.split()), default=0) > width:
                line.no_wrap, line.overflow = True, "ignore"
        return lines


_UNBROKEN = "\u00a0"
"""In place of a space: no line ends there."""
_COMMAND = re.compile(r"(?:(?<=Run: )|(?<=; ))lntune [^;()]*[^;()\s]")


def whole(text: object) -> str:
    """A path or a command for a sentence, to be copied: it stays on one line, however long, and
    however many spaces are in it.
    """
    return str(text).replace(" ", _UNBROKEN)


def say(out: Console, text: str) -> None:
    """Print lines of text; on a terminal they are broken between words, and go on below where they
    began, a little further in.
    """
    for line in text.splitlines() or [""]:
        indent = line[: len(line) - len(line.lstrip())]
        _lines(out, Text(indent), visible(line.lstrip()), f"{indent}  ")


def hanging(out: Console, lead: Cell, text: str) -> None:
    """Print a sentence behind a lead; on a terminal its further lines stand below its first word,
    where the lead leaves room for that.
    """
    first, text = Text(visible(lead)) if isinstance(lead, str) else lead, visible(text)
    if first.cell_len > out.width // 2:
        say(out, first.plain + text)
    else:
        _lines(out, first, text, " " * first.cell_len)


def _lines(out: Console, lead: Text, text: str, indent: str) -> None:
    """Print text behind a lead, its further lines behind the indent. A word longer than a line is
    left to the terminal, which breaks it only for the eye.
    """
    lines = [text]
    if out.is_terminal:
        kept, first = _COMMAND.sub(lambda command: whole(command[0]), text), " " * lead.cell_len
        wrapper = textwrap.TextWrapper(
            out.width, first, indent, break_long_words=False, break_on_hyphens=False
        )
        lines = wrapper.wrap(kept) or [""]
        lines[0] = lines[0][lead.cell_len :]
    for i, line in enumerate(lines):
        out.print(Text.assemble("" if i else lead, line.replace(_UNBROKEN, " ")), soft_wrap=True)
