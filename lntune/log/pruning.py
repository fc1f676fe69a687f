"""Which records of a log matter, and why the others do not.

What decides a case is never dropped: of the finals of a case on a device the best by what
`select.choose_final` goes by, for each setting and code that was ever measured, since the knobs of
one may fit a neighbouring size where another's do not. Nor is what gives such a record its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import msgspec

from lntune import knobs
from lntune.errors import InputError, got_expected
from lntune.log import records, select
from lntune.log.records import Key, Record, Role
from lntune.log.union import Line
from lntune.schedule import Schedule
from lntune.system import toolchain

Kept: TypeAlias = Literal["deciding", "finals", "resume", "trials", "comparisons"]
KEPT: tuple[Kept, ...] = get_args(Kept)
"""What may be kept: what decides a case, which always is; all finals, the history of what won; the
trials that resuming needs; all trials; what `lntune compare --measure` and bringups measured."""
DEFAULT: tuple[Kept, ...] = ("deciding", "finals", "resume", "comparisons")

DECIDES = "finals that decide a case, or a size near it"
DATES = "what dates others, whose clocks were wrong"
NEWER = "of a newer lntune"
_KEPT_AS: dict[Kept, str] = {
    "finals": "other finals: what won, and when",
    "resume": "trials that tuning goes on from",
    "trials": "trials",
    "comparisons": "comparisons and benchmarks",
}
TWICE = "there before, in the same words"
AGAIN = "trials that were made again since"
DISTURBED = "trials that other work disturbed"
OLD_CODE = "trials of code that schedules have no more"
OLD_VERSIONS = "trials with older versions of packages"
NO_TRIALS = "trials; --keep does not name them"
DECIDES_NOTHING = "finals that decide nothing; --keep does not name them"
NO_COMPARISONS = "comparisons and benchmarks; --keep does not name them"
UNUSABLE = "no records that can be used"
"""Why a line is dropped."""


class Verdict(NamedTuple):
    """Whether a line is kept, and why."""

    line: Line
    kept: bool
    why: str


def wanted(names: Iterable[str]) -> set[Kept]:
    """What is to be kept, by name; what decides is among it.

    Raises:
        InputError: a name that is none of KEPT.
    """
    asked: set[Kept] = {"deciding"}
    for name in names:
        if name not in KEPT:
            raise InputError(got_expected("--keep", repr(name), f"some of {', '.join(KEPT)}"))
        asked.add(name)
    return asked


def judge(
    log: Sequence[Line], keep: set[Kept], schedules: Mapping[str, Schedule], latest: str = ""
) -> list[Verdict]:
    """A verdict on each line of a file, in their order; `latest` as in union.Union."""
    whys: list[tuple[bool, str] | None] = [(True, NEWER) if one.newer else None for one in log]
    first: dict[bytes, int] = {}
    for i, line in enumerate(log):
        if first.setdefault(line.content, i) != i:
            whys[i] = (False, TWICE)
    known = {i: records.of_line(log[i].raw) for i, why in enumerate(whys) if why is None}
    for i in _deciding(known, schedules):
        whys[i] = (True, DECIDES)
    left = {i: record for i, record in known.items() if whys[i] is None}
    trials = {i: record for i, record in left.items() if record.role == "trial"}
    for i, why in _trials(trials, known.values(), keep, schedules).items():
        whys[i] = why
    for i, record in left.items():
        if record.role == "final":
            kept = "finals" in keep
            whys[i] = (kept, _KEPT_AS["finals"] if kept else DECIDES_NOTHING)
        elif record.role != "trial":
            kept = "comparisons" in keep
            whys[i] = (kept, _KEPT_AS["comparisons"] if kept else NO_COMPARISONS)
    judged = [Verdict(line, *why) for line, why in zip(log, whys, strict=True) if why is not None]
    for i in _dating(judged, latest or records.horizon()):
        judged[i] = Verdict(judged[i].line, True, DATES)
    return judged


def _deciding(known: Mapping[int, Record], schedules: Mapping[str, Schedule]) -> list[int]:
    """The places of the finals that decide: of each case, device, setting and code the best."""
    best: dict[tuple[Any, ...], tuple[tuple[bool, ...], int]] = {}
    for i, record in known.items():
        if record.role != "final" or record.status != "ok" or record.median() is None:
            continue
        setting = _words((record.knobs, record.default, record.forward))
        key: tuple[Any, ...] = (Key.of(record.case), record.device, record.schedule, record.code)
        rank = bool(record.disturbance), select.stale(record, schedules)
        before = best.get((*key, setting))
        if before is None or rank <= before[0]:  # of equals the later
            best[(*key, setting)] = rank, i
    return [i for _, i in best.values()]


def _words(value: object) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _trials(
    trials: Mapping[int, Record],
    log: Iterable[Record],
    keep: set[Kept],
    schedules: Mapping[str, Schedule],
) -> dict[int, tuple[bool, str]]:
    """What becomes of trials, by place."""
    if "trials" in keep:
        return dict.fromkeys(trials, (True, _KEPT_AS["trials"]))
    if "resume" not in keep:
        return dict.fromkeys(trials, (False, NO_TRIALS))
    found: dict[int, tuple[bool, str]] = {}
    versions = {record.device: record.versions for record in log}  # the latest
    standing: dict[tuple[Any, ...], int] = {}
    for i, record in trials.items():
        schedule = schedules.get(record.schedule)
        current = (versions[record.device], toolchain.versions())
        if schedule is not None and not _is_of(record, schedule):
            found[i] = (False, OLD_CODE)
        elif record.versions not in current:
            found[i] = (False, OLD_VERSIONS)
        elif record.status == "ok" and (record.median() is None or record.disturbance):
            found[i] = (False, DISTURBED)
        else:
            same = record.case, record.device, record.threads, record.schedule, record.code
            key = (*same, _words((_setting(record, schedule), record.versions)))
            if key in standing:
                found[standing[key]] = (False, AGAIN)
            standing[key] = i
            found[i] = (True, _KEPT_AS["resume"])
    return found


def _setting(record: Record, schedule: Schedule | None) -> Any:
    """The knobs of a trial, all of today's; as they stand where its schedule is not there."""
    return record.knobs if schedule is None else knobs.to_dict(schedule.setting(record.knobs))


def _is_of(record: Record, schedule: Schedule) -> bool:
    """Whether a trial is of a schedule as it is."""
    try:
        schedule.setting(record.knobs)
    except Exception:  # the class of the knobs may be a user's
        return False
    return schedule.op == record.case.op and schedule.code == record.code


def _dating(judged: Sequence[Verdict], latest: str) -> set[int]:
    """Places of lines that are to be dropped, and that lines which stay have their time from: in
    the whole file, and among those of one role, which are read alone.
    """
    roles: tuple[tuple[Role | str, ...], ...] = (("trial",), ("final",))
    every = tuple({verdict.line.role for verdict in judged})
    needed: set[int] = set()
    for of in (every, *roles):
        places = [i for i, verdict in enumerate(judged) if verdict.line.role in of]
        moments = records.placed_at((judged[i].line.time for i in places), latest)
        anchor = None
        for i, at in zip(places, moments, strict=True):
            line, kept, _ = judged[i]
            if line.time == at:
                anchor = i
            elif kept and anchor is not None and not judged[anchor].kept:
                needed.add(anchor)
    return needed
