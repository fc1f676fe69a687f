"""What a tuning run may try for a case: every valid knob setting of its schedules, in the order in
which they deserve to be tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lntune import backends, knobs
from lntune import schedule as schedules
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, ScheduleError
from lntune.measure.jobs import Candidate
from lntune.schedule import Schedule
from lntune.search import Space


def to_tune(case: Case, device: Device, only: Sequence[str] = ()) -> list[Schedule]:
    """The schedules to tune for a case; those named, where some are, else those that list their
    knobs.
    """
    if only:
        return [schedules.get(name, case.op, device.kind) for name in only]
    return list(schedules.listing(case.op, device.kind).values())


def fixed(schedule: Schedule, words: Sequence[str]) -> dict[str, Any]:
    """The values of a schedule's knobs that words fix, `name=value` or a switch that is to be on;
    knobs that it does not have are left out.

    Raises:
        InputError: a value that a knob may not take, or a knob that is fixed twice.
    """
    known = knobs.values_of(schedule.knobs)
    given = [word for word in words if (name := knob_of(word)) in known or not name]
    setting = knobs.to_dict(knobs.changed(schedule.knobs(), given))
    return {knob_of(word): setting[knob_of(word)] for word in given}


def knob_of(word: str) -> str:
    """The name in `name=value`."""
    return word.partition("=")[0].strip()


def space(schedule: Schedule, case: Case, device: Device) -> tuple[Any, list[Any]]:
    """(default knobs, all valid knobs) of a schedule.

    Raises:
        ScheduleError: it is a user's and fails.
    """
    return schedule.untuned(case, device), schedule.space(case, device)


class Candidates:
    """The candidates of a case: `defaults`, one of each schedule whose default knobs are valid,
    `seeds`, which their schedules want tried next, and `rest`. Those that are `proposing` their
    knobs have no more than their default ones here. `fixing`: knobs with their values, as words;
    no candidate has others.

    On a GPU, where the next ones are built ahead, the rest is ordered by steps away from the
    default knobs, which are a good guess already; elsewhere as the values of the knobs are written.
    """

    def __init__(
        self, case: Case, device: Device, only: Sequence[str] = (), fixing: Sequence[str] = ()
    ) -> None:
        self.defaults: list[Candidate] = []
        self.seeds: list[Candidate] = []
        self.rest: list[Candidate] = []
        self.proposing: list[Schedule] = []
        self._listing = 0
        self._case, self._device = case, device
        self._schedules = to_tune(case, device, only)
        distances: dict[Candidate, int] = {}
        for schedule in self._schedules:
            try:
                default, settings = space(schedule, case, device)
                wanted = schedule.first(case, device)
            except ScheduleError:
                if only or schedule.shipped:
                    raise
                continue  # left out, as `check_settings` has said
            if schedule.propose is not None:
                self.proposing.append(schedule)
            elif settings:
                self._listing += 1
            held = fixed(schedule, fixing)
            for setting in settings:
                if any(getattr(setting, name) != value for name, value in held.items()):
                    continue
                candidate = Candidate.of(schedule.name, setting)
                distances[candidate] = steps(default, setting)
                (self.rest if distances[candidate] else self.defaults).append(candidate)
            listed = {*self.defaults, *self.rest} if held else set(self.rest)
            named = dict.fromkeys(Candidate.of(schedule.name, setting) for setting in wanted)
            self.seeds += [candidate for candidate in named if candidate in listed]
        if backends.of(device).builds_ahead:
            # stable: as written among those equally far
            self.rest.sort(key=lambda c: distances[c])
        self._all = dict.fromkeys((*self.defaults, *self.seeds, *self.rest))

    @property
    def listed_share(self) -> float:
        """The part of a case's budget for schedules that list their knobs: each schedule has the
        same; all of it where there are no others, and where there are only others, for their
        default knobs.
        """
        return self._listing / (self._listing + len(self.proposing)) if self._listing else 1.0

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._all)

    def __contains__(self, candidate: object) -> bool:
        """Whether it may be tried, at last if not at first."""
        if candidate in self._all or not isinstance(candidate, Candidate):
            return candidate in self._all
        try:
            schedule, setting = candidate.resolved(self._case.op)
        except LntuneError:  # of a log, and there no more
            return False
        return (
            Candidate.of(schedule.name, knobs.unrefined(setting)) in self._all
            and schedule.reason_invalid(setting, self._case, self._device) is None
        )

    def __len__(self) -> int:
        return len(self._all)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """The candidates one step away: a knob moved to the value before or after, or another
        schedule's default knobs.
        """
        schedule, setting = candidate.resolved(self._case.op)
        moved = (Candidate.of(schedule.name, k) for k in knobs.neighbours(setting))
        others = (c for c in self.defaults if c.schedule != candidate.schedule)
        return [c for c in (*moved, *others) if c in self._all]

    def as_space(self, seeds: Iterable[Candidate] = ()) -> Space:
        """The candidates as a search sees them; `seeds` are known to be promising beside those of
        the schedules.
        """
        values = {s.name: knobs.values_of(s.knobs) for s in self._schedules}
        return Space(
            tuple(self),
            self.neighbours,
            seeds=tuple(dict.fromkeys((*self.seeds, *seeds))),
            knobs=known_knobs,
            scales={name: listed for of in values.values() for name, listed in of.items()},
        )

    def refined(self, candidate: Candidate) -> list[Candidate]:
        """The candidates that differ from one in knobs that are tried last, when it is known to be
        the best.
        """
        schedule, setting = candidate.resolved(self._case.op)
        found = schedule.refined(setting, self._case, self._device)
        return [Candidate.of(schedule.name, k) for k in found]


def known_knobs(candidate: Candidate) -> dict[str, Any]:
    """The knobs of a candidate as searches learn from them, its schedule among them."""
    return {"schedule": candidate.schedule, **candidate.knobs}


def steps(one: Any, other: Any) -> int:
    """How many steps of one knob to its next value lie between two settings."""
    values = knobs.values_of(type(one))
    return sum(
        abs(listed.index(getattr(one, name)) - listed.index(getattr(other, name)))
        for name, listed in values.items()
    )
