"""A tuning run without the device: what it would measure, and how long it would take.

Candidates are enumerated, built (a bounded number of each case, in the order a run would build
them), looked at as `candidate_facts` does, verified (a GPU's in the emulator, on rows as short as
their knobs allow), ranked and pruned. Nothing is timed and nothing is logged.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from lntune import backends, knobs
from lntune.case import Case
from lntune.device import Device
from lntune.log.records import Status
from lntune.measure import training
from lntune.measure.jobs import Candidate, Check, Outcome
from lntune.tune import times
from lntune.tune.ahead import Ahead
from lntune.tune.beside import count
from lntune.tune.candidates import Candidates, to_tune
from lntune.tune.settings import Settings, check_settings
from lntune.tune.times import TRIAL_SECONDS
from lntune.words import counted

TRIALS = 8
"""Candidates built of each case, unless told otherwise."""
SHOWN = 3


class Ranked(msgspec.Struct, frozen=True):
    """A candidate that a run would measure: its place in the order and, of a GPU's main kernel,
    what it takes of a multiprocessor.
    """

    schedule: str
    knobs: str
    status: Status
    score: float | None = None
    registers: int | None = None
    shared: int | None = None
    occupancy: float | None = None


class Plan(msgspec.Struct, frozen=True):
    """One case. `candidates` are all valid knob settings; of the `built` ones (as many as there
    were time and trials for) `pruned` have a problem that keeps them from being measured, by
    reason, and `failed` did not come out right: status and message -> which; `verified` are right.
    `first` are the first by rank. A run without a budget would measure `measured` of them (the
    share of the built ones that would be, of all) in `seconds`, its final included, and one with
    the budget about `within` of these.
    """

    case: Case
    candidates: int
    built: int
    verified: int
    pruned: dict[str, int]
    failed: dict[str, list[str]]
    first: tuple[Ranked, ...]
    measured: int
    seconds: float
    within: int


class DryRun(msgspec.Struct, frozen=True):
    """What came of it; `assumption` says what the times of a real run were reckoned from, `start`
    is what its process takes to be there.
    """

    device: Device
    compiler: str
    plans: list[Plan]
    builders: int
    assumption: str
    seconds: float
    interrupted: bool = False
    start: float = 0.0

    @property
    def measured(self) -> int:
        """Candidates a run of all cases would measure."""
        return sum(p.measured for p in self.plans)

    @property
    def within(self) -> int:
        """How many of them in the budget."""
        return sum(p.within for p in self.plans)

    @property
    def run_seconds(self) -> float:
        """What a run without a budget would take, from the command to its last line."""
        return self.start + sum(p.seconds for p in self.plans)

    @property
    def wrong(self) -> int:
        """Candidates that were not right, or did not build."""
        return sum(len(which) for p in self.plans for which in p.failed.values())


Observer = Callable[[Case, int, int, int], None]
"""(case, its number, how many there are, candidates built of it so far)."""


def run(cases: Sequence[Case], settings: Settings, observer: Observer = lambda *_: None) -> DryRun:
    """Go through the tuner without the device; `settings.seconds` bounds all of it,
    `settings.trials` what is built of a case.

    Raises:
        InputError, UnknownNameError, ScheduleError, ToolchainError, BuildError: as tune, but for a
        device that is not here.
    """
    check_settings(settings, cases, dry=True)
    device, start, interrupted = settings.target, time.monotonic(), False
    outcomes: dict[Case, dict[Candidate, Outcome]] = {}
    plans: list[Plan] = []
    with Ahead(device, settings.timeout, Check) as ahead:
        try:
            for index, case in enumerate(cases):
                end = None
                if settings.seconds is not None:
                    now = time.monotonic()
                    end = now + (settings.seconds - (now - start)) / (len(cases) - index)
                observer(case, index, len(cases), 0)
                on_built = functools.partial(observer, case, index, len(cases))
                candidates = Candidates(case, device, settings.schedules, settings.knobs)
                first = list(candidates)[: settings.trials or TRIALS]
                outcomes[case] = _built(ahead, case, first, end, on_built)
                scores = {c: ahead.score(case, c) for c in outcomes[case]}
                plans.append(_plan(case, candidates, outcomes[case], scores, settings))
        except KeyboardInterrupt:
            interrupted = True
        builds = [o.seconds for of_case in outcomes.values() for o in of_case.values()]
        workers = settings.workers or count(device, cases, settings.trials)
        pace = _Pace(device, ahead, list(filter(None, builds)), len(outcomes), workers)
    plans = pace.timed(plans, settings, len(cases))
    compiler = backends.of(device).compiler()
    return DryRun(
        device,
        compiler,
        plans,
        ahead.count,
        pace.assumption,
        round(time.monotonic() - start, 2),
        interrupted,
        round(pace.start, 2),
    )


def _built(
    ahead: Ahead,
    case: Case,
    candidates: Sequence[Candidate],
    end: float | None,
    on_built: Callable[[int], None],
) -> dict[Candidate, Outcome]:
    """The outcomes of as many candidates as there is time for; the first default's in any case."""
    ahead.begin(case, candidates)
    outcomes: dict[Candidate, Outcome] = {}
    for candidate in candidates:
        if outcomes and end is not None and time.monotonic() >= end:
            break
        outcomes[candidate] = ahead.outcome(case, candidate)
        on_built(len(outcomes))
    return {**outcomes, **ahead.built(case)}


def _plan(
    case: Case,
    candidates: Candidates,
    outcomes: dict[Candidate, Outcome],
    scores: dict[Candidate, float],
    settings: Settings,
) -> Plan:
    """What a run would do with the case; how long it takes is not known yet."""
    pruned: Counter[str] = Counter()
    failed: dict[str, list[str]] = {}
    sound: list[Candidate] = []
    for candidate, outcome in outcomes.items():
        problems = outcome.facts.problems if outcome.facts else ()
        if outcome.status != "ok":
            which = f"{candidate.schedule} {knobs.describe(candidate.knobs)}"
            failed.setdefault(f"{outcome.status}: {outcome.message}", []).append(which)
        elif problems and candidate not in candidates.defaults:
            pruned["; ".join(problems)] += 1
        else:
            sound.append(candidate)
    sound.sort(key=lambda c: (c not in candidates.defaults, -scores[c]))
    measured = len(candidates)
    if outcomes:
        measured = round(measured * len(sound) / len(outcomes))
    measured = min(measured, settings.trials or measured)
    first = tuple(_ranked(c, outcomes[c], scores[c]) for c in sound[:SHOWN])
    verified = sum(o.status == "ok" for o in outcomes.values())
    return Plan(
        case,
        len(candidates),
        len(outcomes),
        verified,
        dict(pruned),
        failed,
        first,
        measured,
        seconds=0.0,
        within=0,
    )


def _ranked(candidate: Candidate, outcome: Outcome, score: float) -> Ranked:
    text = candidate.schedule, knobs.describe(candidate.knobs), outcome.status
    if outcome.facts is None:
        return Ranked(*text)
    main = max(outcome.facts.kernels, key=lambda k: k.resources.registers * k.threads)
    shared = main.resources.shared_bytes + main.dynamic_shared
    return Ranked(
        *text,
        round(score, 3) if score < math.inf else None,
        main.resources.registers,
        shared,
        round(main.occupancy.share, 3),
    )


class _Pace:
    """How long things take in a real run: what was measured here, and of a GPU what is assumed.

    In seconds: `build` to build a candidate, on a CPU to check it too; `inputs` to make those of a
    case; `device` what a candidate takes of the device; `start` until the process that measures is
    there. `workers` build beside each other.
    """

    def __init__(
        self, device: Device, ahead: Ahead, builds: Sequence[float], cases: int, workers: int
    ) -> None:
        assumed = backends.of(device).trial_overhead
        self._ahead, self._builders = backends.of(device).builds_ahead, ahead.count
        # where a check needs nothing but this machine, it is that of a real run
        measured = ahead.seconds if assumed is None else builds
        self._build = statistics.median(measured) if measured else 0.0
        self.start = statistics.median(ahead.starts) if ahead.starts else 0.0
        # The first candidate of a case waits for the inputs, and for what is true of them.
        excess = sum(measured) - len(measured) * self._build if assumed is None else 0.0
        self._inputs = max(0.0, excess) / max(1, cases)
        self._workers = workers
        self._device = (self._build if assumed is None else assumed) + TRIAL_SECONDS
        finals = (
            "a quiet machine; as much for each of a final's, which are measured for up to"
            f" {times.MOST_FINAL:.0f} s; {self.start:.1f} s for the start"
        )
        if assumed is not None:
            building = (
                f"{self._build:.2f} s to build one, as here, by"
                f" {counted(self._builders, 'process', 'processes')}, whichever is longer"
            )
            self.assumption = (
                f"{self._device:.2f} s of the GPU for a candidate (assumed, not measured), or"
                f" {building}; {finals}"
            )
        else:
            building = (
                f"{self._build:.2f} s to build and check a candidate, as here, by"
                f" {counted(workers, 'process', 'processes')}, {TRIAL_SECONDS:.2f} s to time it"
            )
            self.assumption = f"{building}, {self._inputs:.1f} s for the inputs of a case; {finals}"

    def timed(self, plans: Sequence[Plan], settings: Settings, cases: int) -> list[Plan]:
        """The plans of the first of so many cases, with their times. In a run with a budget each
        case has its share of what is left, see Times.share; those that come when it is over have
        nothing.
        """
        remaining = None if settings.seconds is None else settings.seconds - self.start
        timed = []
        for index, plan in enumerate(plans):
            trial = self._trial(plan)
            schedules = len(to_tune(plan.case, settings.target, settings.schedules))
            estimate = functools.partial(
                times.estimate,
                trial_seconds=trial,
                finalist_seconds=self._device,
                candidates=plan.measured,
                schedules=schedules,
                training=training.is_timed(plan.case, settings.target),
            )
            seconds, within = 0.0, plan.measured
            if plan.measured:
                seconds = self._inputs + estimate(None)[1]
            if remaining is not None and plan.measured:
                worth = times.worth(
                    self._inputs + estimate(0.0)[1], trial, self._device, settings.trials
                )
                share = times.shared(remaining, cases - index, worth) - self._inputs
                share = max(0.0, share)
                within, case_seconds = estimate(share)
                if index and remaining < 2 * self._device + times.SHORT_FINAL:
                    within, case_seconds = 0, 0.0
                remaining -= case_seconds + self._inputs
            timed.append(msgspec.structs.replace(plan, seconds=round(seconds, 1), within=within))
        return timed

    def _trial(self, plan: Plan) -> float:
        """What a trial takes: the device's time, or the builders' where that is longer, who build
        also what is refused afterwards.
        """
        if not self._ahead:
            return self._build / self._workers + TRIAL_SECONDS
        refused = sum(plan.pruned.values()) + sum(map(len, plan.failed.values()))
        share = 1 - refused / plan.built if plan.built else 1.0
        to_build = plan.measured / max(share, 0.1)
        return max(self._device, self._build * to_build / max(plan.measured, 1) / self._builders)
