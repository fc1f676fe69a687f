"""A kernel of MetaSchedule's design space as a short text: `3/256x4/64x16/2/-1/0` is the sketch
number 3 with these decisions, in the order in which the sketch asks for them: how a loop is tiled,
which of some values is taken, in which loop a block is computed.

A text is read as numbers and nothing else, whoever wrote the log that it comes from. Whether the
sketch is there and takes the decisions is known once there is a compiler, see `space`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lntune.errors import InputError, got_expected

Decision = int | tuple[int, ...]
"""A place among values or loops (-1: at the root; -2: inlined), or the extents of a tiled loop."""

LONGEST = 1000
"""Characters of a text at most: the longest that was seen has some 150."""
EXPECTED = "a sketch and its decisions, such as 3/256x4/64x16/2/-1/0"
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_TEXT = re.compile(rf"{_NUMBER}(?:/(?:-[12]|{_NUMBER}(?:x{_NUMBER})*))*")


class Choice(NamedTuple):
    """A sketch, by its number in the space, and its decisions."""

    sketch: int
    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        return "/".join(map(_written, (self.sketch, *self.decisions)))


def _written(decision: Decision) -> str:
    return str(decision) if isinstance(decision, int) else "x".join(map(str, decision))


def refusal(text: str) -> str | None:
    """Why a text stands for no kernel of any space, or None."""
    if len(text) > LONGEST:
        return f"{len(text)} characters, expected {LONGEST} at most"
    if text and not _TEXT.fullmatch(text):
        return f"expected {EXPECTED}"
    return None


def parse(text: str) -> Choice | None:
    """The choice that a text stands for; None of an empty one: the definition as it is.

    Raises:
        InputError: it is no such text.
    """
    if reason := refusal(text):
        raise InputError(got_expected("trace", repr(text[:80]), EXPECTED, f"({reason}.)"))
    if not text:
        return None
    sketch, *rest = text.split("/")
    return Choice(int(sketch), tuple(map(_read, rest)))


def _read(word: str) -> Decision:
    extents = tuple(map(int, word.split("x")))
    return extents if len(extents) > 1 else extents[0]
