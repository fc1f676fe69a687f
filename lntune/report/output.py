"""What a command prints, in every format: one value with the facts, and a function per format.

A new format is a function here, a name in `Format` and a line in `text`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from html import escape as html_escape
from typing import Any, Literal, TypeAlias, get_args

import msgspec
from rich.console import Console
from rich.text import Text

from lntune.errors import InputError, got_expected
from lntune.report.columns import WIDE, Cell, Table, hanging, say

Format = Literal["table", "markdown", "csv", "json", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)

Line: TypeAlias = "str | tuple[Cell, str]"
"""A sentence; behind a lead, where it has one, as in "layer_norm: normalizes rows"."""


@dataclass(frozen=True)
class Output:
    """What a command has found.

    `facts` are for machines (structs, or what JSON has); `tables`, each with its own notes, and the
    sentences `lines` for people; `records` for spreadsheets: all of one kind, one a row. `page`
    makes an HTML page of it, where there is one. With a `headline` Markdown begins with that, and
    has its tables folded away, as a pull request wants it.
    """

    facts: Any
    tables: Sequence[Table] = ()
    lines: Sequence[Line] = ()
    records: Sequence[Any] = ()
    page: Callable[[], str] | None = None
    headline: str = ""


def print_table(output: Output, out: Console) -> None:
    """Print the tables, each with its notes, and the sentences below them; the terminal breaks what
    is longer than a line.
    """
    apart = "\n" if out.is_terminal and out.width != WIDE else ""
    for number, table in enumerate(output.tables):
        out.print(apart if number else "", end="")
        out.print(table, crop=False)
        for note in table.notes:
            say(out, note)
    out.print(apart if output.tables and output.lines else "", end="")
    for line in output.lines:
        if isinstance(line, str):
            say(out, line)
        else:
            hanging(out, *line)


def text(output: Output, form: str) -> str:
    """All of it in a format other than a table's, without the last line's end.

    Raises:
        InputError: there is no page of it.
    """
    if form == "json":
        return json(output.facts)
    return {"markdown": markdown, "csv": comma_separated, "html": html}[form](output)


def json(facts: Any) -> str:
    """Facts for a machine, in a form that a person can read as well."""
    plain = msgspec.json.format(msgspec.json.encode(facts), indent=2).decode()
    return _CONTROLS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", plain)


def html(output: Output) -> str:
    """A page of its own."""
    if output.page is None:
        raise InputError(got_expected("--format", "html", "table, markdown, csv or json"))
    return output.page()


def html_table(table: Table) -> str:
    """A table as a notebook shows it; all of it is escaped, and bars are left out."""
    shown = table.undrawn()

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if table.columns[i].right else "left" for i in shown)
        inner = "".join(
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = row("th", [table.columns[i].name for i in shown])
    body = "".join(row("td", [cells[i].plain for i in shown]) for cells in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


_CONTROLS = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What JSON may hold as it is, and terminals may act upon; it stands in strings alone."""

# --- CSV


def comma_separated(output: Output) -> str:
    """The records with figures as they are, not as a table rounds them; the first line has the
    fields' names, those of nested ones joined by dots. What is not known is empty.
    """
    rows = [flat(record) for record in output.records]
    file = io.StringIO()
    writer = csv.DictWriter(file, fields(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _value(value) for name, value in row.items()} for row in rows)
    return file.getvalue().removesuffix("\n")


def fields(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all columns, in the order in which rows bring them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def flat(record: Any) -> dict[str, Any]:
    """A record as one level of names and values: `case.hidden` for what is nested, JSON for lists
    of more than words and numbers.
    """
    return dict(_leaves("", msgspec.to_builtins(record)))


def _leaves(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        words = [str(one) for one in value if isinstance(one, str | int | float)]
        plain = len(words) == len(value) and not any(" " in word for word in words)
        yield name, " ".join(words) if plain else msgspec.json.encode(value).decode()
    else:
        yield name, value


def _value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else value


# --- Markdown


def markdown(output: Output) -> str:
    """Sentences first, then each table with its notes before it, as GitHub shows them."""
    blocks = [f"**{_escaped(output.headline)}**" if output.headline else ""]
    blocks.append(
        _bullets(line if isinstance(line, str) else _joined(line) for line in output.lines)
    )
    for table in output.tables:
        title = _escaped(table.title)
        if output.headline:
            blocks += ["<details>", f"<summary>{html_escape(table.title)}</summary>"]
        blocks += [f"**{title}**" if title and not output.headline else "", _bullets(table.notes)]
        shown = table.undrawn()
        names = [_escaped(table.columns[i].name) for i in shown]
        rules = ["--:" if table.columns[i].right else "---" for i in shown]
        cells = [[_escaped(row[i].plain) for i in shown] for row in table.rows]
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (names, rules, *cells)))
        blocks.append("</details>" if output.headline else "")
    return "\n\n".join(block for block in blocks if block)


def _bullets(lines: Iterable[str]) -> str:
    plain = (" ".join(line.split()).removeprefix("- ") for line in lines)
    return "\n".join(f"- {_escaped(line)}" for line in plain)


def _joined(line: tuple[Cell, str]) -> str:
    lead, sentence = line
    return (lead.plain if isinstance(lead, Text) else lead) + sentence


_SYNTAX = re.compile(r"[\\`*<|~\[\]]|(?<![^\W_])_|_(?![^\W_])|^>|^[#+-](?=\s)|(?<=^\d)[.)](?=\s)")


def _escaped(plain: str) -> str:
    """Words as they are, whatever Markdown would make of them."""
    return _SYNTAX.sub(lambda sign: f"\\{sign[0]}", plain)
