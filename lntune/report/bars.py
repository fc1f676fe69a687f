"""Bars and curves of characters, for tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇"
_PLAIN = str.maketrans(_EIGHTHS[1:] + _LEVELS, "   #####" + "__..--=")
"""What stands for them where an encoding has none."""


def bar(value: float | None, most: float, width: int) -> Text:
    """A bar as long as a value, `most` filling the width; what lies beyond 1 stands out, as does a
    value below it.
    """
    if value is None or most <= 0:
        return Text()
    eighths = max(1, round(8 * width * min(value / most, 1)))
    drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    one = min(len(drawn), int(width / most))
    if value < 1:
        return Text(drawn, style="red")
    return Text.assemble((drawn[:one], "dim"), (drawn[one:], "green"))


LEAST = 0.1
"""A curve's height is at least this share of its largest value: less is noise and looks flat."""


def curve(values: Sequence[float]) -> Text:
    """A character for each value, the higher the larger."""
    middle = (min(values) + max(values)) / 2
    height = max(max(values) - min(values), LEAST * max(values)) or 1
    half = len(_LEVELS) // 2
    steps = [round((len(_LEVELS) - 1) * (value - middle) / height) for value in values]
    return Text("".join(_LEVELS[half + step] for step in steps))


def plain(line: Text) -> Text:
    """A line for an encoding that has no such characters."""
    return line if line.plain.isascii() else Text(line.plain.translate(_PLAIN).rstrip())
