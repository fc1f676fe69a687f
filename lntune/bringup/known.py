"""What the tuning log already holds of a plan. There is no other memory: a run that was killed goes on from here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lntune import paths, records, schedule
from lntune.case import Case
from lntune.device import Device
from lntune.errors import UnknownNameError
from lntune.records import Record

BENCH = "bench"
"""The role of a record that `lntune bringup` benchmarked: what serves the case against eager, torch.compile and the others."""


def _of(device: Device, cases: Sequence[Case], folders: Sequence[Path], role: str | None = None) -> list[Record]:
    """The records of this device, for the operators of the cases, whose schedule's source is today's; also those without a schedule."""
    found = []
    for op in dict.fromkeys(case.op for case in cases):
        for record in records.read(folders, op, device, role):
            if not device.differences(record.device) and record.source in ("", _source(record.schedule)):
                found.append(record)
    return found


def _source(name: str) -> str:
    """The source hash of a schedule as it is now; empty when there is none of that name, or for eager mode."""
    try:
        return schedule.get(name).source
    except UnknownNameError:
        return ""


def finals(device: Device, cases: Sequence[Case]) -> dict[Case, Record]:
    """The latest final of each case that has one: measured on this device, with the schedules as they are."""
    latest = records.finals(_of(device, cases, paths.log_dirs(), "final"))
    keys = {case: (case.op, case.hidden, case.dtype, case.bucket) for case in cases}
    return {case: latest[key] for case, key in keys.items() if key in latest}


def benchmarked(device: Device, cases: Sequence[Case]) -> dict[Case, Record]:
    """The latest benchmark of each case that has one which is not older than the case's final."""
    newest = finals(device, cases)
    found: dict[Case, Record] = {}
    for record in sorted(_of(device, cases, paths.log_dirs(), BENCH), key=lambda r: r.time):
        if record.case in cases and record.status == "ok" and (record.case not in newest or record.time >= newest[record.case].time):
            found[record.case] = record
    return found


def failures(device: Device, cases: Sequence[Case]) -> tuple[Counter[str], dict[str, str]]:
    """(trials by status, an example of each failure in words) of the folder that is written to, for the operators of the cases."""
    counted: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for record in _of(device, cases, [paths.log_dir()]):
        if record.role == BENCH:
            continue
        if record.role == "trial" or record.status != "ok":
            counted[record.status] += 1
        if record.status != "ok":
            examples[record.status] = f"{record.case} {record.schedule}: {record.message}"
    return counted, examples
