"""What is asked of logs from Python: records in a list that prints as a table, in a terminal and in
a notebook, and that pandas takes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

from lntune.report import output

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from lntune.report.columns import Table

Entry = TypeVar("Entry", bound=msgspec.Struct)


class Frame(Sequence[Entry], Generic[Entry]):
    """Records of one kind, which cannot be changed; a slice is one again. `kind` is their class,
    `draw` makes tables of some of them.
    """

    def __init__(
        self,
        records: Iterable[Entry],
        kind: type[Entry],
        draw: Callable[[Sequence[Entry]], Sequence[Table]],
    ) -> None:
        self._records = tuple(records)
        self._kind = kind
        self._draw = draw

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Frame[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | Frame[Entry]:
        if isinstance(index, slice):
            return Frame(self._records[index], self._kind, self._draw)
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self._records == other._records

    def __hash__(self) -> int:
        return hash((self._kind, len(self._records)))

    def columns(self) -> dict[str, list[Any]]:
        """The values of each field, by its name; those of nested fields are joined by dots."""
        rows = [output.flat(record) for record in self._records]
        names = output.fields(rows) or [field.name for field in msgspec.structs.fields(self._kind)]
        return {name: [row.get(name) for row in rows] for name in names}

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each record and the columns of `columns`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as e:
            raise ImportError("to_pandas needs pandas: pip install pandas.") from e
        return pandas.DataFrame(self.columns())

    def tables(self) -> Sequence[Table]:
        """The records as tables."""
        return self._draw(self._records)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.tables()

    def __repr__(self) -> str:
        from rich.console import Console

        from lntune.report.columns import WIDE

        screen = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if screen else WIDE
        out = Console(width=width, force_terminal=screen, color_system=None, highlight=False)
        with out.capture() as captured:
            out.print(self, crop=False)
        return captured.get().rstrip("\n")

    def _repr_html_(self) -> str:
        return "".join(map(output.html_table, self.tables()))
