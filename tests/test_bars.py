"""Bars and curves of characters."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from lntune.report.bars import bar, curve, plain
from lntune.report.columns import Column, Table


@pytest.mark.parametrize(
    ("value", "most", "drawn"),
    [
        (2.0, 2.0, "████"),
        (1.0, 2.0, "██"),
        (1.125, 2.0, "██▎"),
        (0.01, 2.0, "▏"),
        (3.0, 2.0, "████"),
    ],
)
def test_a_bar_is_as_long_as_its_value(value: float, most: float, drawn: str) -> None:
    """`most` fills the width, eighths of a character tell the rest, and the least is seen."""
    assert bar(value, most, 4).plain == drawn


def test_what_is_not_known_has_no_bar() -> None:
    """Nothing is drawn of nothing, and of what has no measure."""
    assert not bar(None, 2, 4) and not bar(1, 0, 4)


def test_a_bar_stands_out_beyond_one() -> None:
    """What lies beyond 1 is green, eager mode's own part dim; below 1 all is red."""
    assert [str(span.style) for span in bar(2, 2, 4).spans] == ["dim", "green"]
    assert bar(0.5, 2, 4).style == "red"


def test_a_curve_rises_with_its_values() -> None:
    """The largest value is highest, the smallest lowest; values that differ by less than noise are
    flat.
    """
    assert curve([1, 2, 3]).plain == "▁▄▇"
    assert curve([1.0, 1.005, 0.995]).plain == "▄▄▄"
    assert curve([0, 0]).plain == "▄▄"
    assert curve([5]).plain == "▄"


def test_where_an_encoding_has_no_blocks() -> None:
    """Other characters stand for them, as many as there were, so that columns stay in line."""
    table = Table("", [Column("faster", drawn=True, right=False), Column("us")])
    for value in (1.0, 1.1, 2.0):
        table.add(bar(value, 2.0, 8), "5")
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file, force_terminal=True, color_system=None, width=80).print(table)
    file.flush()
    lines = raw.getvalue().decode("ascii").splitlines()
    assert lines == ["faster    us", "####       5", "####       5", "########   5"]
    assert plain(Text("▁▄▇")).plain.isascii()
