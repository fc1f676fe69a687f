"""Which cases `lntune tune` tunes on which devices: those of a grid, those that a program was
recorded to use, those that are missing or stale; and one run after another where there are several
devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from lntune import backends, schedule
from lntune import device as device_module
from lntune import tune as tuning
from lntune.backends import inputs
from lntune.case import Case
from lntune.commands.bringup import value
from lntune.device import Device
from lntune.errors import InputError, LntuneError
from lntune.log import cases as recorded
from lntune.log import records, select
from lntune.log.cases import What
from lntune.log.records import Key
from lntune.log.wanted import Wanted
from lntune.report import called
from lntune.system import paths
from lntune.tune import Observer, Settings, Summary
from lntune.words import counted


class Part(NamedTuple):
    """Cases that are tuned on a device, in order."""

    device: Device
    cases: list[Case]


class Plan(NamedTuple):
    """What is tuned, and sentences on what is not and why."""

    parts: list[Part]
    notes: list[str]

    @property
    def cases(self) -> list[Case]:
        """All of them."""
        return [case for part in self.parts for case in part.cases]


def by_value(cases: Sequence[Case], device: Device) -> list[Case]:
    """The cases of several operators, the most valuable first."""
    return sorted(cases, key=lambda case: value.cost(case, device.kind))


def of_recorded(path: Path, wanted: Wanted, target: Device | None) -> Plan:
    """The cases of a file of recorded ones that are asked for, on the devices of this machine that
    are of the same kind as those they were recorded on, or on `target` alone; those with the most
    time first. One for each row bucket, with the rows that had the most time.

    Raises:
        InputError: the file cannot be read.
    """
    tallies = recorded.asked(recorded.read(path), wanted)
    notes: list[str] = []
    groups: defaultdict[Device, list[What]] = defaultdict(list)
    elsewhere: defaultdict[str, list[What]] = defaultdict(list)
    not_covered: list[What] = []
    for what in recorded.by_time(tallies):
        if recorded.why_not(what):
            not_covered.append(what)
            continue
        assert what.device is not None
        local = _here(what.device, target)
        if isinstance(local, str):
            elsewhere[f"{what.device.name}: {local}"].append(what)
            continue
        groups[local].append(what)
    notes += called.left_out(not_covered, tallies)
    for why, whats in elsewhere.items():
        notes.append(
            f"left out: {counted(len(recorded.cases_of(whats, tallies)), 'case')} of {why}"
        )
    parts = []
    for device, whats in groups.items():
        foreign = {w.device.name for w in whats if w.device and device.differences(w.device)}
        if foreign:
            notes.append(
                f"recorded on {', '.join(sorted(foreign))}, which is not {device.name} here: what a"
                " program uses is taken for the same, times may be others"
            )
        parts.append(
            Part(device, [_measurable(case) for case in recorded.cases_of(whats, tallies)])
        )
    return Plan(parts, notes)


def _here(device: Device, target: Device | None) -> Device | str:
    """The device of this machine that stands for one that cases were recorded on: the same one, or
    else one of its kind; or why there is none.
    """
    if target is not None:
        same = (target.kind, target.backend) == (device.kind, device.backend)
        return target if same else f"not what --target names, {target.name}"
    if device.kind == "cpu" and not device.backend:
        return device_module.current()
    try:
        backend = backends.of(device)
        first = backends.device_of(backend.option)
        count = backend.count() if backend.torch_type == "cuda" else 1
        found = [first, *(backend.device_of(index) for index in range(1, count))]
    except (LntuneError, KeyError) as e:
        return f"there is none here ({e})"
    return next((one for one in found if not one.differences(device)), first)


def _measurable(case: Case) -> Case:
    """The case, with the rows that stand for its bucket where its own do not fit into memory."""
    try:
        inputs.check_size([case])
    except InputError:
        return case.typical
    return case


def unmeasured(
    part: Part, log_dir: Path | None, missing: bool, stale: bool, of_log: Wanted | None
) -> Part:
    """Those of the cases that are `missing`, which have no final of today's code, or `stale`, whose
    finals are of older code (a schedule, operator or lowering of an older version). `of_log`: all
    stale cases of the log that it takes, too.
    """
    schedules = schedule.all_schedules()
    folders = [log_dir] if log_dir else paths.log_dirs()
    log = records.read(folders, None, part.device, role="final")
    finals = select.served(log, schedules)
    old = {key: r for key, r in finals.items() if select.stale(r, schedules)}
    wanted = [
        case
        for case in part.cases
        if (missing and (Key.of(case) not in finals or Key.of(case) in old))
        or (stale and Key.of(case) in old)
    ]
    if of_log is not None:
        known = set(map(Key.of, wanted))
        cases = [msgspec.structs.replace(r.case, variant="") for r in old.values()]
        more = [case for case in cases if of_log.takes(case) and Key.of(case) not in known]
        wanted += by_value(more, part.device)
    return Part(part.device, wanted)


def run(
    parts: Sequence[Part],
    settings: Settings,
    observer: Callable[[Device], Observer],
    foretell: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Tune on one device after another, each for its part of the time by its number of cases; see
    tune.

    Raises:
        LntuneError: as tune's; what was measured before is in the log.
    """
    left, remaining = sum(len(part.cases) for part in parts), settings.seconds
    summaries: list[Summary] = []
    for part in parts:
        seconds = None if remaining is None else remaining * len(part.cases) / left
        own = replace(settings, device=part.device, seconds=seconds)
        if len(parts) > 1:
            foretell(f"{part.device.name}:")
        summaries.append(tuning.tune(part.cases, own, observer(part.device), foretell))
        left -= len(part.cases)
        if remaining is not None:
            remaining = max(1.0, remaining - summaries[-1].seconds)
        if summaries[-1].interrupted:
            break
    return joined(summaries)


def joined(summaries: Sequence[Summary]) -> Summary:
    """Several runs as one."""
    if len(summaries) == 1:
        return summaries[0]
    whole = Summary(log_dir=summaries[0].log_dir if summaries else Path())
    for one in summaries:
        whole.finals += one.finals
        whole.statuses += one.statuses
        whole.earlier += one.earlier
        whole.seconds += one.seconds
        whole.interrupted |= one.interrupted
        whole.untuned |= one.untuned
        whole.notes += one.notes
        whole.pairs += one.pairs
        whole.exhausted += one.exhausted
        whole.failures.include(one.failures)
    return whole
