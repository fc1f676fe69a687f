"""What tuning logs say of a device: its cases, what they come to by operator and dtype, and what is
missing, stale or disturbed, with the commands that mend it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import backends, ops
from lntune import device as device_module
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log import caches, records, select
from lntune.log.records import Key, Record, Role
from lntune.log.wanted import Wanted
from lntune.report.overview import Overview, overviews
from lntune.report.rows import BEST_COPY, Row, row_of, rows_of, summary

if TYPE_CHECKING:
    from lntune.schedule import Schedule


class Mend(msgspec.Struct, frozen=True):
    """Cases that want a measurement: why ("missing", "stale", "disturbed"), how many, and the
    commands that make it.
    """

    why: str
    cases: int
    commands: list[str]


class Survey(msgspec.Struct, frozen=True):
    """A device: its folder's name, whether it is the one asked for or this machine's CPU, its
    cases, what they come to, what is missing of the default grid and what mends it.
    """

    device: str
    name: str
    here: bool
    cases: list[Row]
    summary: dict[str, Any]
    operators: list[Overview]
    missing: list[Case]
    mend: list[Mend]


def surveys(
    folders: Iterable[Path],
    wanted: Wanted,
    owner: Device | None,
    schedules: Mapping[str, Schedule],
    cold: bool = False,
) -> list[Survey]:
    """What the logs in some folders say of a device, or of every one where `owner` is None: those
    that have a case that is asked for. `schedules` are those of today; `cold`: of the cases that
    were also measured with a cold cache, with those figures.
    """
    return [
        survey(group, wanted, group_owner, schedules, here=owner is not None, cold=cold)
        for group_owner, group in asked_records(folders, wanted, owner, ("final", "bench"))
        if any(r.role == "final" for r in group)
    ]


def asked_records(
    folders: Iterable[Path], wanted: Wanted, owner: Device | None, role: tuple[Role, ...]
) -> list[tuple[Device, list[Record]]]:
    """The records of what is asked for, by device, oldest first.

    Raises:
        InputError: no device has a name with that part.
    """
    read = records.read(folders, wanted.op, owner, role)
    # Old records of a device may lie in a folder that does not name its model.
    groups = [(owner, read)] if owner else [(g[0].device, g) for g in records.by_device(read)]
    of_name = [(device, group) for device, group in groups if wanted.device in device.slug]
    if groups and not of_name:
        known = ", ".join(sorted(device.slug for device, _ in groups))
        expected = f"a part of one of {known}"
        raise InputError(got_expected("device", repr(wanted.device), expected))
    kept = [(device, [r for r in group if wanted.takes(r.case)]) for device, group in of_name]
    return [(device, group) for device, group in kept if group]


def survey(
    log: Sequence[Record],
    wanted: Wanted,
    device: Device,
    schedules: Mapping[str, Schedule],
    here: bool = True,
    cold: bool = False,
) -> Survey:
    """What records of one device say of the cases that are asked for, see `surveys`."""
    finals = select.served(log, schedules)
    if cold:
        found = rows_of(filter(None, map(caches.cold, finals.values())), schedules)
    else:
        found = with_compile(rows_of(finals.values(), schedules), log)
    rows = with_roofs(found)
    missing = missing_of(finals, wanted, device, schedules)
    return Survey(
        device=device.slug,
        name=device.name,
        here=here or not device_module.current().differences(device),
        cases=rows,
        summary=summary(rows),
        operators=overviews(rows, missing),
        missing=missing,
        mend=mends(rows, missing, device),
    )


def missing_of(
    finals: Container[Key], wanted: Wanted, device: Device, schedules: Mapping[str, Schedule]
) -> list[Case]:
    """The cases of the default grids that are asked for, have no final, and that a schedule for
    such a device is there for.
    """
    tunable = {s.op for s in schedules.values() if s.kind == device.kind}
    return [
        case
        for op in ops.OPS.values()
        for case in (op.grid if op.name in tunable else ())
        if wanted.takes(case) and Key.of(case) not in finals
    ]


def with_compile(rows: Iterable[Row], log: Iterable[Record]) -> list[Row]:
    """Rows with torch.compile's time and how many times as fast they are, from the latest benchmark
    of the same kernel that nothing disturbed.
    """
    compiled: dict[Case, Row] = {}
    for record in log:
        if record.role == "bench" and record.median("compile") and not record.disturbance:
            row = row_of(record)
            compiled[row.case] = row

    def joined(row: Row) -> Row:
        bench = compiled.get(row.case)
        if bench is None or (bench.schedule, bench.knobs) != (row.schedule, row.knobs):
            return row
        return msgspec.structs.replace(
            row, compile_us=bench.compile_us, over_compile=bench.over_compile
        )

    return [joined(row) for row in rows]


def with_roofs(rows: Sequence[Row]) -> list[Row]:
    """Rows with the best copy of the log as a roof where the record itself has none."""
    best = max((row.copy_gbps for row in rows if row.copy_gbps), default=None)
    if best is None:
        return list(rows)
    return [
        msgspec.structs.replace(row, of_roof=row.gbps / best, roof=BEST_COPY)
        if row.of_roof is None and row.gbps
        else row
        for row in rows
    ]


def mends(rows: Iterable[Row], missing: Sequence[Case], device: Device) -> list[Mend]:
    """What wants a measurement on a device, and the commands; an operator that lacks all of its
    grid has a command without sizes.
    """
    on = backends.option(device)
    whole = [op.name for op in ops.OPS.values() if op.grid and set(op.grid) <= set(missing)]
    some = [case for case in missing if case.op not in whole]
    commands = select.tune_commands(some, on) + [f"lntune tune {op}{on}" for op in whole]
    found = [Mend("missing", len(missing), commands)]
    rows = list(rows)
    for why, cases in (
        ("stale", [row.case for row in rows if row.stale]),
        ("disturbed", [row.case for row in rows if row.disturbed and not row.stale]),
    ):
        found.append(Mend(why, len(cases), select.tune_commands(cases, on)))
    return [mend for mend in found if mend.cases]
