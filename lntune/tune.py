"""The tuning loop: for each case, search; then measure the finalists again; every result in the log at once."""

from __future__ import annotations

import datetime
import math
import random
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lntune import device as device_module
from lntune import knobs, ops, paths, records, schedule, search, toolchain
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, LogError, ScheduleError, ToolchainError, got_expected
from lntune.records import Record, Timing
from lntune.schedule import Schedule
from lntune.search import Budget, Space
from lntune.trial import Candidate, Job, Outcome
from lntune.worker import Worker

FINALISTS = 3
TRIAL_SECONDS = 0.04
TRIAL_TIMEOUT = 30.0
FINAL_SHARE = 0.3
"""Part of a case's time kept for measuring the finalists again."""


@dataclass(frozen=True)
class Settings:
    """What a user may choose. `seconds` and `trials` bound the whole run and each case's search; None is no bound."""

    search: str = "local"
    schedules: tuple[str, ...] = ()
    seconds: float | None = 60.0
    trials: int | None = None
    seed: int = 0
    log_dir: Path | None = None
    threads: int | None = None
    timeout: float = TRIAL_TIMEOUT


@dataclass
class Progress:
    """What is known at a moment of the run; handed to the observer after every measurement."""

    case: Case
    index: int
    cases: int
    trials: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    best_us: float = math.inf
    best: str = ""
    eager_us: float | None = None
    phase: str = "search"
    deadline: float | None = None
    """When the whole run's budget ends, on time.monotonic's clock."""
    final: Record | None = None


Observer = Callable[[Progress], None]


@dataclass
class Summary:
    """What a run did: the finals it wrote, trials by status, seconds, and whether it was interrupted."""

    finals: list[Record] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    interrupted: bool = False
    untuned: dict[str, str] = field(default_factory=dict)
    log_dir: Path = Path()

    @property
    def trials(self) -> int:
        """Candidates tried, whatever came of them."""
        return sum(self.statuses.values())


class _Run:
    """One tuning run: what all its records share."""

    def __init__(self, settings: Settings, worker: Worker, observer: Observer, summary: Summary) -> None:
        import torch

        self.settings, self.worker, self.observer, self.summary = settings, worker, observer, summary
        self.device: Device = device_module.current()
        self.threads = settings.threads or torch.get_num_threads()
        self.folder = settings.log_dir or paths.log_dir()
        self.id = uuid.uuid4().hex[:12]
        summary.log_dir = self.folder

    def log(self, **fields: Any) -> Record:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        record = Record(device=self.device, threads=self.threads, versions=toolchain.versions(), run=self.id, time=now, **fields)
        records.append(self.folder, record)
        return record

    def candidates(self, case: Case) -> tuple[list[Candidate], list[Candidate]]:
        """(the default knobs of each chosen schedule, all other candidates)."""
        defaults: list[Candidate] = []
        rest: list[Candidate] = []
        for plan in _plans(self.settings, case, self.device):
            default, space = _space(plan, case, self.device)
            defaults += [Candidate.of(plan.name, k) for k in space if k == default]
            rest += [Candidate.of(plan.name, k) for k in space if k != default]
        return defaults, rest

    def attempt(self, case: Case, finalists: Sequence[Candidate], default: Candidate | None, share: float) -> Outcome:
        """Measure finalists against each other in `share` seconds; not logged."""
        job = Job(case, self.device, tuple(finalists), share, final=True, seed=self.settings.seed + 1, default=default)
        return self.worker.run(job, self.settings.timeout + 4 * share)

    def record(self, case: Case, candidate: Candidate, outcome: Outcome, role: str = "trial") -> Record:
        """Log what came of a candidate."""
        return self.log(
            role=role,
            case=case,
            schedule=candidate.schedule,
            source=schedule.get(candidate.schedule).source,
            knobs=candidate.knobs,
            status=outcome.status,
            message=outcome.message,
            timings=outcome.timings,
            errors=outcome.errors,
            versus_eager=outcome.versus_eager,
            busy=outcome.busy,
        )

    def tune(self, case: Case, progress: Progress, seconds: float | None) -> Record | None:
        """Search one case and settle its winner; None when no candidate survived."""
        defaults, rest = self.candidates(case)
        known = dict.fromkeys([*defaults, *rest])
        if not known:
            self.summary.untuned[str(case)] = "no schedule has valid knobs for it"
            return None
        costs: dict[Candidate, float] = {}
        budget = Budget(None if seconds is None else seconds * (1 - FINAL_SHARE), self.settings.trials)

        def evaluate(candidate: Candidate) -> float:
            outcome = self.worker.run(Job(case, self.device, (candidate,), TRIAL_SECONDS, seed=self.settings.seed), self.settings.timeout)
            budget.count()
            self.record(case, candidate, outcome)
            cost = outcome.timings["tuned"].median_us if outcome.status == "ok" else math.inf
            costs[candidate] = cost
            self.summary.statuses[outcome.status] += 1
            progress.trials += 1
            if outcome.status != "ok":
                progress.failures[outcome.status] += 1
            if cost < progress.best_us:
                progress.best_us, progress.best = cost, f"{candidate.schedule} {knobs.describe(candidate.knobs)}"
            self.observer(progress)
            return cost

        def neighbours(candidate: Candidate) -> list[Candidate]:
            plan = schedule.get(candidate.schedule)
            steps = knobs.neighbours(knobs.from_dict(plan.knobs, candidate.knobs))
            others = [c for c in defaults if c.schedule != candidate.schedule]  # another schedule is one step away, too
            return [c for c in (*(Candidate.of(plan.name, k) for k in steps), *others) if c in known]

        try:
            search.get(self.settings.search)(Space(tuple(known), neighbours), evaluate, budget, random.Random(self.settings.seed))
        except KeyboardInterrupt:
            self.summary.interrupted = True
        proven = next((c for c in defaults if costs.get(c, math.inf) < math.inf), None)
        return self.settle(case, costs, proven, progress, seconds)

    def settle(
        self, case: Case, costs: dict[Candidate, float], default: Candidate | None, progress: Progress, seconds: float | None
    ) -> Record | None:
        """Measure the best candidates again, on fresh samples against eager and the default knobs, and log the winner.

        The default knobs are among them. When the measurement fails, each finalist is measured alone to find those that it
        fails with, which are logged.
        """
        finalists = sorted((c for c, cost in costs.items() if cost < math.inf), key=lambda c: costs[c])[:FINALISTS]
        if default is not None and default not in finalists:
            finalists.append(default)  # no case is tuned to something slower than what it had
        progress.phase = "final"
        self.observer(progress)
        share = 1.0 if seconds is None else min(2.0, max(0.3, seconds * FINAL_SHARE * 0.6))
        while finalists:
            outcome = self.attempt(case, finalists, default, share)
            if outcome.status == "ok":
                return self._winner(case, finalists, outcome, progress)
            alone = {c: self.attempt(case, [c], None, share / len(finalists)) for c in finalists}
            for candidate, failed in alone.items():
                if failed.status != "ok":
                    self.record(case, candidate, failed, role="final")
            sound = [c for c in finalists if alone[c].status == "ok"]
            if len(sound) == 1 or (sound == finalists and default is None):  # the best; or each works, but not together
                return self._winner(case, sound[:1], alone[sound[0]], progress)
            finalists, default = sound, None
        self.summary.untuned[str(case)] = "no candidate was built, right and in time"
        return None

    def _winner(self, case: Case, finalists: Sequence[Candidate], outcome: Outcome, progress: Progress) -> Record:
        best = int(outcome.message)
        winner = finalists[best]
        timings: dict[str, Timing] = {"tuned": outcome.timings[str(best)]}
        timings |= {name: t for name, t in outcome.timings.items() if not name.isdigit()}
        record = self.record(case, winner, msgspec.structs.replace(outcome, message="", timings=timings), role="final")
        self.summary.finals.append(record)
        progress.phase, progress.final, progress.eager_us = "done", record, record.median("eager")
        self.observer(progress)
        return record


def _plans(settings: Settings, case: Case, device: Device) -> list[Schedule]:
    """The schedules to tune for a case."""
    plans = schedule.for_op(case.op, device.kind)
    if settings.schedules:
        plans = {name: schedule.get(name, case.op) for name in settings.schedules}
    return list(plans.values())


def _space(plan: Schedule, case: Case, device: Device) -> tuple[Any, list[Any]]:
    """(default knobs, all valid knobs) of a schedule, which may be a user's and raise anything."""
    try:
        return plan.default(case, device), plan.space(case, device)
    except Exception as e:
        raise ScheduleError(f"{plan.path}: default() or valid() of {plan.name!r} failed on {case}: {type(e).__name__}: {e}") from e


def check_settings(settings: Settings, cases: Sequence[Case]) -> None:
    """Complain about everything wrong before the first second is spent.

    Raises:
        InputError, UnknownNameError, ScheduleError, BuildError, LogError.
    """
    if not cases:
        raise InputError("no cases to tune: give at least one hidden size, dtype and row count.")
    for name, value in (("budget", settings.seconds), ("trials", settings.trials), ("timeout", settings.timeout)):
        if value is not None and not value > 0:
            raise InputError(got_expected(name, value, "more than 0"))
    search.get(settings.search)
    device = device_module.current()
    for case in cases:
        ops.get(case.op).check_variant(case.variant)
        if case.rows < 1:
            raise InputError(got_expected("rows", case.rows, "1 or more", "An empty batch needs no kernel."))
        for name in settings.schedules:
            if schedule.get(name, case.op).kind != device.kind:
                raise ScheduleError(f"schedule {name!r} is not for this device, a {device.kind}.")
        for plan in _plans(settings, case, device):
            _space(plan, case, device)
    toolchain.compiler()
    if problems := toolchain.incompatible():
        raise ToolchainError("; ".join(problems) + ".")
    folder = (settings.log_dir or paths.log_dir()) / device.slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise LogError(f"cannot write tuning logs to {folder}: {e.strerror or e}. Choose a writable folder with --log-dir or LNTUNE_LOG_DIR.") from e


def tune(cases: Sequence[Case], settings: Settings | None = None, observer: Observer = lambda _: None) -> Summary:
    """Tune the cases in order and return what was found; the log has it already.

    Time is shared evenly among the cases that are left, so what one case does not use goes to the others. An interrupt
    (Ctrl-C) ends the search, still settles the case it was in, and returns.

    Raises:
        InputError, UnknownNameError, ScheduleError, ToolchainError: before anything is run.
        LogError: the log cannot be written; what was measured before is in it.
        BuildError: the worker process does not start.
    """
    settings = settings or Settings()
    check_settings(settings, cases)
    start = time.monotonic()
    summary = Summary()
    try:
        with Worker(settings.threads) as worker:
            run = _Run(settings, worker, observer, summary)
            worker.start()  # not on the budget of the first case
            begun = time.monotonic()
            for index, case in enumerate(cases):
                left = None if settings.seconds is None else settings.seconds - (time.monotonic() - begun)
                if left is not None and left <= 0:
                    summary.untuned[str(case)] = "the time was over"
                    continue
                progress = Progress(case, index, len(cases), deadline=None if left is None else time.monotonic() + left)
                observer(progress)
                run.tune(case, progress, None if left is None else left / (len(cases) - index))
                if summary.interrupted:
                    break
    except KeyboardInterrupt:  # not in a search, or a second one
        summary.interrupted = True
    summary.seconds = time.monotonic() - start
    return summary
