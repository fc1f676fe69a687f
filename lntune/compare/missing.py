"""What only one of two sides has, why, and what would measure the other."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lntune.case import Case
from lntune.compare.comparison import Missing
from lntune.compare.pairs import Found
from lntune.compare.sides import Contender, Runs, Side
from lntune.log import records, select

Entry = tuple[Side, Found]


def find(
    a: Entry, b: Entry, asked: Sequence[Case], options: str
) -> tuple[list[Missing], list[str]]:
    """The cases that one side has and the other has not, and those asked for that neither has; and
    the commands that measure them all, to which `options` are added.
    """
    (_, of_a), (_, of_b) = a, b
    places = {place for place, _ in of_a.held} & {place for place, _ in of_b.held}
    known = {records.Key.of(case) for _, case in (*of_a.held, *of_b.held)}
    neither = [case for case in asked if records.Key.of(case) not in known]
    missing: list[Missing] = []
    cases: dict[tuple[str, str], list[Case]] = {}
    for (side, own), (_, has) in ((a, b), (b, a)):
        measure = _measure(side, a[0], b[0], options)
        lacking = [
            key
            for key in sorted(has.held.keys() - own.held.keys())
            if not places or key[0] in places
        ]
        for case, key in [*((key[1], key) for key in lacking), *((case, None) for case in neither)]:
            device = has.held[key][0].record.device if key else None
            unfit = side.unfit(case, device) if isinstance(side, Contender) and device else ""
            why = unfit or _why(side, key in own.stale)
            command = "" if unfit else "".join(_commands(measure, [case]))
            missing.append(Missing(case, side.name, why, command))
            if command:
                cases.setdefault(measure, []).append(case)
    return missing, [c for measure, of in cases.items() for c in _commands(measure, of)]


def _why(side: Side, stale: bool) -> str:
    if stale:
        return "measured only before its code changed"
    return "not in it" if isinstance(side, Runs) else "not measured"


def _measure(side: Side, a: Side, b: Side, options: str) -> tuple[str, str]:
    """What measures a side, as the beginning and the end of a command; empty where nothing does."""
    if isinstance(side, Runs):
        return (
            ("lntune tune", f" --log-dir {shlex.quote(side.folder)}") if side.folder else ("", "")
        )
    if side.word == "tuned":
        return "lntune tune", options
    names = a.name, b.name
    if isinstance(a, Runs) or isinstance(b, Runs):  # which cannot be measured beside it
        names = side.name, "default" if side.word == "eager" else "eager"
    return f"lntune compare {' '.join(map(shlex.quote, names))} --measure --op", options


def _commands(measure: tuple[str, str], cases: Sequence[Case]) -> list[str]:
    """As few commands as can be had that measure some cases."""
    begin, end = measure
    narrowings = select.narrowings(cases) if begin else []
    return [f"{begin} {op} {narrowed}{end}" for op, narrowed in narrowings]
