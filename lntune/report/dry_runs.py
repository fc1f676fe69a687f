"""Dry runs of the tuner as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lntune.report.columns import Column, Table, key
from lntune.report.tables import percent
from lntune.words import counted, length

if TYPE_CHECKING:
    from lntune.tune.dry import DryRun, Ranked


def table(run: DryRun) -> Table:
    """A row for each case."""
    columns = [
        *key("case"),
        Column("valid", 2),
        Column("built", 3),
        Column("verified", 1),
        Column("pruned", 4),
        Column("failed"),
        Column("to measure"),
        Column("time"),
        Column("the first by rank", 5, False),
    ]
    device = run.device
    rows = Table(f"dry run for {device.name} ({device.isa}): nothing was measured", columns)
    for p in run.plans:
        counts = (
            p.candidates,
            p.built,
            p.verified,
            sum(p.pruned.values()),
            sum(map(len, p.failed.values())),
            p.measured,
        )
        first = _first(p.first[0]) if p.first else "-"
        rows.add(str(p.case), *map(str, counts), length(p.seconds), first)
    return rows


def _first(one: Ranked) -> str:
    name = f"{one.schedule} {one.knobs}"
    if one.registers is None:
        return name
    return f"{name}: {counted(one.registers, 'register')}, {percent(one.occupancy)} occupancy"


def lines(run: DryRun) -> list[str]:
    """What a run would do, what was pruned and what was wrong."""
    interrupted = " (interrupted)" if run.interrupted else ""
    cases = f"{counted(len(run.plans), 'case')} in {run.seconds:.0f} s"
    text = [f"{cases}, built with {run.compiler}{interrupted}"]
    measured, time = counted(run.measured, "candidate"), length(run.run_seconds)
    within = f"{run.within} of them in the budget given"
    text.append(f"a run would measure {measured} in about {time}, {within}")
    text.append(f"reckoned with {run.assumption}")
    for p in run.plans:
        if not p.candidates:
            text.append(f"no schedule has valid knobs for {p.case}: eager mode serves it")
        text += [f"pruned: {p.case}: {count} x {reason}" for reason, count in p.pruned.items()]
        text += [
            f"FAILED: {p.case}: {len(which)} x {reason} (first: {which[0]})"
            for reason, which in p.failed.items()
        ]
    return text
