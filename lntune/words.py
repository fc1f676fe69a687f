"""Figures in sentences: counts with their nouns ("1 case", "2 cases"), durations; others' words."""

from __future__ import annotations

import re


def counted(count: int, noun: str, many: str = "") -> str:
    """A number with its noun: "1 kernel", "2 kernels", "no kernels" never; `many` is a plural that
    is not the noun and an s.
    """
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def trials(made: int, earlier: int) -> str:
    """How many trials a run has made, and how many earlier runs have spared it: "3 trials", "3
    trials and 12 of earlier runs".
    """
    return counted(made, "trial") + (f" and {earlier} of earlier runs" if earlier else "")


def length(seconds: float) -> str:
    """A duration as a person says it: "40 s", "3 min", "1.5 h"."""
    minute, hour = 60, 3600
    if seconds < 2 * minute:
        return f"{seconds:.0f} s"
    return f"{seconds / minute:.0f} min" if seconds < 2 * hour else f"{seconds / hour:.1f} h"


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text on one line that does nothing to a terminal: names in a log may be anybody's, and hold
    escape sequences.
    """
    return _CONTROLS.sub(lambda sign: repr(sign[0])[1:-1], text)


def visible_lines(text: str) -> str:
    """The same of a text of several lines."""
    return "\n".join(map(visible, text.split("\n")))
