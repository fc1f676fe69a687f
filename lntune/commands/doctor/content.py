"""Which schedules and tuning records can be used, and which cases had better be tuned again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from lntune import device, ops, schedule
from lntune.commands.doctor.finding import SHOWN, Finding, looked
from lntune.errors import LntuneError, ScheduleError
from lntune.log import records, select
from lntune.system import paths
from lntune.words import counted


def examine() -> list[Finding]:
    """The schedules, what of them cannot be used, and what is tuned with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", schedule.ScheduleWarning)
        try:
            known, broken = schedule.all_schedules(), [one.reason for one in schedule.left_out()]
        except LntuneError as e:
            return [
                Finding("schedules", "fail", str(e), "See LNTUNE_SCHEDULES."),
                *looked("tuned cases", lambda: _records({})),
            ]
        empty = schedule.empty_folders()
    folders = ", ".join(map(str, paths.schedule_dirs()))
    shipped = paths.content("schedules")
    names = [
        name if s.path.is_relative_to(shipped) else f"{name} ({s.path})"
        for name, s in sorted(known.items())
    ]
    findings = [
        Finding(
            "schedules",
            "ok" if known else "fail",
            ", ".join(names) or f"none in {folders}",
            "Install lntune again.",
        )
    ]
    broken += filter(None, map(_fault, known.values()))
    if broken:
        remedy = "Mend or remove them, see LNTUNE_SCHEDULES; the other schedules serve."
        findings.append(
            Finding("left out", "fail", "; ".join(reason.rstrip(".") for reason in broken), remedy)
        )
    if empty:
        remedy = (
            "Set LNTUNE_SCHEDULES to a folder that has folders cpu or gpu"
            " with schedule files in them, or unset it."
        )
        findings.append(
            Finding(
                "schedule folders",
                "warn",
                f"no schedule file in {', '.join(map(str, empty))}",
                remedy,
            )
        )
    return [*findings, *looked("tuned cases", lambda: _records(known))]


def _fault(checked: schedule.Schedule) -> str:
    """What a CPU's schedule does wrong when it is asked about its operator's grid; the empty string
    where all is well.
    """
    here, grid = device.current(), ops.get(checked.op).grid
    if checked.kind != here.kind:
        return ""
    try:
        if not checked.shipped:  # what comes with lntune was asked by its tests
            checked.space(grid[0].typical, here)
        for case in grid:
            checked.reason_invalid(checked.untuned(case.typical, here), case.typical, here)
    except ScheduleError as e:
        return str(e)
    return ""


def _to_measure_anew(
    topic: str, finals: Sequence[records.Record], of: int, what: str, first: str = ""
) -> Finding:
    """The finding of those `finals` that had better be measured again, of so many in all, with the
    commands that do it; `first` is to be done before.
    """
    if not finals:
        return Finding(topic, "ok", "none")
    commands = select.tune_commands(r.case for r in finals)
    more = (
        f" (and {counted(len(commands) - SHOWN, 'command')} more)" if len(commands) > SHOWN else ""
    )
    return Finding(
        topic,
        "warn",
        f"{len(finals)}{f' of {of}' if of else ''}{what}",
        f"{first}Run: {'; '.join(commands[:SHOWN])}{more}",
    )


def _records(known: Mapping[str, schedule.Schedule]) -> list[Finding]:
    """What is tuned on this device, what of it is stale, and the lines nobody can use."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            log = records.read(paths.log_dirs(), device=device.current())
        except LntuneError as e:
            return [
                Finding(
                    "tuned cases",
                    "fail",
                    str(e),
                    "Make the file readable, or set LNTUNE_LOG_DIR to another folder.",
                )
            ]
    skipped = [str(w.message) for w in caught if issubclass(w.category, records.LogWarning)]
    mine = select.served(log, known)
    findings = []
    if mine:
        hidden = ", ".join(map(str, sorted({r.case.hidden for r in mine.values()})))
        findings.append(
            Finding("tuned cases", "ok", f"{len(mine)} on this device, hidden {hidden}")
        )
    else:
        findings.append(
            Finding("tuned cases", "warn", "none on this device", f"Run: lntune tune {ops.DEFAULT}")
        )
    stale = [
        r for r in mine.values() if known and (r.schedule not in known or select.stale(r, known))
    ]
    names = ", ".join(sorted({r.schedule for r in stale}))
    findings.append(
        _to_measure_anew(
            "stale records", stale, len(mine), f": {names} changed or went since they were measured"
        )
    )
    disturbed = [r for r in mine.values() if r.disturbance]
    findings.append(
        _to_measure_anew(
            "disturbed records",
            disturbed,
            len(mine),
            " were measured while other work used the machine, and there are no others",
        )
    )
    latest = records.horizon()
    future = [r for r in log if r.role == "final" and r.time > latest]
    examples = "; ".join(f"{r.case} of {r.time}" for r in future[:SHOWN])
    findings.append(
        _to_measure_anew(
            "future records",
            future,
            0,
            f" dated after today, of a wrong clock, count as old: {examples}",
            "Set the clock. ",
        )
    )
    if skipped:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        remedy = (
            "They are left out; remove the lines (lntune report names them all), or update lntune"
            " if it is older than they are."
        )
        findings.append(
            Finding(
                "skipped records",
                "warn",
                f"{len(skipped)}: {' '.join(skipped[:SHOWN])}{more}",
                remedy,
            )
        )
    else:
        findings.append(Finding("skipped records", "ok", "none"))
    return findings
