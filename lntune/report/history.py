"""How cases went from tuning run to tuning run, and where they became faster or slower.

Times of different days are not comparable: a machine's clock and neighbours change. What is
followed is how many times as fast as eager mode a case is, measured in the same rounds. A step is a
change of that between two measurements in a row which, at an error of 5 % for all of a device's
together (Holm), is more than the smallest difference that matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from lntune import certainty
from lntune.case import Case, bucket_label
from lntune.certainty import ERROR, Estimate
from lntune.knobs import describe
from lntune.log.records import Record, measured
from lntune.timing import pairwise


class Final(msgspec.Struct, frozen=True):
    """One measurement of a case: its run and time, the median in microseconds, how many times as
    fast as eager mode it is (None where other work disturbed it, or eager was not measured), and
    the kernel.
    """

    run: str
    time: str
    tuned_us: float
    over_eager: float | None
    schedule: str
    knobs: str


class Step(msgspec.Struct, frozen=True):
    """A change between two measurements in a row: their times, how many times as fast as before it
    is, with its 95 % interval, and what else changed.
    """

    before: str
    after: str
    ratio: float
    low: float
    high: float
    changed: list[str]


class History(msgspec.Struct, frozen=True):
    """A case on a device: its measurements, oldest first, and the steps between them."""

    device: str
    case: Case
    bucket: str
    finals: list[Final]
    steps: list[Step]


class Run(msgspec.Struct, frozen=True):
    """A tuning run: when its first and last final were written, how many it has, and what changed
    since the run before.
    """

    run: str
    first: str
    last: str
    finals: int
    changed: list[str]


def histories(log: Iterable[Record]) -> list[History]:
    """The histories of all cases in records of one device, given oldest first."""
    groups = list(measured(log).values())
    finals = [[_final(record) for record in group] for group in groups]
    changes = [
        (number, before, after, change)
        for number, group in enumerate(groups)
        for before, after, change in _changes(group, finals[number])
    ]
    adjusted = certainty.holm([change.beyond(certainty.SMALLEST) for *_, change in changes])
    steps: dict[int, list[Step]] = {}
    for (number, before, after, change), p in zip(changes, adjusted, strict=True):
        if p <= ERROR:
            step = Step(
                before.time,
                after.time,
                change.ratio,
                *change.interval(),
                changed=differences(before, after),
            )
            steps.setdefault(number, []).append(step)
    found = [
        History(
            device=group[-1].device.slug,
            case=group[-1].case,
            bucket=bucket_label(group[-1].case.bucket),
            finals=finals[number],
            steps=steps.get(number, []),
        )
        for number, group in enumerate(groups)
    ]
    return sorted(found, key=lambda h: (h.case.op, h.case.dtype, h.case.hidden, h.case.rows))


def runs(log: Iterable[Record]) -> list[Run]:
    """The runs that finals are of, oldest first."""
    groups: dict[str, list[Record]] = {}
    for record in log:
        groups.setdefault(record.run, []).append(record)
    found: list[Run] = []
    last: Record | None = None
    for run, group in groups.items():
        changed = _versions(last, group[0]) if last else []
        found.append(Run(run, group[0].time, group[-1].time, len(group), changed))
        last = group[-1]
    return found


def _changes(
    group: Sequence[Record], finals: Sequence[Final]
) -> list[tuple[Record, Record, Estimate]]:
    """Measurements in a row that nothing disturbed, with how many times as fast the second is."""
    ratios = [(r, _over_eager(r)) for r, f in zip(group, finals, strict=True) if f.over_eager]
    return [
        (before, after, certainty.difference(later, earlier))
        for (before, earlier), (after, later) in itertools.pairwise(ratios)
    ]


def _over_eager(record: Record) -> Estimate:
    """How many times as fast as eager mode; of samples that are gone nothing is certain."""
    eager, tuned = (record.timings[name].samples_us for name in ("eager", "tuned"))
    if not eager or not tuned:
        return Estimate(0.0)
    return (certainty.paired if len(eager) == len(tuned) else certainty.unpaired)(eager, tuned)


def _final(record: Record) -> Final:
    timings = {} if record.disturbance else record.timings
    return Final(
        run=record.run,
        time=record.time,
        tuned_us=record.timings["tuned"].median_us,
        over_eager=pairwise(timings.get("eager"), timings.get("tuned")),
        schedule=record.schedule,
        knobs=describe(record.knobs),
    )


def differences(before: Record, after: Record) -> list[str]:
    """What changed between two measurements of a case: kernel, its code's versions, threads,
    packages.
    """
    found = []
    if before.schedule != after.schedule:
        found.append(f"{before.schedule} -> {after.schedule}")
    elif before.knobs != after.knobs:
        found.append(
            " ".join(
                f"{name} {before.knobs.get(name, '-')} -> {value}"
                for name, value in after.knobs.items()
                if before.knobs.get(name) != value
            )
        )
    if before.schedule == after.schedule and before.code != after.code:
        names = {"schedule": "code", "op": "operator's code", "lowering": "lowering"}
        found += [
            f"{name} {getattr(before.code, field)} -> {getattr(after.code, field)}"
            for field, name in names.items()
            if getattr(before.code, field) != getattr(after.code, field)
        ]
    if before.case.rows != after.case.rows:
        found.append(f"rows {before.case.rows} -> {after.case.rows}")
    if before.threads != after.threads:
        found.append(f"threads {before.threads} -> {after.threads}")
    return found + _versions(before, after)


def _versions(before: Record, after: Record) -> list[str]:
    names = dict.fromkeys((*before.versions, *after.versions))
    return [
        f"{name} {before.versions.get(name, '-')} -> {after.versions.get(name, '-')}"
        for name in names
        if before.versions.get(name) != after.versions.get(name)
    ]
