"""Dry runs of the tuner as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lntune.report.tables import percent

if TYPE_CHECKING:
    from lntune.tune.dry import DryRun, Ranked


def length(seconds: float) -> str:
    """A duration as a person says it."""
    minute, hour = 60, 3600
    if seconds < 2 * minute:
        return f"{seconds:.0f} s"
    return f"{seconds / minute:.0f} min" if seconds < 2 * hour else f"{seconds / hour:.1f} h"


def table(found: DryRun) -> Table:
    """A row for each case."""
    made = Table(title=f"dry run for {found.device.name} ({found.device.isa}): nothing was measured", title_justify="left")
    made.add_column("case")
    for name in ("valid", "built", "verified", "pruned", "failed", "to measure", "time"):
        made.add_column(name, justify="right")
    made.add_column("the first by rank")
    for p in found.plans:
        counts = (p.candidates, p.built, p.verified, sum(p.pruned.values()), sum(map(len, p.failed.values())), p.measured)
        made.add_row(str(p.case), *map(str, counts), length(p.seconds), _first(p.first[0]) if p.first else "-")
    return made


def _first(one: Ranked) -> str:
    told = f"{one.schedule} {one.knobs}"
    return told if one.registers is None else f"{told}: {one.registers} registers, {percent(one.occupancy)} occupancy"


def lines(found: DryRun) -> list[str]:
    """What a run would do, what was pruned and what was wrong."""
    said = [f"{len(found.plans)} cases in {found.seconds:.0f} s, built with {found.compiler}{' (interrupted)' if found.interrupted else ''}"]
    said.append(f"a run would measure {found.measured} candidates in about {length(found.run_seconds)}, {found.within} of them in the budget given")
    said.append(f"reckoned with {found.assumption}")
    for p in found.plans:
        said += [] if p.candidates else [f"no schedule has valid knobs for {p.case}: eager mode serves it"]
        said += [f"pruned: {p.case}: {count} x {reason}" for reason, count in p.pruned.items()]
        said += [f"FAILED: {p.case}: {len(which)} x {reason} (first: {which[0]})" for reason, which in p.failed.items()]
    return said
