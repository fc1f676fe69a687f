"""The candidates of a case: every valid knob setting of its schedules, in the order in which they
deserve to be tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune import knobs, schedule
from lntune.case import Case
from lntune.device import Device
from lntune.errors import ScheduleError
from lntune.measure.jobs import Candidate
from lntune.schedule import Schedule


def plans(case: Case, device: Device, only: Sequence[str] = ()) -> list[Schedule]:
    """The schedules to tune for a case; those named, where some are."""
    found = (
        {name: schedule.get(name, case.op, device.kind) for name in only}
        if only
        else schedule.for_op(case.op, device.kind)
    )
    return list(found.values())


def space(plan: Schedule, case: Case, device: Device) -> tuple[Any, list[Any]]:
    """(default knobs, all valid knobs) of a schedule.

    Raises:
        ScheduleError: it is a user's and fails.
    """
    return plan.untuned(case, device), plan.space(case, device)


class Candidates:
    """The candidates of a case: `defaults`, one of each schedule whose default knobs are valid, and
    `rest`.

    On a GPU, where the next ones are built ahead, the rest is ordered by steps away from the
    default knobs, which are a good guess already; elsewhere as the values of the knobs are written.
    """

    def __init__(self, case: Case, device: Device, only: Sequence[str] = ()) -> None:
        self.defaults: list[Candidate] = []
        self.rest: list[Candidate] = []
        away: dict[Candidate, int] = {}
        for plan in plans(case, device, only):
            try:
                default, settings = space(plan, case, device)
            except ScheduleError:
                if only:
                    raise
                continue  # left out, as `check_settings` has said
            for setting in settings:
                candidate = Candidate.of(plan.name, setting)
                away[candidate] = steps(default, setting)
                (self.rest if away[candidate] else self.defaults).append(candidate)
        if device.kind == "gpu":
            self.rest.sort(key=lambda c: away[c])  # stable: as written among those equally far
        self._known = dict.fromkeys(self)

    def __iter__(self) -> Any:
        yield from self.defaults
        yield from self.rest

    def __contains__(self, candidate: object) -> bool:
        return candidate in self._known

    def __len__(self) -> int:
        return len(self._known)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """The candidates one step away: a knob moved to the value before or after, or another
        schedule's default knobs.
        """
        plan = schedule.get(candidate.schedule)
        moved = knobs.neighbours(knobs.from_dict(plan.knobs, candidate.knobs))
        others = [c for c in self.defaults if c.schedule != candidate.schedule]
        return [
            c for c in (*(Candidate.of(plan.name, k) for k in moved), *others) if c in self._known
        ]


def steps(one: Any, other: Any) -> int:
    """How many steps of one knob to its next value lie between two settings."""
    values = knobs.values_of(type(one))
    return sum(
        abs(listed.index(getattr(one, name)) - listed.index(getattr(other, name)))
        for name, listed in values.items()
    )
