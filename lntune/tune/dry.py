"""The whole tuner but the device: what a run would measure, and how long it would take.

Candidates are enumerated, built (a bounded number of each case, in the order a run would build
them), looked at as `statics` does, verified (a GPU's in the emulator, on rows as short as their
knobs allow), ranked and pruned. Nothing is timed and nothing is logged.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from lntune import knobs
from lntune.backends import cuda
from lntune.case import Case
from lntune.device import Device
from lntune.measure.jobs import Candidate, Check, Outcome
from lntune.tune import times
from lntune.tune.ahead import Ahead
from lntune.tune.candidates import Candidates
from lntune.tune.settings import Settings, check_settings
from lntune.tune.times import TRIAL_SECONDS

TRIALS = 8
"""Candidates built of each case, unless told otherwise."""
DEVICE_SECONDS = 0.15
"""Assumed of a GPU: loading a kernel, checking it and finding out how to time it, before it is
timed. Not measured on one yet.
"""
SHOWN = 3


class Ranked(msgspec.Struct, frozen=True):
    """A candidate that a run would measure: its place in the order and, of a GPU's main kernel,
    what it takes of a multiprocessor.
    """

    schedule: str
    knobs: str
    status: str
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
    device, begun, interrupted = settings.target, time.monotonic(), False
    found: dict[Case, dict[Candidate, Outcome]] = {}
    scores: dict[Candidate, float] = {}
    plans: list[Plan] = []
    with Ahead(device, settings.timeout, Check) as ahead:
        try:
            for index, case in enumerate(cases):
                left = (
                    None
                    if settings.seconds is None
                    else settings.seconds - (time.monotonic() - begun)
                )
                end = None if left is None else time.monotonic() + left / (len(cases) - index)
                observer(case, index, len(cases), 0)
                tell = functools.partial(observer, case, index, len(cases))
                known = Candidates(case, device, settings.schedules)
                found[case] = _built(
                    ahead, case, list(known)[: settings.trials or TRIALS], end, tell
                )
                scores = {c: ahead.score(case, c) for c in found[case]}
                plans.append(_plan(case, known, found[case], scores, settings))
        except KeyboardInterrupt:
            interrupted = True
        pace = _Pace(
            device,
            ahead,
            [o.seconds for of in found.values() for o in of.values() if o.seconds],
            len(found),
        )
    plans = pace.reckoned(plans, settings, len(cases))
    compiler = cuda.identity() if device.kind == "gpu" else "TVM with LLVM"
    return DryRun(
        device,
        compiler,
        plans,
        ahead.count,
        pace.assumption,
        round(time.monotonic() - begun, 2),
        interrupted,
        round(pace.start, 2),
    )


def _built(
    ahead: Ahead, case: Case, known: list[Candidate], end: float | None, tell: Callable[[int], None]
) -> dict[Candidate, Outcome]:
    """The outcomes of as many candidates as there is time for; the first default's in any case."""
    ahead.begin(case, known)
    found: dict[Candidate, Outcome] = {}
    for candidate in known:
        if found and end is not None and time.monotonic() >= end:
            break
        found[candidate] = ahead.outcome(case, candidate)
        tell(len(found))
    return {**found, **ahead.done(case)}


def _plan(
    case: Case,
    known: Candidates,
    found: dict[Candidate, Outcome],
    scores: dict[Candidate, float],
    settings: Settings,
) -> Plan:
    """The case's plan, not reckoned yet."""
    pruned: Counter[str] = Counter()
    failed: dict[str, list[str]] = {}
    kept: list[Candidate] = []
    for candidate, outcome in found.items():
        problems = outcome.facts.problems if outcome.facts else ()
        if outcome.status != "ok":
            which = f"{candidate.schedule} {knobs.describe(candidate.knobs)}"
            failed.setdefault(f"{outcome.status}: {outcome.message}", []).append(which)
        elif problems and candidate not in known.defaults:
            pruned["; ".join(problems)] += 1
        else:
            kept.append(candidate)
    kept.sort(key=lambda c: (c not in known.defaults, -scores[c]))
    measured = round(len(known) * len(kept) / len(found)) if found else len(known)
    measured = min(measured, settings.trials or measured)
    first = tuple(_ranked(c, found[c], scores[c]) for c in kept[:SHOWN])
    verified = sum(o.status == "ok" for o in found.values())
    return Plan(
        case, len(known), len(found), verified, dict(pruned), failed, first, measured, 0.0, 0
    )


def _ranked(candidate: Candidate, outcome: Outcome, score: float) -> Ranked:
    text = candidate.schedule, knobs.describe(candidate.knobs), outcome.status
    if outcome.facts is None:
        return Ranked(*text)
    main = max(outcome.facts.kernels, key=lambda k: k.resources.registers * k.threads)
    shared = main.resources.shared_bytes + main.dynamic_shared
    known = round(score, 3) if score < math.inf else None
    return Ranked(*text, known, main.resources.registers, shared, round(main.occupancy.share, 3))


class _Pace:
    """How long things take in a real run: what was measured here, and of a GPU what is assumed."""

    def __init__(self, device: Device, ahead: Ahead, builds: Sequence[float], cases: int) -> None:
        self._gpu, self._builders = device.kind == "gpu", ahead.count
        measured = builds if self._gpu else ahead.seconds  # a CPU's check is that of a real run
        self._build = statistics.median(measured) if measured else 0.0
        self.start = statistics.median(ahead.starts) if ahead.starts else 0.0
        # The first candidate of a case waits for the inputs, and for what is true of them.
        excess = 0.0 if self._gpu else sum(measured) - len(measured) * self._build
        self.once = max(0.0, excess) / max(1, cases)
        self.again = (DEVICE_SECONDS if self._gpu else self._build) + TRIAL_SECONDS
        rest = (
            "a quiet machine; as much for each of a final's, which are measured for up to"
            f" {times.MOST_FINAL:.0f} s; {self.start:.1f} s for the start"
        )
        if self._gpu:
            made = (
                f"{self._build:.2f} s to build one, as here, by {self._builders} processes,"
                " whichever is longer"
            )
            self.assumption = (
                f"{self.again:.2f} s of the GPU for a candidate (assumed, not measured), or {made};"
                f" {rest}"
            )
        else:
            made = (
                f"{self._build:.2f} s to build and check a candidate, as here, {TRIAL_SECONDS:.2f}"
                " s to time it"
            )
            self.assumption = f"{made}, {self.once:.1f} s for the inputs of a case; {rest}"

    def reckoned(self, plans: Sequence[Plan], settings: Settings, cases: int) -> list[Plan]:
        """The plans of the first of so many cases, with their times. In a run with a budget each
        case has its share of what is left; those that come when it is over have nothing.
        """
        left, made = None if settings.seconds is None else settings.seconds - self.start, []
        for index, plan in enumerate(plans):
            refused = sum(plan.pruned.values()) + sum(map(len, plan.failed.values()))
            share = 1 - refused / plan.built if plan.built else 1.0
            to_build = plan.measured / max(share, 0.1)
            each = (
                max(self.again, self._build * to_build / max(plan.measured, 1) / self._builders)
                if self._gpu
                else self.again
            )
            seconds = (
                self.once + times.reckoned(None, each, self.again, plan.measured)[1]
                if plan.measured
                else 0.0
            )
            within = plan.measured
            if left is not None and plan.measured:
                within, took = times.reckoned(
                    max(0.0, left / (cases - index) - self.once), each, self.again, plan.measured
                )
                if index and left < 2 * self.again + times.SHORT_FINAL:
                    within, took = 0, 0.0
                left -= took + self.once
            made.append(msgspec.structs.replace(plan, seconds=round(seconds, 1), within=within))
        return made
