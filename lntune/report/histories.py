"""The output of `lntune report --history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lntune.device import Device
from lntune.log.wanted import Wanted
from lntune.report.bars import curve
from lntune.report.columns import Column, Table, key
from lntune.report.history import History, Run, Step, histories, runs
from lntune.report.output import Output
from lntune.report.survey import asked_records
from lntune.report.surveyed import closing
from lntune.report.tables import micros, number, ratio_text
from lntune.words import counted

STEPS = 10
"""Steps that are told in sentences, the largest first; the facts have all."""


def of_logs(folders: Sequence[Path], wanted: Wanted, owner: Device | None, again: str) -> Output:
    """How what is asked for went in the logs of some folders, on a device or on all."""
    groups = asked_records(folders, wanted, owner, ("final",))
    return output({device.slug: (histories(log), runs(log)) for device, log in groups}, again)


def output(found: Mapping[str, tuple[list[History], list[Run]]], again: str) -> Output:
    """What runs and histories of some devices say; `again` is the command that prints it again."""
    tables: list[Table] = []
    for device, (cases, of_device) in found.items():
        followed = histories_table(cases, f"{device}, times as fast as eager")
        followed.notes = lines(cases)
        tables += [followed, runs_table(of_device, "runs")]
    facts = [
        {"device": device, "runs": of_device, "history": cases, "again": again}
        for device, (cases, of_device) in found.items()
    ]
    every = [
        {"device": history.device, "case": history.case, **_fields(final)}
        for cases, _ in found.values()
        for history in cases
        for final in history.finals
    ]
    return Output(facts, tables, closing(again, cases=True) if found else (), every)


def _fields(final: object) -> dict[str, object]:
    return dict(msgspec.to_builtins(final))


def runs_table(in_order: Sequence[Run], title: str) -> Table:
    """A line for each run."""
    columns = [
        Column("run", right=False),
        Column("began", right=False),
        Column("finals"),
        Column("changed since the run before", 1, right=False),
    ]
    table = Table(title, columns)
    for run in in_order:
        table.add(run.run, when(run.first), str(run.finals), "; ".join(run.changed))
    return table


def histories_table(cases: Sequence[History], title: str) -> Table:
    """A line for each case that was measured more than once."""
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        Column("finals"),
        Column("first"),
        Column("last"),
        Column("run by run", 1, right=False, drawn=True),
        Column("last us", 2),
        Column("steps"),
        Column("each", 3, right=False),
    ]
    table = Table(title, columns, grouped=True)
    for h in cases:
        if len(h.finals) > 1:
            ratios = [f.over_eager for f in h.finals]
            known = [ratio for ratio in ratios if ratio is not None]
            certain = [f for f in h.finals if f.over_eager is not None] or h.finals
            table.add(
                h.case.op,
                h.case.dtype,
                str(h.case.hidden),
                str(h.case.rows),
                str(len(h.finals)),
                ratio_text(known[0] if known else None),
                ratio_text(known[-1] if known else None),
                curve(known) if known else "",
                micros(certain[-1].tuned_us),
                str(len(h.steps) or "-"),
                " ".join(number(ratio) for ratio in ratios),
            )
    return table


def lines(cases: Sequence[History]) -> list[str]:
    """The steps, the largest first, and what was measured once."""
    steps = [(h, step) for h in cases for step in h.steps]
    steps.sort(key=lambda pair: -max(pair[1].ratio, 1 / pair[1].ratio))
    text = [step_line(h, step) for h, step in steps[:STEPS]]
    if len(steps) > STEPS:
        text.append(f"{counted(len(steps) - STEPS, 'smaller step')} more; --json has all")
    several = sum(len(h.finals) > 1 for h in cases)
    if not steps:
        text.append("no steps: no change is certain" if several else "nothing was measured twice")
    if once := len(cases) - several:
        text.append(f"{counted(once, 'case')} measured once")
    return text


def step_line(history: History, step: Step) -> str:
    """A step in a sentence."""
    way = "faster" if step.ratio > 1 else "slower"
    ratio = max(step.ratio, 1 / step.ratio)
    low, high = sorted((step.low, step.high) if step.ratio > 1 else (1 / step.low, 1 / step.high))
    changed = f": {'; '.join(step.changed)}" if step.changed else ", and nothing else changed"
    return (
        f"{history.case}: {ratio:.2f}x {way} ({low:.2f} to {high:.2f}) between"
        f" {when(step.before)} and {when(step.after)}{changed}"
    )


def when(time: str) -> str:
    """Date and minute of an ISO time."""
    return time[:16].replace("T", " ")
