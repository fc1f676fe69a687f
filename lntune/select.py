"""Which kernel serves a call: a pure decision over the log, with its reasons.

exact record -> the same hidden size in another row bucket -> the nearest tuned hidden size -> the schedule's default knobs
-> eager mode. Records of another device never serve. A record in which eager won sends the call to eager: dispatch is
honest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from lntune import knobs as knobs_module
from lntune.case import Case, bucket_label
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.records import Record, finals
from lntune.schedule import Schedule

TIERS = ("exact", "bucket", "near", "default", "eager")
NEAR_OCTAVES = 1.0
"""How far a hidden size may be from the one a record was measured at: a factor of two."""
MARGIN = 1.02
"""Eager takes over only when it measured faster by more than this; ties go to the tuned kernel."""


class Choice(msgspec.Struct, frozen=True):
    """What serves a call.

    `tier` is one of TIERS, "eager" also when eager measured faster; `steps` tells how it came to it, one sentence each;
    `record` is the measurement it rests on.
    """

    tier: str
    schedule: str = ""
    knobs: dict[str, Any] = {}
    record: Record | None = None
    steps: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """True when the choice rests on a measurement of this very case."""
        return self.tier == "exact" or (self.tier == "eager" and self.record is not None)


def select(case: Case, device: Device, records: Iterable[Record], schedules: Mapping[str, Schedule]) -> Choice:
    """The choice for the case's operator, hidden size, dtype and row bucket.

    `schedules` are those of the operator for the device's kind.
    """
    case = case.typical  # one choice per bucket, whoever calls first
    steps: list[str] = []
    mine: list[Record] = []
    foreign: dict[str, str] = {}
    for record in records:
        if record.case.op == case.op and record.case.dtype == case.dtype and record.role == "final":
            fields = device.differences(record.device)
            if not fields:
                mine.append(record)
            elif record.device.kind == device.kind:  # nobody expects a CPU's records to serve a GPU
                foreign[record.device.slug] = "; ".join(fields)
    latest = list(finals(mine).values())

    for tier, candidates in _tiers(case, latest):
        if not candidates:
            steps.append(f"{tier}: no record for {_what(case, tier)}")
            continue
        for record in candidates:
            choice, told = _from_record(tier, record, case, device, schedules)
            steps.append(f"{tier}: {told}")
            if choice:
                return msgspec.structs.replace(choice, steps=tuple(steps))
    for slug, differences in foreign.items():
        steps.append(f"not used: records of another device, {slug} ({differences})")
    for schedule in schedules.values():
        setting = schedule.default(case, device)
        if unfit := schedule.reason_invalid(setting, case, device):
            steps.append(f"default: {schedule.name} does not fit: {unfit}")
        else:
            steps.append(f"default: {schedule.name} with its default knobs")
            return Choice("default", schedule.name, knobs_module.to_dict(setting), None, tuple(steps))
    steps.append(f"eager: no schedule of {case.op} for a {device.kind} fits")
    return Choice("eager", steps=tuple(steps))


def _what(case: Case, tier: str) -> str:
    """What a tier looked for."""
    rows = " any rows" if tier == "bucket" else f" rows {bucket_label(case.bucket)}"
    hidden = f"a hidden size within a factor of {2**NEAR_OCTAVES:g} of {case.hidden}" if tier == "near" else f"hidden {case.hidden}"
    return f"{hidden} {case.dtype}{rows}"


def _tiers(case: Case, latest: list[Record]) -> Iterable[tuple[str, list[Record]]]:
    """The records of each tier, the nearest first."""
    same = [r for r in latest if r.case.hidden == case.hidden]
    yield "exact", [r for r in same if r.case.bucket == case.bucket]
    yield "bucket", sorted((r for r in same if r.case.bucket != case.bucket), key=lambda r: abs(r.case.bucket - case.bucket))

    def octaves(record: Record) -> float:
        return abs(math.log2(record.case.hidden / case.hidden))

    near = [r for r in latest if r.case.hidden != case.hidden and r.case.bucket == case.bucket and octaves(r) <= NEAR_OCTAVES]
    yield "near", sorted(near, key=octaves)


def _from_record(tier: str, record: Record, case: Case, device: Device, schedules: Mapping[str, Schedule]) -> tuple[Choice | None, str]:
    """The choice a record leads to, or None, and the reason in either case."""
    label = f"record of {record.case} ({record.time})"
    schedule = schedules.get(record.schedule)
    if schedule is None:
        return None, f"{label} is of the schedule {record.schedule!r}, which is not there"
    try:
        setting = knobs_module.from_dict(schedule.knobs, dict(record.knobs))
    except LntuneError as e:
        return None, f"{label} does not fit today's {record.schedule}: {e}"
    if reason := schedule.reason_invalid(setting, case, device):
        return None, f"{label} has knobs that do not fit here: {reason}"
    tuned, eager = record.median(), record.median("eager")
    stale = "" if schedule.source == record.source else "; the schedule's source has changed since, measure again"
    if tuned and eager and tuned > eager * MARGIN:
        return Choice("eager", record=record), f"{label}: eager was faster, {eager:.2f} us against {tuned:.2f} us{stale}"
    speed = f", {tuned:.2f} us against eager's {eager:.2f} us" if tuned and eager else ""
    told = f"{label}: {record.schedule} {knobs_module.describe(record.knobs)}{speed}{stale}"
    return Choice(tier, record.schedule, dict(record.knobs), record), told
