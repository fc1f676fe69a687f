"""How well recorded cases are served: by which measurement, with what share of the time, and what
tuning them gains.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lntune.case import Case, bucket_label
from lntune.device import Device
from lntune.log import cases as recorded
from lntune.log import records, select
from lntune.log.cases import Tallies, Tally, What
from lntune.log.records import Key, Record
from lntune.log.select import Tier
from lntune.report.columns import Column, Table, key, whole
from lntune.report.output import Output
from lntune.report.tables import micros, percent, ratio_text
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.schedule import Schedule

SHOWN = 8
"""What no kernel takes is named up to so many, and counted beyond."""
SERVED: dict[Tier, str] = {
    "exact": "its own record",
    "bucket": "another row bucket's",
    "near": "a nearby hidden size's",
    "default": "default knobs",
    "eager": "eager mode",
}
"""Tier of a choice -> what serves a case, in a table's words."""


class Called(msgspec.Struct, frozen=True):
    """A case that a program uses on a device: `calls`, microseconds of one (None: not timed), the
    share of the time of all. `tier` and `schedule` say what would serve it today; it is `tuned`
    where that rests on a measurement of its own by today's code. `over_eager` and `over_default`
    are how many times as fast the best kernel of the log was as eager mode and as the default
    knobs, `gain` the part of its time that tuning it is known to save; None: not measured.
    """

    device: str
    op: str
    hidden: int
    dtype: str
    bucket: str
    rows: int
    calls: int
    us: float | None
    share: float | None
    tier: Tier
    tuned: bool
    schedule: str
    tuned_us: float | None = None
    over_eager: float | None = None
    over_default: float | None = None
    gain: float | None = None


def of_file(
    path: Path,
    tallies: Tallies,
    folders: Sequence[Path],
    schedules: Mapping[str, Schedule],
    again: str,
) -> Output:
    """What the logs in some folders say of recorded cases, by device; those with the most time
    first. `schedules` are those of today.
    """
    everything = sum(tally.total_us or 0.0 for tally in tallies.values())
    groups: defaultdict[Device, list[What]] = defaultdict(list)
    not_covered = [what for what in tallies if recorded.why_not(what)]
    for what in tallies:
        if what.device is not None and what not in not_covered:
            groups[what.device].append(what)
    found = [
        row
        for device, whats in groups.items()
        for row in _of_device(device, whats, tallies, folders, schedules, everything)
    ]
    tables = []
    for slug in dict.fromkeys(row.device for row in found):
        rows = [row for row in found if row.device == slug]
        tables.append(table(rows, f"what was recorded in {path} on {slug}"))
        tables[-1].notes = _notes(rows, path)
    exact = whole(f"{again} --format csv")
    lines = [
        *left_out(not_covered, tallies),
        f"printed again by {whole(again)}, every figure in full by {exact}",
    ]
    facts: dict[str, Any] = {
        "file": str(path),
        "cases": found,
        "left_out": left_out(not_covered, tallies),
        "again": again,
    }
    return Output(facts, tables, lines, found)


def _of_device(
    device: Device,
    whats: Sequence[What],
    tallies: Tallies,
    folders: Sequence[Path],
    schedules: Mapping[str, Schedule],
    everything: float,
) -> list[Called]:
    log = records.read(folders, None, device, role="final")
    finals = select.served(log, schedules)
    totals: defaultdict[Key, list[Tally]] = defaultdict(list)
    for what in whats:
        if (case := recorded.case_of(what)) is not None:
            totals[Key.of(case)].append(tallies[what])
    return [
        _called(
            case, device, recorded.total(totals[Key.of(case)]), log, finals, schedules, everything
        )
        for case in recorded.cases_of(whats, tallies)
    ]


def _called(
    case: Case,
    device: Device,
    tally: Tally,
    log: Sequence[Record],
    finals: Mapping[Key, Record],
    schedules: Mapping[str, Schedule],
    everything: float,
) -> Called:
    usable = {n: s for n, s in schedules.items() if (s.op, s.kind) == (case.op, device.kind)}
    choice = select.select(case, device, log, usable)
    record = finals.get(Key.of(case))
    tuned = record.median() if record else None
    eager, default = (record.median(name) if record else None for name in ("eager", "default"))
    gain = None
    if choice.measured:
        gain = 0.0
    elif tuned and (now := eager if choice.tier == "eager" else default):
        gain = max(0.0, 1 - tuned / now)
    total = tally.total_us
    return Called(
        device=device.slug,
        op=case.op,
        hidden=case.hidden,
        dtype=case.dtype,
        bucket=bucket_label(case.bucket),
        rows=case.rows,
        calls=tally.calls,
        us=tally.us / tally.timed if tally.timed else None,
        share=total / everything if total is not None and everything else None,
        tier=choice.tier,
        tuned=choice.measured,
        schedule=choice.schedule,
        tuned_us=tuned,
        over_eager=eager / tuned if eager and tuned else None,
        over_default=default / tuned if default and tuned else None,
        gain=gain,
    )


def table(rows: Sequence[Called], title: str) -> Table:
    """A line for each case."""
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        Column("calls", 2),
        Column("us a call", 3),
        Column("of time", 1),
        Column("served by", right=False),
        Column("over eager", 1),
        Column("over untuned", 4),
        Column("tuning saves"),
    ]
    shown = Table(title, columns, grouped=True)
    for r in rows:
        eager_won = r.tier == "eager" and r.tuned
        shown.add(
            r.op,
            r.dtype,
            str(r.hidden),
            r.bucket,
            f"{r.calls:,}",
            micros(r.us),
            "-" if r.share is None else _percent(r.share),
            f"{SERVED[r.tier]}{' (measured)' if eager_won else '' if r.tuned else ' !'}",
            ratio_text(r.over_eager),
            ratio_text(r.over_default),
            "unknown" if r.gain is None else "-" if r.tuned else percent(r.gain),
        )
    return shown


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _notes(rows: Sequence[Called], path: Path) -> list[str]:
    """What the cases of a device come to, and the command for those that are not tuned."""
    tuned = [row for row in rows if row.tuned]
    timed = any(row.share is not None for row in rows)

    def share(of: Iterable[Called]) -> str:
        return f", {percent(sum(row.share or 0.0 for row in of))} of the time," if timed else ""

    notes = [
        f"{len(tuned)} of {counted(len(rows), 'case')}{share(tuned)} served by a measurement of"
        " their own"
    ]
    if len(tuned) < len(rows):
        command = whole(f"lntune tune --cases {shlex.quote(str(path))} --missing")
        notes.append(f"! not tuned, or before the code changed. Run on that device: {command}")
    if not timed:
        notes.append("not timed: on a GPU calls are counted alone, those that move most come first")
    return notes


def left_out(whats: Iterable[What], tallies: Tallies) -> list[str]:
    """Sentences on calls that no kernel takes, with their share of the time."""
    everything = sum(tally.total_us or 0.0 for tally in tallies.values())
    groups: defaultdict[tuple[str, int, str, str], list[Tally]] = defaultdict(list)
    for what in whats:
        key = what.op, what.hidden, what.dtype, recorded.why_not(what)
        groups[key].append(tallies[what])
    sentences = []
    for (op, hidden, dtype, why), group in groups.items():
        tally = recorded.total(group)
        time = sum(one.total_us or 0.0 for one in group)
        share = f", {100 * time / everything:.0f} % of the time" if time and everything else ""
        sentences.append(
            f"no kernel takes {op} hidden {hidden} {dtype} ({counted(tally.calls, 'call')}{share}):"
            f" {why.rstrip('.')}"
        )
    more = sentences[SHOWN:]
    return sentences[:SHOWN] + ([f"and {len(more)} more of these"] if more else [])
