"""The trials of earlier runs that stand for the same again: nobody waits twice for what the log
tells already, and a run that was killed goes on where it ended.

A trial is the same where all is the same that its code and its time depend on: the case with its
rows and its variant, the device, the threads, the versions of the packages, the schedule's code and
the knobs. Failures stand, too: what crashed or hung would do it again. What other work disturbed
says nothing and is measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lntune.case import Case
from lntune.device import Device
from lntune.log import records
from lntune.log.records import Record
from lntune.measure.jobs import Candidate
from lntune.system import toolchain


def candidate_of(record: Record) -> Candidate | None:
    """What was measured, with its knobs in today's order; None where there is no such schedule or
    no such knobs any more, or the schedule's code is another.
    """
    try:
        schedule, setting = Candidate.of_record(record).resolved(record.case.op)
    except Exception:  # the class of the knobs may be a user's
        return None
    return Candidate.of(schedule.name, setting) if schedule.code == record.code else None


class Earlier:
    """The trials that logs hold of a device and a number of threads, as they stand when an operator
    is first asked for.
    """

    def __init__(self, folders: Sequence[Path], device: Device, threads: int) -> None:
        self._folders, self._device, self._threads = folders, device, threads
        self._records: dict[str, dict[Case, list[Record]]] = {}
        self._trials: dict[Case, dict[Candidate, Record]] = {}

    def trials(self, case: Case) -> dict[Candidate, Record]:
        """The latest trial of each candidate of a case that has one."""
        if case not in self._trials:
            self._trials[case] = {
                candidate: record
                for record in self._of_op(case.op).get(case, ())
                if (candidate := candidate_of(record)) and _usable(record)
            }
        return self._trials[case]

    def _of_op(self, op: str) -> dict[Case, list[Record]]:
        """The trials of an operator that were made under today's conditions, by case."""
        if op not in self._records:
            by_case = self._records[op] = {}
            for record in records.read(self._folders, op, self._device, role="trial"):
                if record.threads == self._threads and record.versions == toolchain.versions():
                    by_case.setdefault(record.case, []).append(record)
        return self._records[op]


def _usable(record: Record) -> bool:
    """Whether it says something about its candidate: a failure, or a time that nobody disturbed."""
    return record.status != "ok" or (record.median() is not None and not record.disturbance)
