"""Dry runs of the tuner as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lntune.report.columns import Column, Table, key
from lntune.report.tables import percent
from lntune.words import counted

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
    columns = [
        *key("case"),
        Column("valid", 2),
        Column("built", 3),
        Column("verified", 1),
        Column("pruned", 4),
        Column("failed"),
    ]
    columns += [Column("to measure"), Column("time"), Column("the first by rank", 5, False)]
    made = Table(
        f"dry run for {found.device.name} ({found.device.isa}): nothing was measured", columns
    )
    for p in found.plans:
        counts = (
            p.candidates,
            p.built,
            p.verified,
            sum(p.pruned.values()),
            sum(map(len, p.failed.values())),
            p.measured,
        )
        made.add(
            str(p.case),
            *map(str, counts),
            length(p.seconds),
            _first(p.first[0]) if p.first else "-",
        )
    return made


def _first(one: Ranked) -> str:
    told = f"{one.schedule} {one.knobs}"
    return (
        told
        if one.registers is None
        else f"{told}: {counted(one.registers, 'register')}, {percent(one.occupancy)} occupancy"
    )


def lines(found: DryRun) -> list[str]:
    """What a run would do, what was pruned and what was wrong."""
    interrupted = " (interrupted)" if found.interrupted else ""
    said = [
        f"{counted(len(found.plans), 'case')} in {found.seconds:.0f} s, built with"
        f" {found.compiler}{interrupted}"
    ]
    measured, time = counted(found.measured, "candidate"), length(found.run_seconds)
    said.append(
        f"a run would measure {measured} in about {time}, {found.within} of them in the budget"
        " given"
    )
    said.append(f"reckoned with {found.assumption}")
    for p in found.plans:
        said += (
            []
            if p.candidates
            else [f"no schedule has valid knobs for {p.case}: eager mode serves it"]
        )
        said += [f"pruned: {p.case}: {count} x {reason}" for reason, count in p.pruned.items()]
        said += [
            f"FAILED: {p.case}: {len(which)} x {reason} (first: {which[0]})"
            for reason, which in p.failed.items()
        ]
    return said
