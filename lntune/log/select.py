"""Which kernel serves a call: decided on the records of the tuning log alone, with the reasons.

exact record -> the same hidden size in another row bucket -> the nearest tuned hidden size -> the
schedule's default knobs -> eager mode. Records of another device never serve. A record in which
eager or the default knobs won sends the call to these: dispatch is honest. In training both passes
are decided together, on what a step takes that autograd runs, where that was measured.

Of several finals of one case that one serves which comes first in this order (`choose_final`):
knobs that can be used today before those that cannot; measured in quiet, or not known otherwise,
before disturbed by other work; of the schedule as it is before stale; the latest. One that was
disturbed serves its own case and no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from lntune import knobs as knobs_module
from lntune.case import Case, bucket_label
from lntune.device import Device
from lntune.errors import ScheduleError
from lntune.log import slower
from lntune.log.records import Key, Record, Setting, measured
from lntune.schedule import Schedule

Tier = Literal["exact", "bucket", "near", "default", "eager"]
"""What a choice rests on: a record of the case itself, of the same hidden size in another row
bucket, of the nearest tuned hidden size; default knobs; or eager mode, also when that measured
faster.
"""
NEAR_OCTAVES = 1.0
"""How far a hidden size may be from the one a record was measured at: a factor of two."""


class Choice(msgspec.Struct, frozen=True):
    """What serves a call.

    `steps` tells how it came to it, one sentence each; `record` is the measurement it rests on,
    `stale` when its schedule has changed since; `faults` says of schedules, by name, that failed
    when they were asked, what they did, and `wrong` of which schedules a kernel that would have
    come first was found wrong. `beaten` is the kernel that eager mode was faster than. `foreign`
    are the devices, by name, whose records there are and cannot be used, and in what they differ.
    `bundle` is the folder of the bundle that has made the choice and holds its kernel, empty
    without one.
    """

    tier: Tier
    schedule: str = ""
    knobs: dict[str, Any] = {}
    record: Record | None = None
    steps: tuple[str, ...] = ()
    stale: bool = False
    faults: dict[str, str] = {}
    wrong: tuple[str, ...] = ()
    beaten: Setting | None = None
    foreign: dict[str, str] = {}
    bundle: str = ""

    @property
    def measured(self) -> bool:
        """True when the choice rests on a measurement of this very case, with its schedule as it is
        now.
        """
        return not self.stale and self.record is not None and self.tier in ("exact", "eager")


def select(
    case: Case, device: Device, records: Iterable[Record], schedules: Mapping[str, Schedule]
) -> Choice:
    """The choice for the case's operator, hidden size, dtype and row bucket.

    `schedules` are those of the operator for the device's kind; `records` are in the order of
    `records.read`, oldest first.
    """
    case = case.typical  # one choice per bucket, whoever calls first
    steps: list[str] = []
    faults: dict[str, str] = {}
    own: list[Record] = []
    differences: dict[Device, str] = {}
    for record in records:
        if record.case.op == case.op and record.case.dtype == case.dtype and record.role == "final":
            if record.device not in differences:
                differences[record.device] = "; ".join(device.differences(record.device))
            if not differences[record.device]:
                own.append(record)
    # Nobody expects a CPU's records to serve a GPU.
    foreign = {
        other.slug: why for other, why in differences.items() if why and other.kind == device.kind
    }

    for tier, groups in _tiers(case, list(measured(own).values())):
        if not groups:
            steps.append(f"{tier}: no record for {_sought(case, tier)}")
            continue
        for group in groups:
            choice, reasons = _from_group(tier, group, case, device, schedules, faults)
            steps += [f"{tier}: {reason}" for reason in reasons]
            if choice:
                return msgspec.structs.replace(choice, steps=tuple(steps), faults=faults)
    if len(foreign) > 1:
        steps.append(f"not used: records of {len(foreign)} other devices (--all names them)")
    steps += [
        f"not used: records of another device, {slug} ({why})"
        for slug, why in foreign.items()
        if len(foreign) == 1
    ]
    name, setting, reasons = untuned(case, device, schedules, faults)
    steps += reasons
    told = Choice("eager", steps=tuple(steps), faults=faults, foreign=foreign)
    if name:
        set_to = knobs_module.to_dict(setting)
        return msgspec.structs.replace(told, tier="default", schedule=name, knobs=set_to)
    return told


class Default(NamedTuple):
    """What serves where nothing is measured: a schedule's name and its default knobs, the empty
    string and None where eager mode does; and how it came to that.
    """

    schedule: str
    setting: Any
    steps: list[str]


def untuned(
    case: Case,
    device: Device,
    schedules: Mapping[str, Schedule],
    faults: dict[str, str] | None = None,
) -> Default:
    """What serves a case for which there is no measurement: the default knobs of the first schedule
    that they fit. A schedule that fails is passed over, and noted in `faults`.
    """
    steps: list[str] = []
    for schedule in schedules.values():
        if schedule.propose is not None:
            continue
        try:
            setting = schedule.untuned(case, device)
            unfit = schedule.reason_invalid(setting, case, device)
        except ScheduleError as e:
            steps.append(f"default: {schedule.name} is left out: {e}")
            _note(faults, schedule, e)
            continue
        if unfit:
            steps.append(f"default: {schedule.name} does not fit: {unfit}")
        else:
            steps.append(f"default: {schedule.name} with its default knobs")
            return Default(schedule.name, setting, steps)
    return Default("", None, [*steps, f"eager: no schedule of {case.op} for a {device.kind} fits"])


def _note(faults: dict[str, str] | None, schedule: Schedule, error: ScheduleError) -> None:
    if faults is not None:
        faults.setdefault(schedule.name, str(error))


def stale(record: Record, schedules: Mapping[str, Schedule]) -> bool:
    """True when the record's schedule is there and has changed since the measurement."""
    schedule = schedules.get(record.schedule)
    return schedule is not None and schedule.code != record.code


def tune_commands(cases: Iterable[Case], option: str = "") -> list[str]:
    """The commands that measure some cases again, and no others: as few as can be had."""
    return [f"lntune tune {op} {narrowed}{option}" for op, narrowed in narrowings(cases)]


def narrowings(cases: Iterable[Case]) -> list[tuple[str, str]]:
    """(operator, options) that stand for some cases, and no others, in a command: as few as can be
    had by joining hidden sizes, then rows, then dtypes.
    """
    joined: dict[tuple[str, str, str], set[int]] = {}
    for case in cases:
        joined.setdefault((case.op, case.dtype, str(case.typical.rows)), set()).add(case.hidden)
    by_rows: dict[tuple[str, str, str], list[int]] = {}
    for (op, dtype, rows), hidden in joined.items():
        by_rows.setdefault((op, dtype, ",".join(map(str, sorted(hidden)))), []).append(int(rows))
    by_dtype: dict[tuple[str, str, str], list[str]] = {}
    for (op, dtype, hidden_), counts in by_rows.items():
        by_dtype.setdefault((op, hidden_, ",".join(map(str, sorted(counts)))), []).append(dtype)
    return sorted(
        (op, f"--hidden {h} --dtype {','.join(sorted(d))} --rows {r}")
        for (op, h, r), d in by_dtype.items()
    )


class Judged(NamedTuple):
    """A final with what speaks against its serving a case today: why its knobs cannot be used, as
    the rest of a sentence or nothing, and whether its schedule has changed since.
    """

    record: Record
    unusable: str
    stale: bool

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """The smaller, the more it deserves to serve."""
        return bool(self.unusable), bool(self.record.disturbance), self.stale


def choose_final(
    group: Sequence[Record], judge: Callable[[Record], Judged]
) -> tuple[Judged, list[Judged]]:
    """Of finals of one case on one device, given oldest first: the one that serves it, and those
    that are passed over though they are later, the latest first.
    """
    judged: list[Judged] = []
    ranks: list[tuple[bool, ...]] = []
    for record in reversed(group):
        judged.append(judge(record))
        if len(group) == 1:
            break
        # what shows disturbances takes a while: nothing comes before one without any fault
        ranks.append(judged[-1].rank)
        if not any(ranks[-1]):
            break
    place = ranks.index(min(ranks)) if ranks else 0  # of equals the latest is first
    return judged[place], judged[:place]


def served(records: Iterable[Record], schedules: Mapping[str, Schedule]) -> dict[Key, Record]:
    """The final that counts of each case, records of one device given oldest first: what serves the
    case on that device, and the latest where none can be used. `schedules` are those of all
    operators.
    """

    def judge(record: Record) -> Judged:
        return _judged(record, record.case.typical, record.device, schedules)

    return {
        key: group[0] if len(group) == 1 else choose_final(group, judge)[0].record
        for key, group in measured(records).items()
    }


def _sought(case: Case, tier: Tier) -> str:
    """What a tier looked for."""
    rows = " any rows" if tier == "bucket" else f" rows {bucket_label(case.bucket)}"
    hidden = (
        f"a hidden size within a factor of {2**NEAR_OCTAVES:g} of {case.hidden}"
        if tier == "near"
        else f"hidden {case.hidden}"
    )
    return f"{hidden} {case.dtype}{rows}"


def _tiers(case: Case, groups: list[list[Record]]) -> Iterable[tuple[Tier, list[list[Record]]]]:
    """The records of each tier by the case they are of, the nearest case first."""
    same = [g for g in groups if g[0].case.hidden == case.hidden]
    yield "exact", [g for g in same if g[0].case.bucket == case.bucket]
    yield (
        "bucket",
        sorted(
            (g for g in same if g[0].case.bucket != case.bucket),
            key=lambda g: abs(g[0].case.bucket - case.bucket),
        ),
    )

    def octaves(group: list[Record]) -> float:
        return abs(math.log2(group[0].case.hidden / case.hidden))

    near = [
        g
        for g in groups
        if g[0].case.hidden != case.hidden
        and g[0].case.bucket == case.bucket
        and octaves(g) <= NEAR_OCTAVES
    ]
    yield "near", sorted(near, key=octaves)


def _label(record: Record) -> str:
    return f"record of {record.case} ({record.time})"


def _from_group(
    tier: Tier,
    group: Sequence[Record],
    case: Case,
    device: Device,
    schedules: Mapping[str, Schedule],
    faults: dict[str, str],
) -> tuple[Choice | None, list[str]]:
    """The choice that the records of one case lead to, or None, and the reasons, with those of
    later records that were passed over.
    """
    (best, reason, old), later = choose_final(
        group, lambda record: _judged(record, case, device, schedules, faults)
    )
    steps = []
    for passed_over in later:
        disturbance = passed_over.record.disturbance
        why = passed_over.unusable or (
            f"was disturbed: {disturbance}" if disturbance else "is stale"
        )
        steps.append(f"{_label(passed_over.record)} {why}; passed over for an older one")
    if reason:
        return None, [*steps, f"{_label(best)} {reason}"]
    if tier != "exact" and best.disturbance:
        why = f"was disturbed ({best.disturbance}): it decides on no case but its own"
        return None, [*steps, f"{_label(best)} {why}"]
    doubts = "; the schedule's code has changed since, measure again" if old else ""
    doubts += f"; it was disturbed ({why}), measure again" if (why := best.disturbance) else ""
    served, tuned, eager = Setting(best.schedule, best.knobs), best.median(), best.median("eager")
    behind, of = slower.than(best, "eager"), ""
    if (
        slower.than(best, "default")
        and best.default
        and not _unusable(best.default, case, device, schedules, faults)
    ):
        steps.append(f"{_label(best)}: the default knobs were faster than {best.schedule}")
        served, tuned = best.default, best.median("default")
        behind = slower.behind(tuned, eager)
    if slower.trained(best):
        tuned, eager = slower.step_us(best)
        behind, of = slower.in_training(best), " in a step of training"
    if tuned and eager and behind:
        steps.append(
            f"{_label(best)}: eager was faster{of}, {eager:.2f} us against {tuned:.2f} us{doubts}"
        )
        return Choice("eager", record=best, stale=old, beaten=served), steps
    speed = f", {tuned:.2f} us against eager's {eager:.2f} us{of}" if tuned and eager else ""
    steps.append(
        f"{_label(best)}: {served.schedule} {knobs_module.describe(served.knobs)}{speed}{doubts}"
    )
    return Choice(tier, served.schedule, dict(served.knobs), best, stale=old), steps


def _judged(
    record: Record,
    case: Case,
    device: Device,
    schedules: Mapping[str, Schedule],
    faults: dict[str, str] | None = None,
) -> Judged:
    """A final as it stands for a case today."""
    unusable = _unusable(record, case, device, schedules, faults)
    return Judged(record, unusable, stale(record, schedules))


def _unusable(
    record: Record | Setting,
    case: Case,
    device: Device,
    schedules: Mapping[str, Schedule],
    faults: dict[str, str] | None = None,
) -> str:
    """Why a record's knobs, or others, cannot serve a case today, as the rest of a sentence; empty
    when they can.
    """
    schedule = schedules.get(record.schedule)
    if schedule is None or schedule.op != case.op:
        return f"is of the schedule {record.schedule!r}, which is not there"
    try:
        setting = schedule.setting(record.knobs)
    except Exception as e:  # the class may be a user's
        return f"does not fit today's {record.schedule}: {e}"
    try:
        reason = schedule.reason_invalid(setting, case, device)
    except ScheduleError as e:
        _note(faults, schedule, e)
        return f"is of a schedule that is left out: {e}"
    return f"has knobs that do not fit here: {reason}" if reason else ""
