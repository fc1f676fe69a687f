"""`lntune compare --measure`: what is to be compared, built, checked and timed in the same rounds.
The log has it, and the comparison is made out of the log like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lntune import ops, schedule
from lntune.case import Case
from lntune.compare.run import Options
from lntune.compare.sides import Contender, Held, Runs, Side
from lntune.device import Device
from lntune.errors import InputError, ScheduleError, got_expected
from lntune.log import records, select
from lntune.log.records import Record
from lntune.measure.jobs import Candidate, Final, Outcome
from lntune.measure.worker import Worker
from lntune.system import interrupts
from lntune.tune import Settings, check_settings, times
from lntune.tune.journal import Journal
from lntune.tune.loop import start_worker

COMPILING = 180.0
"""Seconds that torch.compile may take beside measuring."""
LONGER = 4
"""Times as long as asked for, at most, is measured until ratios are precise."""
SHORT = 0.1
"""Seconds of measuring by which those are found that a comparison fails with."""
DISTURBED = (
    "disturbed by other work on the machine; where the log has a measurement of the same sides that"
    " nothing disturbed, that one is compared"
)

OnCase = Callable[[int, int, Case], None]
OnFailure = Callable[[str], None]


class UnfitSideError(InputError):
    """A side cannot be had in a case, and why."""


class Plan(NamedTuple):
    """What is measured of a case: candidates, what serves where nothing is tuned (where that works
    at all), and which of "compile", "default" and "eager" are sides.
    """

    candidates: tuple[Candidate, ...]
    default: Candidate | None
    sides: tuple[str, ...] = ()


def cases_of(sides: Sequence[Side], op: str, options: Options) -> list[Case]:
    """What is measured where no sizes are given: the cases of an operator that the log has finals
    of, or the operator's default grid.
    """
    contenders(sides)
    finals = records.read(options.folders, op, options.device, "final")
    return sorted({r.case for r in finals if r.status == "ok"}) or list(ops.get(op).grid)


def contenders(sides: Sequence[Side]) -> list[Contender]:
    """The sides, which can all be measured.

    Raises:
        InputError: one is a file or a folder, which was measured before.
    """
    for side in sides:
        if isinstance(side, Runs):
            expected = "schedules, default, tuned, eager or compile"
            raise InputError(got_expected("--measure", side.name, expected))
    return [side for side in sides if isinstance(side, Contender)]


def measure(
    sides: Sequence[Side],
    cases: Sequence[Case],
    seconds: float,
    options: Options,
    on_case: OnCase,
    on_failure: OnFailure,
) -> None:
    """Measure the sides of each case against each other for about `seconds`, up to LONGER times as
    long where their ratios need it, and log what came of it. Of a schedule it is the best that was
    measured with the knobs given, else its default knobs with these. An interrupt ends it with the
    cases that are done.

    Raises:
        InputError: a side cannot be measured, or a case is none; LogError: the log cannot be
            written; BuildError, ToolchainError: nothing can be measured here.
    """
    compared = contenders(sides)
    settings = Settings(log_dir=options.log_dir, device=options.device)
    check_settings(settings, cases)
    journal = Journal(settings)
    known = by_case(options, {case.op for case in cases})
    try:
        with Worker(settings.threads) as worker:
            start_worker(worker, settings)
            for index, case in enumerate(cases):
                on_case(index, len(cases), case)
                try:
                    plan = _plan(compared, case, settings.target, known, journal)
                except UnfitSideError as e:
                    on_failure(f"{case}: {e}")
                    continue
                share = times.BESIDE_SHARE if options.cold else 0.0
                for failure in _measure(worker, journal, case, plan, seconds, settings, share):
                    on_failure(f"{case}: {failure}")
    except KeyboardInterrupt:
        on_failure("interrupted; compared is what is in the log")


def by_case(options: Options, operators: set[str]) -> dict[records.Key, list[Record]]:
    """What was measured of each case, oldest first."""
    known: dict[records.Key, list[Record]] = {}
    for op in operators:
        for record in records.read(options.folders, op, options.device):
            if record.status == "ok" and record.timings:
                known.setdefault(record.key, []).append(record)
    return known


def _plan(
    sides: Sequence[Contender],
    case: Case,
    device: Device,
    known: Mapping[records.Key, Sequence[Record]],
    journal: Journal,
) -> Plan:
    """What to measure of a case."""
    found = select.untuned(case.typical, device, schedule.for_op(case.op, device.kind))
    default = Candidate.of(found.schedule, found.setting) if found.schedule else None
    candidates: list[Candidate] = []
    for side in sides:
        if side.schedule:
            candidates.append(candidate(side, case, device, known.get(records.Key.of(case), ())))
        elif side.word == "tuned":
            winner = journal.previous_winner(case)
            if winner is None:
                raise UnfitSideError("nothing is tuned; lntune tune does it")
            candidates.append(winner)
        elif side.word == "default" and default is None:
            raise UnfitSideError("no schedule's default knobs fit")
    if not candidates:
        if default is None:
            raise UnfitSideError("no schedule fits, and one is measured beside eager mode")
        candidates.append(default)
    words = {side.word for side in sides} & {"compile", "default", "eager"}
    return Plan(tuple(dict.fromkeys(candidates)), default, tuple(sorted(words)))


def candidate(side: Contender, case: Case, device: Device, known: Sequence[Record]) -> Candidate:
    """The best of a schedule that was measured with the knobs of a side and still fits, in a final
    or comparison if possible; else its default knobs with those.
    """
    chosen = schedule.get(side.schedule)
    if chosen.op != case.op:
        raise UnfitSideError(f"{side.schedule} is of {chosen.op}")
    finals = [r for r in known if r.role in ("final", "comparison")]
    settings: list[Any] = []
    for held in (_latest(side, finals), _fastest(side, known)):
        if held is not None:
            settings.append(held.knobs)
    try:
        for setting in (*map(chosen.setting, settings), side.default(case, device)):
            reason = chosen.reason_invalid(setting, case, device)
            if reason is None:
                return Candidate.of(side.schedule, setting)
    except ScheduleError as e:
        raise UnfitSideError(str(e)) from e
    raise UnfitSideError(f"{side.name} does not fit: {reason}")


def _latest(side: Contender, finals: Sequence[Record]) -> Held | None:
    """The best of a side in the final or comparison that counts."""
    found = [held for record in finals if (held := side.held(record)) and not held.stale]
    if not found:
        return None
    record = records.preferred([held.record for held in found])
    return next(held for held in found if held.record is record)


def _fastest(side: Contender, known: Sequence[Record]) -> Held | None:
    """The fastest trial of a side."""
    trials = (side.held(record) for record in known if record.role == "trial")
    found = [held for held in trials if held and not held.stale]
    return min(found, key=lambda held: held.timing.median_us, default=None)


def _measure(
    worker: Worker,
    journal: Journal,
    case: Case,
    plan: Plan,
    seconds: float,
    settings: Settings,
    beside: float,
) -> list[str]:
    """Measure and log a case; what failed or was disturbed, in words. Where the whole fails, each
    candidate is measured alone to find which. `beside` is the share of time that is spent besides
    on the other cache.
    """

    def attempt(candidates: tuple[Candidate, ...], plan: Plan, seconds: float) -> Outcome:
        job = Final(
            case,
            journal.device,
            candidates,
            seconds,
            retry_seconds=seconds,
            default=plan.default,
            with_compile="compile" in plan.sides,
            beside_seconds=seconds * beside,
            most_seconds=LONGER * seconds,
            sides=plan.sides,
        )
        allowed = settings.timeout + 8 * seconds + (COMPILING if job.with_compile else 0)
        return worker.run(job, allowed)

    outcome = attempt(plan.candidates, plan, seconds)
    if outcome.status == "ok":
        assert outcome.winner is not None
        with interrupts.held():
            default = plan.default if "default" in outcome.timings else None
            winner = plan.candidates[outcome.winner]
            logged = journal.record(case, winner, outcome, "comparison", default)
        said = [outcome.message] if outcome.message else []
        return said + ([DISTURBED] if logged.disturbance else [])
    failures = []
    bare = Plan((), None)
    for candidate in plan.candidates:
        alone = attempt((candidate,), bare, SHORT)
        if alone.status != "ok":
            journal.record(case, candidate, alone, "comparison")
            failures.append(f"{candidate.schedule} {alone.status}: {alone.message}")
    return failures or [f"{outcome.status}: {outcome.message}"]
