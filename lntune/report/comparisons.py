"""Comparisons as tables and in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from rich.text import Text

from lntune.certainty import ERROR, VERDICTS
from lntune.compare.comparison import Between, Comparison, Result
from lntune.compare.differences import differences
from lntune.compare.summary import Group, Turn, summarize
from lntune.report.columns import Cell, Column, Table, key, whole
from lntune.report.output import Output
from lntune.report.tables import micros, number, percent
from lntune.words import counted

_STYLES = {"FASTER": "green", "SLOWER": "red", "SAME": "", "UNSURE": "yellow"}
_FAR = 10_000
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def output(results: Sequence[Result]) -> Output:
    """Everything about a comparison: each of `results` against the same side A."""
    facts = [_facts(result) for result in results]
    return Output(
        facts[0] if len(facts) == 1 else facts,
        tables(results),
        [line for result in results for line in lines(result, alone=len(results) == 1)],
        [record for result in results for record in _records(result)],
        headline="; ".join(map(_headline, results)),
    )


def _headline(result: Result) -> str:
    """A comparison in a sentence."""
    counts, cases = result.counts(), counted(len(result.cases), "case")
    won = f"FASTER in {counts['FASTER']} and SLOWER in {counts['SLOWER']} of {cases}"
    mean = summarize(result).geomean
    of_all = "" if mean is None else f", geomean {mean:.3f}"
    return f"{result.b} against {result.a}: {won}{of_all}"


def _facts(result: Result) -> dict[str, Any]:
    """A result for machines, with what it comes to."""
    built: dict[str, Any] = msgspec.to_builtins(result)
    return {**built, "verdicts": result.counts(), "summary": summarize(result)}


def _records(result: Result) -> list[dict[str, Any]]:
    """The cases as records that say what they compare."""
    names = {"side_a": result.a, "side_b": result.b}
    return [{**names, **msgspec.to_builtins(c)} for c in result.cases]


# --- tables


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each operator: its cases, with a verdict for each side but the first."""
    operators = dict.fromkeys(c.case.op for result in results for c in result.cases)
    return [table(results, op) for op in operators]


def table(results: Sequence[Result], op: str) -> Table:
    """The cases of an operator: medians, their ratio with its interval and its verdict, and what
    explains them.
    """
    rows: dict[tuple[Any, ...], list[Comparison | None]] = {}
    for place, result in enumerate(results):
        for c in result.cases:
            if c.case.op == op:
                name = (c.device, c.case.dtype, c.case.hidden, c.case.rows, c.case.variant)
                rows.setdefault(name, [None] * len(results))[place] = c
    figures = _figures(results, [c for found in rows.values() for c in found if c is not None])
    several = [len({row[i] for row in rows}) > 1 for i in range(5)]
    shown = [several[0], True, True, True, several[4] or any(row[4] for row in rows)]
    names = [
        *key("device", "dtype"),
        Column("hidden"),
        Column("rows"),
        *key("variant"),
    ]
    given = [results[0].a, *(result.b for result in results)]
    sides = ", ".join(f"{letter} {name}" for letter, name in zip(_LETTERS, given, strict=False))
    built = Table(
        f"{op}: {sides}",
        [*(n for n, s in zip(names, shown, strict=True) if s), *(column for column, _ in figures)],
    )
    for row in sorted(rows, key=lambda row: tuple(map(str, row[:1])) + row[1:]):
        head = [str(value) for value, s in zip(row, shown, strict=True) if s]
        built.add(*head, *(cell(rows[row]) for _, cell in figures))
    return built


Cells = Callable[[Sequence[Comparison | None]], Cell]


def _figures(results: Sequence[Result], cases: Sequence[Comparison]) -> list[tuple[Column, Cells]]:
    """The columns behind a case's name, and what they hold of its comparisons."""

    def first(cell: Callable[[Comparison], Cell]) -> Cells:
        """A cell of what all comparisons of a case have in common."""
        return lambda row: cell(next(c for c in row if c is not None))

    figures: list[tuple[Column, Cells]] = [(Column("A us", 3), first(lambda c: micros(c.a.us)))]
    for place, letter in zip(range(len(results)), _LETTERS[1:], strict=False):
        figures += [(column, _of(place, cell)) for column, cell in _side(letter, cases)]
    if any(c.a.of_copy for c in cases):
        figures.append((Column("A of copy", 6), first(lambda c: percent(c.a.of_copy))))
    if any(c.a.gbps for c in cases):
        figures.append((Column("A GB/s", 7), first(lambda c: number(c.a.gbps, 1))))
    if any(c.a.instructions for c in cases):
        a_code = first(lambda c: number(c.a.instructions, 1))
        figures.append((Column("A instr./element", 10), a_code))
    if any(c.bytes for c in cases):
        intensity = first(lambda c: number(c.flops / c.bytes if c.bytes else None, 2))
        figures.append((Column("flops/byte", 9), intensity))
    return figures


def _of(place: int, cell: Callable[[Comparison], Cell]) -> Cells:
    """A cell of the comparison in a place, a dash where there is none."""

    def of(row: Sequence[Comparison | None]) -> Cell:
        c = row[place]
        return "" if c is None else cell(c)

    return of


def _side(
    letter: str, cases: Sequence[Comparison]
) -> list[tuple[Column, Callable[[Comparison], Cell]]]:
    """The columns of one side against A."""
    columns: list[tuple[bool, Column, Callable[[Comparison], Cell]]] = [
        (True, Column(f"{letter} us", 3), lambda c: micros(c.b.us)),
        (True, Column(f"A / {letter}"), lambda c: f"{c.ratio:.3f}"),
        (True, Column("95 % interval", 2), lambda c: f"{_bound(c.low)} .. {_bound(c.high)}"),
        (True, Column("verdict", right=False), lambda c: Text(c.verdict, _STYLES[c.verdict])),
        (any(c.drift for c in cases), Column("eager's A / B", 5), lambda c: number(c.drift, 3)),
        (
            any(c.b.of_copy for c in cases),
            Column(f"{letter} of copy", 6),
            lambda c: percent(c.b.of_copy),
        ),
        (
            any(c.b.gbps for c in cases),
            Column(f"{letter} GB/s", 7),
            lambda c: number(c.b.gbps, 1),
        ),
        (
            any(c.b.instructions for c in cases),
            Column(f"{letter} instr./element", 10),
            lambda c: number(c.b.instructions, 1),
        ),
        (any(c.reason for c in cases), Column("why", 4, right=False), lambda c: c.reason),
        (
            any(differences(c.a, c.b) for c in cases),
            Column("differs in", 8, right=False),
            lambda c: "; ".join(differences(c.a, c.b)),
        ),
    ]
    return [(column, cell) for shown, column, cell in columns if shown]


def _bound(ratio: float) -> str:
    """An end of an interval; of some that say nothing the figures would fill a line."""
    return f"{ratio:.3f}" if ratio < _FAR else f">{_FAR}"


# --- sentences


def lines(result: Result, alone: bool = True) -> list[str]:
    """What a comparison comes to, in sentences; with its sides' names where it is not alone."""
    facts = summarize(result)
    counts = result.counts()
    verdicts = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    of_all = f"{counted(len(result.cases), 'case')}: {verdicts}"
    if facts.geomean is not None:
        sure = sum(not c.reason for c in result.cases)
        of = f" in the {sure} that are not doubtful" if sure < len(result.cases) else ""
        of_all += f"; geomean A / B {facts.geomean:.3f}{of}"
    names = "" if alone else f"{result.b} against {result.a}: "
    text = [f"{names}{of_all if result.cases else 'no case that both have'}"]
    if len(facts.groups) > 1:
        text += [_of_group(group) for group in facts.groups]
    text += [_of_turn(turn) for turn in facts.turns]
    for lead, cases in (("gains most", facts.gains), ("loses most", facts.losses)):
        if cases:
            listed = ", ".join(f"{c.ratio:.2f}x in {c.case}" for c in cases)
            text.append(f"{result.b} {lead}: {listed}")
    text += [_of_drift(between, len(result.between) > 1) for between in result.between]
    tested = sum(not c.reason for c in result.cases)
    if tested:
        family = (
            f" for all {counted(tested, 'case')} together ({result.correction}); intervals are of"
            " each case alone"
            if tested > 1
            else ""
        )
        smallest, error = f"{100 * result.smallest:g} %", f"{100 * ERROR:g} %"
        text.append(f"FASTER and SLOWER: by more than {smallest}, with an error of {error}{family}")
    reasons = Counter(c.reason for c in result.cases if c.reason)
    text += [f"doubtful in {n}: {reason}" for reason, n in reasons.items()]
    return text + _of_missing(result)


def _of_group(group: Group) -> str:
    verdicts = ", ".join(f"{n} {v}" for v, n in group.verdicts.items() if n)
    mean = "" if group.geomean is None else f"geomean {group.geomean:.3f} in "
    return f"{group.op} {group.dtype}: {mean}{counted(group.cases, 'case')}, {verdicts}"


def _of_turn(turn: Turn) -> str:
    what = {"hidden": "hidden {}", "rows": "{} rows"}[turn.axis].format(turn.at)
    other = {"hidden": " at {} rows", "rows": " at hidden {}"}[turn.axis]
    of = "" if turn.of is None else other.format(turn.of)
    return f"{turn.op}: {turn.above} from {what} on{of} in {turn.dtype}, {turn.below} below"


def _of_drift(between: Between, named: bool) -> str:
    """What happened between the runs, and what was done about it."""
    took = [
        f"{name} took {ratio:.2f} times as long in A's"
        for name, ratio in (("eager mode", between.eager), ("a copy", between.copy))
        if ratio is not None
    ]
    ways = {
        "paired": "",
        "direct": "times are compared as they are",
        "over eager": "times are compared over eager mode's",
        "over copy": "times are compared over a copy's",
    }
    way = ways[between.method] + (", case by case" if between.by_case else "")
    on = f" on {between.device}" if named else ""
    moved = " and ".join(took) or "no case that nothing disturbed has eager mode or a copy in both"
    return f"different runs{on}: {moved}; {way}, which leaves {100 * between.error:.1f} % uncertain"


def _of_missing(result: Result) -> list[str]:
    """What only one side has, and the commands that measure the other."""
    found: dict[tuple[str, str], list[str]] = {}
    for missing in result.missing:
        found.setdefault((missing.side, missing.why), []).append(str(missing.case))
    text = []
    for (side, why), names in found.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004
        text.append(f"{side} is missing in {counted(len(names), 'case')} ({why}): {listed}")
    commands = "; ".join(map(whole, result.commands))
    return text + ([f"to measure what is missing: {commands}"] if commands else [])
