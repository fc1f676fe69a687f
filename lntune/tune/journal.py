"""What a tuning run writes to the tuning log, and what it reads there: what won a case before."""

from __future__ import annotations

import datetime
import uuid

from lntune import schedule
from lntune.case import Case
from lntune.log import records, select
from lntune.log.records import Record, Role, Setting
from lntune.measure.jobs import Candidate, Outcome, record_fields
from lntune.system import paths, toolchain
from lntune.tune.settings import Settings


class Journal:
    """What all records of a run share, and its way into the log."""

    def __init__(self, settings: Settings) -> None:
        import torch

        self.device = settings.target
        self.threads = settings.threads or torch.get_num_threads()
        self.folder = settings.log_dir or paths.log_dir()
        self._folders = [self.folder] if settings.log_dir else paths.log_dirs()
        self._run = uuid.uuid4().hex[:12]
        self._finals: dict[str, dict[records.Key, Record]] = {}

    def record(
        self,
        case: Case,
        candidate: Candidate,
        outcome: Outcome,
        role: Role = "trial",
        default: Candidate | None = None,
    ) -> Record:
        """Log what came of a candidate; in a final `default` is what the contender of that name
        was.
        """
        record = Record(
            role=role,
            case=case,
            device=self.device,
            threads=self.threads,
            schedule=candidate.schedule,
            code=schedule.get(candidate.schedule).code,
            knobs=candidate.knobs,
            default=None if default is None else Setting(default.schedule, default.knobs),
            versions=toolchain.versions(),
            run=self._run,
            time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            **record_fields(outcome),
        )
        records.append(self.folder, record)
        return record

    def previous_winner(self, case: Case) -> Candidate | None:
        """The winner of the case's latest final in the log, of this device and of its schedule as
        it is.
        """
        if case.op not in self._finals:
            finals = records.read(self._folders, case.op, self.device, role="final")
            schedules = schedule.for_op(case.op, self.device.kind)
            self._finals[case.op] = records.finals(
                r for r in finals if r.schedule in schedules and not select.stale(r, schedules)
            )
        record = self._finals[case.op].get(records.Key.of(case))
        return None if record is None else Candidate.of_record(record)
