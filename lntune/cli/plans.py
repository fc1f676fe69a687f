"""How the options of `lntune tune` become a plan: which cases are tuned on which devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lntune import ops
from lntune.backends import DEFAULT, device_of
from lntune.cli.parse import cases_of, integers, names
from lntune.errors import InputError, got_expected
from lntune.knobs import values_of

if TYPE_CHECKING:
    from lntune.commands.tune import Plan


def fitting(
    operators: list[str], schedules: Sequence[str], knobs: Sequence[str], target: str
) -> list[str]:
    """The operators named; where none is, and schedules or knobs are, those that have one of them:
    the first of all where no operator has, whose errors say what there is.
    """
    if operators or not (schedules or knobs):
        return operators
    from lntune import schedule

    kind = device_of(target or DEFAULT).kind
    asked = {word.partition("=")[0] for word in knobs}
    found = []
    for op in ops.OPS:
        known = schedule.for_op(op, kind)
        settings = {name for one in known.values() for name in values_of(one.knobs)}
        if (not schedules or set(schedules) & set(known)) and (not asked or asked & settings):
            found.append(op)
    return found or [ops.DEFAULT]


def plan(
    operators: list[str],
    sizes: tuple[str, str, str],
    grid: str,
    file: Path | None,
    target: str,
    missing: bool,
    stale: bool,
    log_dir: Path | None,
) -> Plan:
    """What is to be tuned where: the cases of `file`, or of a grid or `sizes` (hidden sizes, dtypes
    and rows as they were given), those alone that are missing or stale where that is asked for; on
    the device that `target` names, or where that is empty on each that the file has.

    Raises:
        InputError, UnknownNameError: there is no such grid, operator, device or file.
    """
    from lntune.commands.tune import Part, Plan, by_value, of_recorded, unmeasured
    from lntune.log.wanted import Wanted

    hidden, dtype, rows = sizes
    asked = [] if file is not None else cases_of(operators, hidden, dtype, rows, grid)
    wanted = Wanted.of(
        operators, integers("--hidden", hidden), names(dtype), integers("--rows", rows)
    )
    if file is not None:
        if grid != "default":
            raise InputError(got_expected("--grid", f"{grid} beside --cases", "one of the two"))
        plan = of_recorded(file, wanted, device_of(target) if target else None)
    else:
        device = device_of(target or DEFAULT)
        if len(operators) != 1 and not hidden:
            asked = by_value(asked, device)
        plan = Plan([Part(device, asked)], [])
    if missing or stale:
        chosen = file is not None or bool(hidden or dtype or rows) or grid != "default"
        of_log = wanted if stale and not chosen else None
        parts = [unmeasured(p, log_dir, missing, stale and chosen, of_log) for p in plan.parts]
        plan = Plan([part for part in parts if part.cases], plan.notes)
    return plan
