"""Which measurements of two sides belong together: of each case and device one of either, of the
same rounds where there are such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lntune.case import Case
from lntune.compare.sides import Contender, Held, Runs, Side
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log.records import Record, preferred
from lntune.log.wanted import Wanted

Key = tuple[int, Case]
"""A device's place among all of a comparison, and a case."""


class Places:
    """The devices of a comparison; one may have several descriptions: old records name no model."""

    def __init__(self, across: bool) -> None:
        self.devices: list[Device] = []
        self._across = across
        self._places: dict[Device, int] = {}

    def of(self, device: Device) -> int:
        """The place of a device, the first of all where it does not matter which."""
        if device not in self._places:
            same = (i for i, one in enumerate(self.devices) if not one.differences(device))
            place = next(same, len(self.devices))
            if place == len(self.devices):
                self.devices.append(device)
            self._places[device] = place
        return 0 if self._across else self._places[device]

    def check(self, a: Found, b: Found) -> None:
        """Refuse two sides of different devices, and with --across-devices several of one side.

        Raises:
            InputError: they are.
        """
        if self._across:
            for side in (a, b):
                distinct = sorted({self._places[d] for d in side.devices})
                if len(distinct) > 1:
                    slugs = ", ".join(sorted(self.devices[i].slug for i in distinct))
                    expected = "one device on each side with --across-devices"
                    raise InputError(got_expected(side.name, f"measurements of {slugs}", expected))
        elif a.devices and b.devices and not {p for p, _ in a.held} & {p for p, _ in b.held}:
            one, other = a.devices[0], b.devices[0]
            differences = "; ".join(one.differences(other))
            got = f"{one.slug} in {a.name}, {other.slug} in {b.name} ({differences})"
            remedy = "Compare them all the same with --across-devices."
            raise InputError(got_expected("device", got, "the same device on both sides", remedy))


class Found(NamedTuple):
    """What there is of a side: by device and case, oldest first; where only something stale is
    there; on which devices; whether it is of a run, not out of the log.
    """

    name: str
    held: dict[Key, list[Held]]
    stale: set[Key]
    devices: list[Device]
    of_run: bool


def find(side: Side, log: Sequence[Record], wanted: Wanted, places: Places) -> Found:
    """What there is of a side: of a contender in the log, of runs in their own records."""
    records = side.records if isinstance(side, Runs) else log
    found = Found(side.name, {}, set(), [], isinstance(side, Runs))
    devices: dict[Device, None] = {}
    for record in records:
        if record.status != "ok" or not wanted.takes(record.case):
            continue
        held = side.held(record)
        if held is None or not held.timing.median_us > 0:
            continue
        devices[record.device] = None
        key = places.of(record.device), record.case
        # what a contender was before its code changed is not what it is
        if isinstance(side, Contender) and held.stale:
            found.stale.add(key)
        else:
            found.held.setdefault(key, []).append(held)
    found.devices.extend(devices)
    return found


def choose(a: Found, b: Found, key: Key) -> tuple[Held, Held]:
    """The measurements of a case to compare: the latest undisturbed record that holds both sides
    (which may have been read twice); where none does, that of each.
    """
    of_a, of_b = a.held[key], b.held[key]
    in_b = {_name(held.record): held for held in of_b}
    both = [(held, in_b[_name(held.record)]) for held in of_a if _name(held.record) in in_b]
    both = [(one, other) for one, other in both if one.record == other.record]
    if a.of_run or b.of_run:
        # a log also holds what an old run measured, which says nothing of what came after it
        both = [(one, other) for one, other in both if one.timing != other.timing]
    if both:
        record = preferred([one.record for one, _ in both])
        return next(pair for pair in both if pair[0].record is record)
    return _latest(of_a), _latest(of_b)


def _name(record: Record) -> tuple[str, str]:
    return record.run, record.time


def _latest(held: Sequence[Held]) -> Held:
    record = preferred([h.record for h in held])
    return next(h for h in held if h.record is record)


def operators(sides: Iterable[Side]) -> tuple[str, ...]:
    """The operators of the schedules among some sides, which must be one; none where there is no
    schedule.

    Raises:
        InputError: they are of several.
    """
    of = {side.name: side.op for side in sides if side.op}
    if len(set(of.values())) > 1:
        got = ", ".join(f"{name} of {op}" for name, op in of.items())
        raise InputError(got_expected("sides", got, "schedules of one operator"))
    return tuple(set(of.values()))
