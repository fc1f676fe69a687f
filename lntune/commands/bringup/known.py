"""What the tuning log already holds of the cases of a bringup.

There is no other memory: a run that was killed goes on from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lntune import schedule
from lntune.case import Case
from lntune.device import Device
from lntune.log import records
from lntune.log.records import Record, Role, Status
from lntune.system import paths
from lntune.versions import Code

BENCH: Role = "bench"
"""The role of a record that `lntune bringup` benchmarked: what serves the case against eager,
torch.compile and the others.
"""


def _of(
    device: Device,
    cases: Sequence[Case],
    folders: Sequence[Path],
    role: Role | tuple[Role, ...] = (),
) -> list[Record]:
    """The records of this device, oldest first, for the operators of the cases, whose schedule is
    as it was; also those without one.
    """
    measured = []
    for op in dict.fromkeys(case.op for case in cases):
        for record in records.read(folders, op, device, role):
            if record.code in (Code(), schedule.code_of(record.schedule)):
                measured.append(record)
    return measured


def finals(device: Device, cases: Sequence[Case]) -> dict[Case, Record]:
    """The latest final of each case, measured on this device with the schedules as they are."""
    return _finals(cases, _of(device, cases, paths.log_dirs(), "final"))


def _finals(cases: Sequence[Case], log: Sequence[Record]) -> dict[Case, Record]:
    """Those of the cases, among records given oldest first."""
    latest = records.finals(log)
    return {case: latest[key] for case in cases if (key := records.Key.of(case)) in latest}


def benchmarked(device: Device, cases: Sequence[Case]) -> dict[Case, Record]:
    """The latest benchmark of each case that has one which is not older than the case's final."""
    log = _of(device, cases, paths.log_dirs(), ("final", BENCH))
    place = {id(record): number for number, record in enumerate(log)}
    newest = {case: place[id(record)] for case, record in _finals(cases, log).items()}
    latest: dict[Case, Record] = {}
    for record in log:
        if (
            record.role == BENCH
            and record.case in cases
            and record.status == "ok"
            and place[id(record)] >= newest.get(record.case, 0)
        ):
            latest[record.case] = record
    return latest


def failures(device: Device, cases: Sequence[Case]) -> tuple[Counter[Status], dict[Status, str]]:
    """(trials by status, an example of each failure in words) of the folder that is written to, for
    the operators of the cases.
    """
    counted: Counter[Status] = Counter()
    examples: dict[Status, str] = {}
    for record in _of(device, cases, [paths.log_dir()]):
        if record.role == BENCH:
            continue
        if record.role == "trial" or record.status != "ok":
            counted[record.status] += 1
        if record.status != "ok":
            examples[record.status] = f"{record.case} {record.schedule}: {record.message}"
    return counted, examples
