"""The output of `lntune report`: what a device's log comes to, its cases, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lntune.report.columns import Table, whole
from lntune.report.output import Output
from lntune.report.overview import Overview, overview_table
from lntune.report.survey import Mend, Survey
from lntune.report.tables import DISTURBED, STALE, cases_table, error_lines, result_lines
from lntune.words import counted

COMMANDS = 3
"""Commands that are shown of those that mend something; the facts have all."""
MEDIANS = "medians; everyone allocates its output at every call"
COLD = ", with nothing of it in a cache"

RATIOS = (
    "over eager: the median of the ratios within rounds, which a change of the clock between rounds"
    " leaves alone; not the ratio of the medians"
)
ROOF = (
    "of copy: the bandwidth of what has to be moved, as a share of what PyTorch's copy of the first"
    " input reaches in the same rounds: memory's roof, as far as a copy tells"
)


def output(
    surveys: Sequence[Survey],
    again: str,
    cases: bool = True,
    knobs_below: bool = False,
    cold: bool = False,
) -> Output:
    """What was found of some devices; `again` is the command that prints it again, `cases`: with a
    line for each; `cold`: the figures are of a cold cache.
    """
    title = f"{MEDIANS}{COLD if cold else ''}"
    tables: list[Table] = []
    for one in surveys:
        tuned = [o for o in one.operators if o.tuned]
        tables.append(overview_table(tuned or one.operators, one.device))
        tables[-1].notes = [
            *result_lines(one.cases),
            *(_nothing_of([o for o in one.operators if not o.tuned]) if tuned else ()),
            *(mend_line(mend, one.here) for mend in one.mend),
        ]
        roof = [ROOF] if any(row.of_copy for row in one.cases) else []
        if cases:
            tables.append(cases_table(one.cases, title, details=True, knobs_below=knobs_below))
            ratios = [RATIOS] if any(row.speedup for row in one.cases) else []
            tables[-1].notes = [*ratios, *roof, *error_lines(one.cases)]
        else:
            tables[-1].notes += roof
    facts = [{**msgspec.structs.asdict(one), "again": again} for one in surveys]
    records = [row for one in surveys for row in one.cases]
    return Output(facts, tables, closing(again, cases) if surveys else (), records)


def _nothing_of(operators: Sequence[Overview]) -> list[str]:
    """A sentence that names the operators and dtypes of which no case is tuned."""
    dtypes: dict[str, list[str]] = {}
    for one in operators:
        dtypes.setdefault(one.op, []).append(one.dtype)
    named = (f"{op} ({', '.join(of)})" for op, of in dtypes.items())
    return [f"no case yet of {', '.join(named)}"] if operators else []


def mend_line(mend: Mend, here: bool) -> str:
    """A sentence on cases that want a measurement, with the commands that make it, `here` or where
    the device is.
    """
    what = {
        "missing": f"{counted(mend.cases, 'case')} of the default grid missing",
        "stale": f"! {mend.cases} {STALE}",
        "disturbed": f"* {mend.cases} {DISTURBED}, so that neither times nor ratios hold",
    }[mend.why]
    commands = "; ".join(map(whole, mend.commands[:COMMANDS]))
    more = len(mend.commands) - COMMANDS
    others = f" (and {counted(more, 'command')} more; --json has all)" if more > 0 else ""
    return f"{what}. Run{'' if here else ' there'}: {commands}{others}"


def closing(again: str, cases: bool) -> list[str]:
    """Where to look next, and the command that prints the same figures."""
    lines = []
    if not cases:
        lines.append(
            f"each case: {whole(f'{again} --every-case')}, or name an operator, --hidden, --dtype"
            " or --rows"
        )
    exact = whole(f"{again} --format csv")
    lines.append(f"printed again by {whole(again)}, every figure in full by {exact}")
    return lines
