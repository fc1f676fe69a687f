"""What a tuning run writes to the tuning log, and what it reads there: what was tried of a case
before, and what won it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from lntune import schedule
from lntune.case import Case
from lntune.errors import LogError
from lntune.log import records, select
from lntune.log.decision import Decision
from lntune.log.records import Record, Role
from lntune.measure import written
from lntune.measure.jobs import Candidate, Outcome
from lntune.system import paths
from lntune.tune.earlier import Earlier, candidate_of
from lntune.tune.settings import Settings


class Journal:
    """What all records of a run share, and its way into the log."""

    def __init__(self, settings: Settings) -> None:
        import torch

        self.device = settings.target
        self.threads = settings.threads or torch.get_num_threads()
        self.folder = settings.log_dir or paths.log_dir()
        self._folders = [self.folder] if settings.log_dir else paths.log_dirs()
        self._earlier = (
            None if settings.again else Earlier(self._folders, self.device, self.threads)
        )
        self._run = uuid.uuid4().hex[:12]
        self._written: set[Path] = set()
        self._finals: dict[str, dict[records.Key, Record]] = {}

    def record(
        self,
        case: Case,
        candidate: Candidate,
        outcome: Outcome,
        role: Role = "trial",
        default: Candidate | None = None,
        decision: Decision | None = None,
    ) -> Record:
        """Log what came of a candidate; in a final `default` is what the contender of that name
        was, and `decision` how certain the winner is.

        Raises:
            LogError: the log cannot be written, or what this run has written is gone.
        """
        record = written.record(
            outcome,
            candidate,
            default,
            role=role,
            case=case,
            device=self.device,
            threads=self.threads,
            decision=decision,
            run=self._run,
        )
        path = records.log_path(self.folder, self.device, case.op)
        if path in self._written and not path.exists():
            raise LogError(
                f"the tuning log {path} was written to and is there no more: it was removed, or its"
                " file system went away. Bring it back and give the same command again, which goes"
                " on from what is in it, or choose another folder with --log-dir."
            )
        records.append(self.folder, record)
        self._written.add(path)
        if case.op in self._finals and record.role == "final" and record.status == "ok":
            self._finals[case.op][record.key] = record
        return record

    def tried(self, case: Case) -> Mapping[Candidate, Record]:
        """The trials of earlier runs that need not be made again, by candidate; none where all are
        to be.
        """
        return self._earlier.trials(case) if self._earlier else {}

    def previous_winner(self, case: Case) -> Candidate | None:
        """The winner of the case's latest final in the log, of this device and of its schedule as
        it is.
        """
        record = self.finals(case.op).get(records.Key.of(case))
        return None if record is None else candidate_of(record)

    def in_turn(self, cases: Sequence[Case]) -> list[Case]:
        """The cases in the order in which a run comes to them: as they are given, but first those
        that have no final yet, then those whose final other work disturbed, so that the same
        command goes on where its time was over; as they are given where all is to be tried again.
        """

        def settled(case: Case) -> int:
            final = self.finals(case.op).get(records.Key.of(case))
            return 0 if final is None else 1 if final.disturbance else 2

        return list(cases) if self._earlier is None else sorted(cases, key=settled)

    def kernel(self, case: Case) -> Candidate | None:
        """The kernel that calls of a case have, or would have if eager mode were not faster; None
        where no schedule fits.
        """
        finals = records.read(self._folders, case.op, self.device, role="final")
        schedules = schedule.for_op(case.op, self.device.kind)
        choice = select.select(case, self.device, finals, schedules)
        if choice.beaten is not None:
            return Candidate(choice.beaten.schedule, tuple(choice.beaten.knobs.items()))
        return Candidate(choice.schedule, tuple(choice.knobs.items())) if choice.schedule else None

    def finals(self, op: str) -> Mapping[records.Key, Record]:
        """The final that counts of each case of an operator, of this device and of schedules as
        they are; those of this run, too.
        """
        if op not in self._finals:
            finals = records.read(self._folders, op, self.device, role="final")
            schedules = schedule.for_op(op, self.device.kind)
            self._finals[op] = records.finals(
                r for r in finals if r.schedule in schedules and not select.stale(r, schedules)
            )
        return self._finals[op]
