"""`lntune compare`: two or more ways to do the same, case by case."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lntune import ops
from lntune.backends import DEFAULT
from lntune.cli.base import (
    DTYPE,
    FORMAT,
    HIDDEN,
    JSON,
    LOG_DIR,
    PLOT,
    ROWS,
    WIDE,
    command,
    command_line,
    finish,
    tell,
    using_logs,
)
from lntune.cli.parse import cases, integers, names, seconds
from lntune.errors import InputError, got_expected, unknown
from lntune.log.wanted import Wanted

if TYPE_CHECKING:
    from lntune.case import Case
    from lntune.compare.run import Options
    from lntune.compare.sides import Side

SMALLEST = "1%"
TWO = 2
"""Sides that a plot has."""


@command("Schedules, knobs or runs: FASTER, SLOWER, SAME or UNSURE")
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...]",
            help=(
                "A schedule (cached_rows), one with knobs (cached_rows:write=streamed,lanes=4),"
                " default, tuned, eager, compile, copy; a file of `lntune bench --output`, a folder"
                " of tuning logs, a device's folder in it, a .jsonl, or rev:NAME, the logs of a git"
                " revision."
            ),
        ),
    ],
    op: Annotated[
        str, typer.Option("--op", help="Operators, separated by commas; all that sides share.")
    ] = "",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    smallest: Annotated[
        str, typer.Option(help="The smallest difference that matters, such as 3%.")
    ] = SMALLEST,
    fail_on: Annotated[
        str,
        typer.Option(
            help=(
                "slower: exit code 1 when a case is, or cannot be decided and looks 3 times as"
                " slow; unsure: also when any cannot."
            )
        ),
    ] = "",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help=(
                "Measure the sides now, interleaved, and log it: in the sizes given, or in the"
                " cases of the log, or in the operator's default grid."
            ),
        ),
    ] = False,
    time_per_case: Annotated[
        str,
        typer.Option(
            "--time",
            help=(
                "Time per case, with --measure; up to four times as long until 3 % would be found."
            ),
        ),
    ] = "6s",
    target: Annotated[
        str, typer.Option(help="Whose records: cpu, or a GPU that is here: cuda, cuda:1.")
    ] = DEFAULT,
    everywhere: Annotated[
        bool, typer.Option("--all-devices", help="Also the records of other devices.")
    ] = False,
    across_devices: Annotated[
        bool, typer.Option("--across-devices", help="Compare measurements of different devices.")
    ] = False,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="What was measured with a cold cache; with --measure, both."),
    ] = False,
    log_dir: LOG_DIR = None,
    plot: PLOT = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Compare each side with the first, case by case: FASTER, SLOWER, SAME or UNSURE.

    Schedules and the words are looked up in the tuning log: tuning measures the best of every
    schedule in the same rounds, which are then compared round by round. Sides of different runs are
    compared as they are, over eager mode or over a copy, whichever is steadier, and what may have
    happened between the runs is counted into the interval.

    With --measure the sides are built, checked against float64 and timed in the same rounds: of a
    schedule the best that was measured with the knobs given, else its default knobs. What it logs
    serves no calls. Ctrl-C ends it with the cases that are done.

    The ratio is A / B, above 1 where B is faster. FASTER and SLOWER hold for all cases together but
    for 5 % (Holm), beyond --smallest; SAME lies within it; what other work on the machine disturbed
    is UNSURE, unless it lies beyond 3 and eager's own ratio does not.
    """
    from lntune.compare import run
    from lntune.report import comparisons as report
    from lntune.report import plots

    if plot:
        if len(sides) > TWO:
            raise InputError(got_expected("--plot", f"{len(sides)} sides", "two"))
        plots.check(plot)
    if fail_on not in ("", "slower", "unsure"):
        raise unknown("--fail-on", fail_on, ["slower", "unsure"])
    wanted = Wanted.of(
        names(op), integers("--hidden", hidden), names(dtype), integers("--rows", rows)
    )
    again = command_line(
        "compare",
        sides,
        {
            "--op": op,
            "--hidden": hidden,
            "--dtype": dtype,
            "--rows": rows,
            "--smallest": smallest if smallest != SMALLEST else "",
            "--target": target if target != DEFAULT else "",
            "--all-devices": everywhere,
            "--across-devices": across_devices,
            "--cold": cold,
            "--log-dir": str(log_dir or ""),
            "--format": "html",
        },
    )
    options = run.Options(target, log_dir, everywhere, across_devices, _share(smallest), cold)
    length = seconds("--time", time_per_case)
    with using_logs(log_dir, may_be_new=measure):
        compared = run.parse(sides, options)
        asked: list[Case] = []
        if measure:
            asked = _asked(compared, op, hidden, dtype, rows, options)
            _measure(compared, asked, length, options)
        results = run.compare_sides(compared, wanted, options, asked)
    failing = [line for result in results for line in result.failing(fail_on)] if fail_on else []
    for line in failing:
        tell(f"fails: {line}")
    if plot:
        plots.of_comparison(results[0], plot)
        tell(f"The plot is in {plot}.")

    def page() -> str:
        from lntune.report.page import write

        return write.compare(results, again)

    output = dataclasses.replace(report.output(results), page=page)
    finish(output, output_format, wide, ok=not failing)


def _asked(
    compared: Sequence[Side], op: str, hidden: str, dtype: str, rows: str, options: Options
) -> list[Case]:
    """The cases to measure: those asked for, or those there are."""
    from lntune.commands import compare as measuring
    from lntune.compare.pairs import operators

    asked = names(op) or operators(compared) or [ops.DEFAULT]
    if hidden or dtype or rows:
        return [case for name in asked for case in cases(name, hidden, dtype, rows)]
    return [case for name in asked for case in measuring.cases_of(compared, name, options)]


def _measure(compared: Sequence[Side], asked: list[Case], length: float, options: Options) -> None:
    from lntune.commands import compare as measuring
    from lntune.report.tables import console

    err = console(stderr=True)

    def on_case(index: int, count: int, case: Case) -> None:
        err.print(f"[{index + 1}/{count}] {case}", markup=False)

    measuring.measure(compared, asked, length, options, on_case, tell)


def _share(text: str) -> float:
    """The share of a text such as "3%" or "0.03"."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise InputError(got_expected("--smallest", repr(text), "a share such as 3% or 0.03"))
    return share
