"""What came of a candidate as a record for a log, with whose code it was and when it was made."""

from __future__ import annotations

import datetime
from typing import Any

from lntune import schedule
from lntune.log.records import Record
from lntune.measure.jobs import Candidate, Outcome, record_fields
from lntune.system import toolchain


def record(
    outcome: Outcome, candidate: Candidate, default: Candidate | None = None, **known: Any
) -> Record:
    """The record of an outcome of now; `default` is what the contender of that name was, and
    `known` are the fields that neither a candidate nor an outcome has: the case, device, threads,
    role and run, the decision of a final.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return Record(
        schedule=candidate.schedule,
        code=schedule.get(candidate.schedule).code,
        knobs=candidate.knobs,
        default=None if default is None else default.as_setting,
        versions=toolchain.versions(),
        time=now.isoformat(timespec="milliseconds"),
        **record_fields(outcome),
        **known,
    )
