"""Measured cases as a table and in sentences, and how figures are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from lntune import knobs
from lntune.report.bars import bar
from lntune.report.columns import KEY, WIDE, Cell, Column, Table, key
from lntune.report.rows import BEST_COPY, Row, summary
from lntune.words import counted

TWICE = 2
"""What kernels are allowed of eager's own error, beside some roundings."""
NAMED = 6
"""Cases that a sentence names; the table has all."""
ROW_STRIDED = ", row-strided"
DISTURBED = "disturbed by other work on the machine"
STALE = "stale, measured before the schedule changed"


def console(stderr: bool = False, wide: bool = False) -> Console:
    """A console as wide as the terminal; where output goes elsewhere, or with `wide`, nothing is
    left out or broken.
    """
    plain = Console(stderr=stderr, highlight=False)
    if not plain.file.isatty():  # also with FORCE_COLOR, which is about colours alone
        return Console(stderr=stderr, highlight=False, width=WIDE, force_interactive=False)
    return Console(stderr=stderr, highlight=False, width=WIDE) if wide else plain


def plan_text(schedule: str, setting: Mapping[str, knobs.Value], strided: bool = False) -> str:
    """A schedule and its knobs; `strided`: in the form that takes rows that lie apart."""
    return f"{schedule} {knobs.describe(setting)}{ROW_STRIDED if strided else ''}"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def micros(value: float | None) -> str:
    """Microseconds with three significant digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.0f}%"


def ratio_text(value: float | None) -> Text:
    """A speedup, coloured by which side of 1 it is on; 2 % either way is a draw."""
    style = "" if value is None or 0.98 <= value <= 1.02 else "green" if value > 1 else "red"  # noqa: PLR2004
    return Text(number(value, 2, "x"), style=style)


def winner_text(winner: str, over_runner_up: float | None) -> str:
    """How certain a winner is, and how many times as fast as the runner-up."""
    return f"{winner} {number(over_runner_up, 2, 'x')}" if over_runner_up else winner or "-"


BAR = 14
"""Characters of the longest bar."""


def cases_table(
    rows: Sequence[Row],
    title: str,
    details: bool = False,
    bandwidth: float | None = None,
    knobs_below: bool = False,
) -> Table:
    """Per case: eager and torch.compile where measured, tuned, the ratios, bandwidth, share of a
    copy, errors.

    Where `bandwidth` is known, that of a large plain copy on the device in bytes a second, also the
    share of it. `knobs_below`: on a terminal the knobs have lines of their own.
    """
    compiled, eager = any(r.compile_us for r in rows), any(r.eager_us for r in rows)
    over_compile = not any(r.over_better for r in rows) and any(r.over_compile for r in rows)
    default = details and any(r.default_us for r in rows)
    of_log = any(r.roof == BEST_COPY for r in rows)
    of_bandwidth = f"of {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""
    most: dict[str, float] = {}  # by operator: of one it may be ten times another's
    for r in rows:
        most[r.op] = max(most.get(r.op, 1.0), r.speedup or 1.0)
    longest = f"up to {next(iter(most.values())):.3g}x" if len(most) == 1 else "to op's best"

    def share(r: Row) -> str:
        return percent(r.gbps * 1e9 / bandwidth if bandwidth and r.gbps else None)

    # Which are there, their rank, and what they hold of a row.
    figures: list[tuple[bool, Column, Callable[[Row], Cell]]] = [
        (True, Column("hidden"), lambda r: str(r.hidden)),
        (True, Column("rows"), lambda r: str(r.rows)),
        (eager, Column("eager us", 1), lambda r: micros(r.eager_us)),
        (compiled, Column("compile us", 5), lambda r: micros(r.compile_us)),
        (
            True,
            Column("tuned us"),
            lambda r: micros(r.tuned_us) + "*" * bool(r.disturbed) + "!" * r.stale,
        ),
        (eager, Column("over eager"), lambda r: ratio_text(r.speedup)),
        (
            any(r.training_over_eager for r in rows),
            Column("in training", 2),
            lambda r: ratio_text(r.training_over_eager),
        ),
        (
            any(r.speedup for r in rows),
            Column(longest, 3, right=False, drawn=True),
            lambda r: bar(r.speedup, most[r.op], BAR),
        ),
        (
            compiled and not over_compile,
            Column("over better", 2),
            lambda r: ratio_text(r.over_better),
        ),
        (over_compile, Column("over compile", 2), lambda r: ratio_text(r.over_compile)),
        (True, Column("GB/s", 4), lambda r: number(r.gbps, 1)),
        (True, Column("of copy", 2 if eager else KEY), lambda r: percent(r.of_copy)),
        (of_log, Column("of best copy", 5), lambda r: percent(r.of_roof)),
        (bool(bandwidth), Column(of_bandwidth, 4), share),
        (True, Column("error/allowed", 6), lambda r: number(r.of_allowed, 2)),
        (True, Column("error/eager's", 9), lambda r: number(r.error, 2)),
        (default, Column("over untuned", 7), lambda r: ratio_text(r.over_default)),
        (
            details and any(r.winner for r in rows),
            Column("winner", 8, right=False),
            lambda r: winner_text(r.winner, r.over_runner_up),
        ),
        (details, Column("spread", 10), lambda r: percent(r.spread)),
        (
            details,
            Column("schedule and knobs", 11, right=False, below=knobs_below),
            lambda r: f"{r.schedule} {r.knobs}".strip(),
        ),
    ]
    used = [(column, cell) for shown, column, cell in figures if shown]
    columns = [*key("op", "dtype"), *(column for column, _ in used)]
    table = Table(title, columns, grouped=True)
    for r in rows:
        table.add(r.op, r.dtype, *(cell(r) for _, cell in used))
    return table


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """What the table comes to, in sentences, and what its marks mean."""
    facts = summary(list(rows))
    lines = [*result_lines(rows), *error_lines(rows)]
    if facts["disturbed"]:
        lines.append(f"* {facts['disturbed']} {DISTURBED}: neither times nor ratios hold")
    if facts["stale"]:
        lines.append(
            f"! {facts['stale']} {STALE}: lntune report has the command that measures again"
        )
    return lines


def result_lines(rows: Sequence[Row]) -> list[str]:
    """What the table comes to, in sentences."""
    facts = summary(list(rows))
    lines = [counted(facts["cases"], "case")]
    if facts["geomean_over_eager"]:
        undisturbed = sum(r.speedup is not None for r in rows)
        of = f" in the {undisturbed} that nothing disturbed" if facts["disturbed"] else ""
        lines[0] += f", geomean {facts['geomean_over_eager']:.2f}x over eager{of}"
    if facts["geomean_over_better_of_eager_and_compile"]:
        lines.append(
            f"geomean {facts['geomean_over_better_of_eager_and_compile']:.2f}x over the better of"
            " eager and torch.compile"
        )
    if facts["geomean_over_default"]:
        lines.append(
            f"geomean {facts['geomean_over_default']:.2f}x over the default knobs"
            " that serve where nothing is tuned"
        )
    slower = facts["slower_than_eager"]
    more = f" and {len(slower) - NAMED} more" if len(slower) > NAMED else ""
    if facts["geomean_over_eager"]:
        lines.append(
            "slower than eager nowhere"
            if not slower
            else f"slower than eager in {len(slower)}: {'; '.join(slower[:NAMED])}{more}"
        )
    elif facts["geomean_of_copy"]:
        lines.append(
            f"bandwidth of a copy: geomean {percent(facts['geomean_of_copy'])}, smallest"
            f" {percent(facts['smallest_of_copy'])}"
        )
    return lines


def error_lines(rows: Sequence[Row]) -> list[str]:
    """What is to be known of errors beside eager mode's, where they look large."""
    beyond = sum(r.error is not None and r.error > TWICE for r in rows)
    sentence = (
        f"error/eager's above {TWICE} in {beyond}: there eager is all but exact; error/allowed"
        " counts, whose limit is 1"
    )
    return [sentence] if beyond else []
