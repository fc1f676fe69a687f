"""The one door that all commands print through, and its formats."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from lntune.cli import app
from lntune.cli.base import PAGES
from lntune.errors import InputError
from lntune.report import output
from lntune.report.columns import WIDE, Column, Table, key
from lntune.report.output import Output, print_table, text

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ("table", "markdown", "csv", "json")


class Inner(msgspec.Struct):
    """What is nested in a record."""

    hidden: int
    name: str


class Entry(msgspec.Struct):
    """A record with a value of each kind."""

    inner: Inner
    us: float | None
    right: bool
    knobs: dict[str, int]
    steps: tuple[str, ...] = ()


def found() -> Output:
    """Two records, a table of them with bars and a note, and sentences."""
    bars = Column("bars", drawn=True)
    table = Table("times", [*key("case"), bars, Column("us")], ["* a note"])
    table.add("a|b", "██", "1.0")
    table.add("c_d", "", Text("-"))
    records = [
        Entry(Inner(64, 'a "quoted", word'), 0.1 + 0.2, True, {"lanes": 4}, ("one", "two")),
        Entry(Inner(128, "two\nlines"), None, False, {"store": 2}),
    ]
    lines: list[output.Line] = ["2 cases", ("lead: ", "what <it> says of lnlstm_step, _so_")]
    return Output({"cases": records}, [table], lines, records)


def test_a_table_is_followed_by_its_notes_and_the_sentences() -> None:
    """A console shows tables, each with its notes, then sentences, whose leads stand before
    them.
    """
    out = io.StringIO()
    print_table(found(), Console(file=out, width=WIDE, highlight=False))
    assert out.getvalue().splitlines() == [
        "times",
        "case   us",
        "a|b   1.0",
        "c_d     -",
        "* a note",
        "2 cases",
        "lead: what <it> says of lnlstm_step, _so_",
    ]


def test_markdown_is_for_a_pull_request() -> None:
    """Sentences are a list before the tables, figures stand at the right, and no sign of the text
    is taken for Markdown's.
    """
    assert text(found(), "markdown").splitlines() == [
        "- 2 cases",
        r"- lead: what \<it> says of lnlstm_step, \_so\_",
        "",
        "**times**",
        "",
        r"- \* a note",
        "",
        "| case | us |",
        "| --- | --: |",
        r"| a\|b | 1.0 |",
        "| c_d | - |",
    ]


def test_csv_has_figures_as_they_are() -> None:
    """A reader of CSV gets back every record: nested fields by names with dots, nothing for what is
    not known, and every digit of a figure.
    """
    rows = list(csv.DictReader(io.StringIO(text(found(), "csv"))))
    first = {"inner.hidden": "64", "inner.name": 'a "quoted", word', "us": "0.30000000000000004"}
    assert rows[0] == {**first, "right": "true", "knobs.lanes": "4", "steps": "one two",
                       "knobs.store": ""}  # fmt: skip
    assert (rows[1]["us"], rows[1]["right"], rows[1]["knobs.store"]) == ("", "false", "2")
    assert rows[1]["inner.name"] == "two\nlines"


def test_what_is_more_than_words_is_json_in_a_cell() -> None:
    """A list of anything else than words and numbers is one cell, of JSON."""
    given = {"a": [{"b": 1}], "c": [1, 2.5], "d": ("x y", "z"), "e": []}
    assert output.flat(given) == {"a": '[{"b":1}]', "c": "1 2.5", "d": '["x y","z"]', "e": ""}


def test_json_has_the_facts() -> None:
    """JSON is what the facts are, whole."""
    value = found()
    assert json.loads(text(value, "json")) == json.loads(msgspec.json.encode(value.facts))


def test_html_needs_a_page() -> None:
    """What has a page gives it; what has none refuses."""
    page = Output(None, page=lambda: "<p>")
    assert text(page, "html") == "<p>"
    with pytest.raises(InputError, match="--format: got html"):
        text(found(), "html")


# --- commands


def run(*arguments: object) -> Any:
    """A command of lntune in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


ARGUMENTS = {
    "report": ["--all-devices", "--log-dir", ROOT / "tuning_logs"],
    "ops": [],
    "why": ["layer_norm", "--hidden", 64],
}


@pytest.mark.parametrize("form", PLAIN)
@pytest.mark.parametrize("command", ARGUMENTS)
def test_commands_print_every_format(command: str, form: str) -> None:
    """A command prints something else in each format, --json the same as --format json."""
    done = run(command, *ARGUMENTS[command], "--format", form)
    assert done.exit_code == 0, done.output
    if form == "json":
        assert done.stdout == run(command, *ARGUMENTS[command], "--json").stdout
        assert json.loads(done.stdout)
    elif form == "csv":
        rows = list(csv.reader(io.StringIO(done.stdout)))
        assert len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}
    elif form == "markdown":
        tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
        assert tables or done.stdout.startswith("- ")
    else:
        assert done.stdout == run(command, *ARGUMENTS[command]).stdout


def formats() -> list[str]:
    """The names of all commands that have --format."""
    names = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    return sorted(name for name in names if "  --format " in run(name, "--help").output)


NEEDED = {
    "why": ["layer_norm", "--hidden", 64],
    "compare": ["a", "b"],
    "merge": ["a", "-o", "c"],
    "export": ["-o", "c"],
    "export-candidates": ["c"],
    "export-log": ["-o", "c"],
    "import": ["a"],
}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--format", "yaml"), "unknown --format 'yaml'"),
        (("--format", "csv", "--json"), "--format: got csv beside --json, expected one of the two"),
        (("--format", "html"), "--format: got html, expected table, markdown, csv or json"),
    ],
)
def test_a_format_that_a_command_has_not_is_refused(asked: tuple[str, ...], message: str) -> None:
    """Before anything is done: formats that are none, two at once, and a page where there is
    none.
    """
    commands = formats()
    assert len(commands) > len(PAGES)
    for command in commands:
        if "html" in asked and command in PAGES:
            continue
        done = run(command, *NEEDED.get(command, ()), *asked)
        assert done.exit_code == 2 and message in done.output, command


PRINTS = {"base.py": {"finish", "print_json", "tell", "_version", "_invoke"},
          "look.py": {"show", "_diff"}, "measure.py": {"demo"}}  # fmt: skip
"""Functions of the command line that print by themselves: the door, errors, a version, a kernel's
code, and a tour that says what it does.
"""


def printing(source: str) -> set[str]:
    """The functions of a source that call something that prints."""
    found_: set[str] = set()
    for function in ast.parse(source).body:
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                prints = name in ("print", "say", "hanging", "print_json", "print_table")
                err = name.startswith(("err.", "console(stderr"))
                if prints or (name.endswith(".print") and not err):
                    found_.add(getattr(function, "name", "") or "the module")
    methods = {"_Command": "_invoke"}
    return {methods.get(name, name) for name in found_}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lntune" / "cli").glob("*.py")), ids=lambda p: p.name
)
def test_no_command_prints_by_another_way(path: Path) -> None:
    """All but the few that print no findings end in `finish`, and no module of the command line
    makes a table of its own.
    """
    source = path.read_text(encoding="utf-8")
    assert printing(source) <= PRINTS.get(path.name, set())
    assert not re.search(r"rich\.(table|console)", source)


def test_printing_is_seen() -> None:
    """The check above sees plain prints, consoles and the door's own functions, not standard
    error.
    """
    source = "def f():\n print(1)\ndef g():\n out.print(2)\ndef h():\n err.print(3)\nprint_table(4)"
    assert printing(source) == {"f", "g", "the module"}
