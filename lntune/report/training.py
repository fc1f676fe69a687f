"""The table of `lntune bench --training`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from lntune.log.records import Record
from lntune.report.columns import KEY, Column, Table, key
from lntune.report.rows import geomean
from lntune.report.tables import micros, ratio_text
from lntune.timing import pairwise
from lntune.words import counted

FEW, MANY = 8, 512
"""Rows between which a step is neither all overhead nor all memory."""


class Step(msgspec.Struct, frozen=True):
    """A case in training: microseconds (medians) of forward and backward by contender, and of the
    forward alone with gradients recorded; how many times faster ours is than eager and than the
    better of eager and torch.compile. None: not measured, or disturbed by other work.
    """

    dtype: str
    hidden: int
    rows: int
    eager_us: float | None
    compile_us: float | None
    tuned_us: float | None
    over_eager: float | None
    over_better: float | None
    eager_forward_us: float | None
    tuned_forward_us: float | None
    forward_over_eager: float | None
    disturbed: str


def steps_of(records: Sequence[Record]) -> list[Step]:
    """The cases in the order a person looks for them."""
    steps = []
    for r in records:
        timings = {} if r.disturbance else r.timings
        eager, compiled, tuned = (timings.get(name) for name in ("eager", "compile", "tuned"))
        better = min((t for t in (eager, compiled) if t), key=lambda t: t.median_us, default=None)
        step = Step(
            dtype=r.case.dtype,
            hidden=r.case.hidden,
            rows=r.case.rows,
            eager_us=r.median("eager"),
            compile_us=r.median("compile"),
            tuned_us=r.median("tuned"),
            over_eager=pairwise(eager, tuned),
            over_better=pairwise(better, tuned),
            eager_forward_us=r.median("eager forward"),
            tuned_forward_us=r.median("tuned forward"),
            forward_over_eager=pairwise(timings.get("eager forward"), timings.get("tuned forward")),
            disturbed=r.disturbance,
        )
        steps.append(step)
    return sorted(steps, key=lambda s: (s.dtype, s.hidden, s.rows))


def facts(steps: Sequence[Step]) -> dict[str, Any]:
    """Geomeans, and the cases in which ours is slower than eager."""
    between = [s.over_eager for s in steps if FEW <= s.rows <= MANY]
    return {
        "cases": len(steps),
        "geomean_over_eager": geomean(s.over_eager for s in steps),
        "geomean_over_eager_8_to_512_rows": geomean(between),
        "geomean_over_better_of_eager_and_compile": geomean(
            s.over_better for s in steps if s.compile_us
        ),
        "geomean_forward_over_eager": geomean(s.forward_over_eager for s in steps),
        "slower_than_eager": [
            f"{s.rows}x{s.hidden} {s.dtype}: {s.over_eager:.2f}x"
            for s in steps
            if s.over_eager and s.over_eager < 1
        ],
        "disturbed": sum(bool(s.disturbed) for s in steps),
    }


def steps_table(steps: Sequence[Step]) -> Table:
    """Per case: a step of eager's module, of the compiled one and of ours; the forwards alone."""
    columns = [
        *key("dtype"),
        Column("hidden", KEY),
        Column("rows", KEY),
        Column("eager us", 1),
        Column("compile us", 4),
        Column("tuned us", KEY),
        Column("over eager", KEY),
        Column("over better", 2),
        Column("eager forward", 6),
        Column("tuned forward", 5),
        Column("forward over", 3),
    ]
    table = Table(
        "forward and backward of a module, gradients of x, weight and bias; forward alone with"
        " gradients recorded",
        columns,
    )
    for s in steps:
        table.add(
            s.dtype,
            str(s.hidden),
            str(s.rows),
            micros(s.eager_us),
            micros(s.compile_us),
            micros(s.tuned_us) + "*" * bool(s.disturbed),
            ratio_text(s.over_eager),
            ratio_text(s.over_better if s.compile_us else None),
            micros(s.eager_forward_us),
            micros(s.tuned_forward_us),
            ratio_text(s.forward_over_eager),
        )
    return table


def steps_lines(steps: Sequence[Step]) -> list[str]:
    """What the table comes to, in sentences."""
    figures = facts(steps)
    lines = [counted(figures["cases"], "case")]
    if figures["geomean_over_eager"]:
        lines[0] += (
            f", geomean {figures['geomean_over_eager']:.2f}x over eager,"
            f" {figures['geomean_forward_over_eager']:.2f}x in the forward alone"
        )
    if figures["geomean_over_eager_8_to_512_rows"]:
        lines.append(
            f"{FEW} to {MANY} rows:"
            f" geomean {figures['geomean_over_eager_8_to_512_rows']:.2f}x over eager"
        )
    if figures["geomean_over_better_of_eager_and_compile"]:
        lines.append(
            f"geomean {figures['geomean_over_better_of_eager_and_compile']:.2f}x over the better of"
            " eager and torch.compile"
        )
    if figures["geomean_over_eager"]:
        slower = figures["slower_than_eager"]
        lines.append(
            "slower than eager nowhere"
            if not slower
            else f"slower than eager in {len(slower)}: {'; '.join(slower)}"
        )
    if figures["disturbed"]:
        lines.append(
            f"* {figures['disturbed']} disturbed by other work on the machine:"
            " neither times nor ratios hold"
        )
    return lines
