"""Which schedule and knobs serve a case, or whether eager mode does: decided on the tuning logs,
once for each device, operator, hidden size, dtype and row bucket, and remembered.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from lntune import device as device_module
from lntune import knobs as knobs_module
from lntune import ops
from lntune import schedule as schedule_module
from lntune.bundle import loaded
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, LogError
from lntune.log import records, slower
from lntune.log.records import LogWarning, Record
from lntune.log.select import Choice, select
from lntune.schedule import Schedule, ScheduleWarning
from lntune.system import callers, paths, variables
from lntune.torch import first_check, untuned
from lntune.torch.reloading import LOCK, on_reload

_log = logging.getLogger("lntune")
_records: dict[tuple[Device, str], list[Record]] = {}
_choices: dict[tuple[Device, Case], Choice] = {}
_warned: set[str] = set()
"""Names of schedules of which a warning said that they are left out."""


def choose(case: Case, device: Device | None = None) -> Choice:
    """What serves a case (its rows stand for their bucket) on a device, this machine's CPU if none
    is given, decided on the logs as they were when first asked. A schedule that fails when it is
    asked is left out, with one warning. Each decision is logged (logger "lntune", level DEBUG).

    Raises:
        LogError: a log of this device cannot be read.
    """
    case, device = case.typical, device or device_module.current()
    variables.warn_once()
    with LOCK:
        if (device, case) not in _choices:
            if (device, case.op) not in _records:
                _records[device, case.op] = _read(case.op, device)
            decide(case, device, {})
        return _choices[device, case]


def decide(case: Case, device: Device, failed: dict[str, str]) -> None:
    """Decide on a case without the schedules that have failed, by name with what they did, and say
    which fail.
    """
    if not failed and (shipped := _of_bundle(case, device)) is not None:
        _choices[device, case] = shipped
        return
    usable = {
        name: s
        for name, s in schedule_module.for_op(case.op, device.kind).items()
        if name not in failed
    }
    refused: list[tuple[str, dict[str, Any], str]] = []
    partner = ops.backward_of(case)
    backward = None if partner is None else choose(partner, device)
    while True:
        offered = {name: _refusing(s, refused) for name, s in usable.items()}
        choice = select(case, device, _records[device, case.op], offered)
        if backward is not None:
            choice = slower.both_passes(case, choice, backward)
        one = _known_wrong(case, choice, device)
        if one is None:
            break
        if one in refused:  # its `valid` is not asked, or its defaults are others each time
            del usable[choice.schedule]
        refused.append(one)
    faults = {**failed, **choice.faults}
    steps = (*(f"left out: {fault}" for fault in failed.values()), *choice.steps)
    wrong = tuple(
        f"{name} ({knobs_module.describe(knobs)}): {reason}" for name, knobs, reason in refused
    )
    _choices[device, case] = msgspec.structs.replace(
        choice, steps=steps, faults=faults, wrong=wrong
    )
    _log.debug("%s on %s: %s", untuned.name(case), device.name, "; ".join(steps))
    for name, fault in faults.items():
        if name not in _warned:
            _warned.add(name)
            callers.warn(f"left out: {fault}", ScheduleWarning)


def _of_bundle(case: Case, device: Device) -> Choice | None:
    """What a bundle has chosen for a case; None where none has, or its kernel was found wrong."""
    found = loaded.find(case, device)
    if found is None or (found.entry.file and first_check.against_shipped(found, device)):
        return None
    choice = found.choice(device)
    _log.debug("%s on %s: %s", untuned.name(case), device.name, "; ".join(choice.steps))
    return choice


def decide_anew(case: Case, device: Device, choice: Choice) -> bool:
    """Decide on a case whose kernel was found wrong; False where nothing else is chosen."""
    case = case.typical
    with LOCK:
        decide(case, device, choice.faults)
        again = choose(case, device)
    return (again.schedule, again.knobs) != (choice.schedule, choice.knobs)


def _refusing(schedule: Schedule, refused: Sequence[tuple[str, dict[str, Any], str]]) -> Schedule:
    """The schedule, to which knobs do not fit whose kernels are wrong."""
    wrong = [(knobs, reason) for name, knobs, reason in refused if name == schedule.name]
    if not wrong:
        return schedule

    def valid(setting: Any, case: Case, device: Device) -> str | None:
        known = knobs_module.to_dict(setting)
        for knobs, reason in wrong:
            if knobs == known:
                return reason
        return schedule.valid(setting, case, device)

    return dataclasses.replace(schedule, valid=valid)


def _known_wrong(
    case: Case, choice: Choice, device: Device
) -> tuple[str, dict[str, Any], str] | None:
    """The schedule, the knobs and what is wrong with their kernel, where a check has found it
    wrong; None where nothing is known against a choice.
    """
    if choice.tier == "eager" or choice.bundle:
        return None
    try:
        schedule, setting = schedule_module.resolve(choice.schedule, case.op, choice.knobs)
        message = first_check.against(case, schedule, setting, device)
    except LntuneError:  # getting the kernel says it
        return None
    if not message:
        return None
    return schedule.name, knobs_module.to_dict(setting), f"its kernel is wrong: {message}"


def _read(op: str, device: Device) -> list[Record]:
    """The final measurements of an operator. Those of other devices only tell why they do not
    serve: a log of another device that cannot be read is no loss.

    Raises:
        LogError: a log of this device cannot be read.
    """
    folders = paths.log_dirs()
    try:
        return records.read(folders, op, role="final")
    except LogError as e:
        own = records.read(folders, op, device, role="final")
        callers.warn(f"{e} It is another device's, and left out.", LogWarning)
        return own


@on_reload
def _forget() -> None:
    loaded.forget()
    _records.clear()
    _choices.clear()
    _warned.clear()
