"""What a tuning run does for one case: candidates are tried until its time is over, and the best of
them measured once more, against each other and against what they are to replace. All of it is in
the log at once.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from lntune import backends, knobs, ops, schedule, search
from lntune.case import Case
from lntune.errors import BuildError
from lntune.kernels.candidate_facts import Facts
from lntune.log import pace, select
from lntune.log.records import Record
from lntune.measure import training
from lntune.measure.jobs import Candidate, Final, Heat, Outcome, Training, Try
from lntune.measure.worker import Worker
from lntune.report.failures import Failures, sentence
from lntune.search import Budget, Evaluate, Space, in_hand
from lntune.system import interrupts
from lntune.tune import finals, nearby, proposals, ranking, times
from lntune.tune.ahead import Ahead
from lntune.tune.beside import Beside
from lntune.tune.candidates import Candidates
from lntune.tune.journal import Journal
from lntune.tune.settings import Settings
from lntune.tune.settling import Settling
from lntune.tune.state import Observer, Progress, Summary
from lntune.tune.times import TRIAL_SECONDS, Times

FIRST_PART = 0.9
"""Of a budget, where there are knobs that are tried last: what is left is theirs."""
LATE_SECONDS = 5.0
"""What a trial may take where the run's time is over, before it is cut short."""


class _TimeOver(Exception):
    """The run's time was over while a trial was under way."""


class Run:
    """A tuning run, which goes on from case to case."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        observer: Observer,
        summary: Summary,
        ahead: Ahead | None,
        beside: Beside | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.settings, self.worker, self.ahead = settings, worker, ahead
        self.beside = beside
        self.observer, self.summary = observer, summary
        self.device = settings.target
        self.proposer = proposals.Proposer(1)
        self.journal = journal or Journal(settings)
        self.times = Times()
        self.end = math.inf
        """When the run's time is over, on time.monotonic's clock."""
        self._candidates: dict[Case, Candidates] = {}
        self._best_us: dict[Case, float] = {}
        self._references: dict[Case, Candidate | None] = {}
        self._unit_us: dict[Case, float] = {}
        """What the default knobs take, at whose pace all of a case's trials are compared."""

    def candidates(self, case: Case) -> Candidates:
        """What there is to try. Kept for the next case, which is begun early: to list thousands
        takes a while.
        """
        if case not in self._candidates:
            self._candidates = dict([*self._candidates.items()][-1:])
            self._candidates[case] = Candidates(
                case, self.device, self.settings.schedules, self.settings.knobs
            )
        return self._candidates[case]

    def begin(self, case: Case, following: Case | None) -> None:
        """Have the candidates of a case built from now on, and then the first of the following
        one's, where there is building ahead.
        """
        if self.ahead:
            self.ahead.begin(
                case,
                self.untried(case),
                (following, self.untried(following)) if following else None,
            )

    def untried(self, case: Case) -> list[Candidate]:
        """The candidates of which earlier runs have not told everything."""
        tried = self.journal.tried(case)
        return [c for c in self.candidates(case) if c not in tried]

    def untuned(self, case: Case) -> Candidate | None:
        """What serves the case where nothing is tuned, whichever schedules are tuned; None where
        eager mode does.
        """
        default = select.untuned(
            case.typical, self.device, schedule.for_op(case.op, self.device.kind)
        )
        return Candidate.of(default.schedule, default.setting) if default.schedule else None

    def refusal(self, case: Case, candidate: Candidate, is_default: bool) -> Outcome | None:
        """Why a candidate that was built ahead is not measured, as what is logged of it; None when
        it is, or there is no building ahead.

        Default knobs are measured whatever is known of them: they serve calls where nothing is
        tuned, and some case may have nothing better.
        """
        if self.ahead is None:
            return None
        built = self.ahead.outcome(case, candidate)
        problems = built.facts.problems if built.facts else ()
        if built.status == "ok" and problems and not is_default:
            return Outcome("invalid", "; ".join(problems))
        return None if built.status == "ok" else built

    def facts(self, case: Case, candidate: Candidate) -> Facts | None:
        """What building a candidate ahead has told of it; None where nothing is built ahead."""
        return self.ahead.outcome(case, candidate).facts if self.ahead else None

    def counted(self, case: Case, candidate: Candidate, outcome: Outcome) -> Outcome:
        """What came of a candidate that works, with the instructions of its kernels and of its
        rivals', where building ahead has told them.
        """

        def instructions(of: Candidate) -> float | None:
            facts = self.facts(case, of)
            return None if facts is None else facts.instructions(case)

        rivals = tuple(
            msgspec.structs.replace(r, instructions=instructions(Candidate.of_rival(r)))
            for r in outcome.rivals
        )
        return msgspec.structs.replace(outcome, instructions=instructions(candidate), rivals=rivals)

    def tune(
        self, case: Case, progress: Progress, seconds: float | None, following: Case | None = None
    ) -> Record | None:
        """Search one case and settle its winner; None when no candidate survived. `following` is
        the case that comes after it.
        """
        start = time.monotonic()
        candidates = self.candidates(case)
        self.times.listing = time.monotonic() - start
        self.times.bytes = ops.get(case.op).bytes(case)
        if not candidates:
            self.summary.untuned[str(case)] = "no schedule has valid knobs for it"
            return None
        self.begin(case, following)
        self.times.training = training.is_timed(case, self.device)
        end = None if seconds is None else start + seconds
        seconds = None if seconds is None else max(0.0, seconds - self.times.listing)
        failures = Failures()
        costs = self.known(case, candidates, failures, progress)
        try:
            self.search(case, candidates, costs, failures, progress, seconds)
        except _TimeOver:
            pass
        except KeyboardInterrupt:
            self.interrupt()
        default = self.untuned(case)
        if default is not None and costs.get(default, 0.0) == math.inf:
            default = None  # it does not work
        settling = Settling(self, case, default, progress)
        try:
            final = settling.settle(costs, end, seconds)
        except KeyboardInterrupt:
            if self.summary.interrupted:
                raise  # the second one ends the run at once
            self.interrupt()
            if self.summary.finals and self.summary.finals[-1].case == case:
                return self.summary.finals[-1]
            best = dict(sorted(costs.items(), key=lambda tried: tried[1])[:1])
            final = settling.settle(best, end, seconds)
        if final is None and self.summary.interrupted and not costs:
            self.summary.untuned[str(case)] = "interrupted before its first trial was over"
        elif final is None:
            reasons = "; ".join(sentence(reason) for reason in failures.reasons()[:1])
            self.summary.untuned[str(case)] = "no candidate was built, right and in time" + (
                f" ({reasons})" if reasons else ""
            )
        return final

    def known(
        self, case: Case, candidates: Candidates, failures: Failures, progress: Progress
    ) -> dict[Candidate, float]:
        """What candidates cost that earlier runs have tried, in microseconds, infinite for what
        failed then.
        """
        costs: dict[Candidate, float] = {}
        tried = self.journal.tried(case)
        reference = self.reference(case)
        own = tried.get(reference) if reference else None
        if own is not None and own.status == "ok":
            self._unit_us[case] = own.timings[pace.TRIED].median_us
        for candidate, record in tried.items():
            if candidate in candidates:
                costs[candidate] = self.cost(case, record)
                self.summary.earlier[record.status] += 1
                if record.status != "ok":
                    failures.add(record.status, record.message)
                _note_best(progress, candidate, costs[candidate])
        progress.earlier = len(costs)
        if costs:
            self.observer(progress)
        return costs

    def search(
        self,
        case: Case,
        candidates: Candidates,
        costs: dict[Candidate, float],
        failures: Failures,
        progress: Progress,
        seconds: float | None,
    ) -> None:
        """Try candidates until the time or the trials are over; what each costs, in microseconds,
        and why it failed is noted at once. Those that have `costs` already come for nothing: the
        search goes the way that earlier runs went, and on from there.
        """
        earlier = dict(costs)

        def reserve() -> float:
            """What is to be left when the next trial begins: time for it and for the final. A case
            that is begun gets one trial at least.
            """
            if not progress.trials or seconds is None:
                return -math.inf
            schedules = len({c.schedule for c in costs})
            count = finals.most(len(costs), schedules)
            final = self.times.final(count, progress.best_us)
            return max(seconds * times.FINAL_SHARE, final) + self.times.trial

        budget = Budget(seconds, self.settings.trials, reserve=reserve)

        def evaluate(candidate: Candidate) -> float:
            if candidate in earlier:
                return earlier[candidate]
            outcome = self.outcome(case, candidate, candidate in candidates.defaults, budget)
            cost = self.cost(case, outcome)
            if self.ahead and cost < math.inf:
                outcome = self.counted(case, candidate, outcome)
            with interrupts.held():
                beside = self.reference(case) if pace.BESIDE in outcome.timings else None
                self.journal.record(case, candidate, outcome, default=beside)
                costs[candidate] = cost
                self.summary.statuses[outcome.status] += 1
                progress.trials += 1
                if outcome.status != "ok":
                    progress.failures[outcome.status] += 1
                    failures.add(outcome.status, outcome.message)
                    self.summary.failures.add(outcome.status, outcome.message)
                if (facts := self.facts(case, candidate)) is not None and cost < math.inf:
                    self.summary.pairs.append(
                        ranking.pair(facts, case, candidate, self.device, cost)
                    )
                _note_best(progress, candidate, cost)
            self.observer(progress)
            return cost

        space = self.space(case, candidates, earlier)
        defaults = [c.resolved(case.op)[1] for c in candidates.defaults]
        whole = FIRST_PART if any(any(knobs.refined(k)) for k in defaults) else 1.0
        budget.part = whole * candidates.listed_share
        search.get(self.settings.strategy)(
            space, evaluate, budget, random.Random(self.settings.seed)
        )
        self.forget()
        self.proposed(case, candidates, evaluate, budget, costs, whole)
        budget.part = 1.0
        working = [c for c in costs if costs[c] < math.inf]
        best = min(working, key=lambda c: costs[c], default=None)
        refined = candidates.refined(best) if best else []
        if self.ahead:
            self.ahead.also(case, [c for c in refined if c not in earlier])
        untried = dict.fromkeys(refined)
        in_hand.search(space, evaluate, budget, untried, lambda _: [next(iter(untried))])
        self.forget()
        winner = self.journal.previous_winner(case)
        if winner is not None and winner in candidates and winner not in costs:
            evaluate(winner)  # no case is tuned to something slower than what it had
        if earlier and not progress.trials and all(c in earlier for c in candidates):
            self.summary.exhausted += 1

    def space(self, case: Case, candidates: Candidates, known: Mapping[Candidate, float]) -> Space:
        """The candidates as a search sees them, where those `known` take no time."""
        space = candidates.as_space(nearby.winners(self.journal.finals(case.op), case, candidates))
        if self.beside:
            begin = functools.partial(_begin, self.beside, case, known)
            space = replace(space, at_once=self.beside.count, begin=begin)
        if self.ahead:
            space = replace(space, choose=functools.partial(_choose, self.ahead, case, known))
        return space

    def proposed(
        self,
        case: Case,
        candidates: Candidates,
        evaluate: Evaluate,
        budget: Budget,
        costs: Mapping[Candidate, float],
        whole: float,
    ) -> None:
        """Try what schedules propose that do not list their knobs, each for an equal part of what
        is left of the `whole` of the budget.
        """
        for number, proposing in enumerate(candidates.proposing):
            left = whole - budget.fraction
            budget.part = whole - left * (1 - 1 / (len(candidates.proposing) - number))
            course = proposals.Course(
                self.proposer, case, self.device, proposing.name, self.settings.seed
            )
            try:
                course.search(evaluate, budget, dict(costs))
            finally:
                self.summary.notes.append(f"{case}: {course}")

    def outcome(
        self, case: Case, candidate: Candidate, is_default: bool, budget: Budget
    ) -> Outcome:
        """What comes of a candidate, which is counted where it takes time of the device.

        Raises:
            BuildError: the machine can build none any more.
        """
        outcome = self.refusal(case, candidate, is_default)
        if outcome is None:
            outcome = self.trial(case, candidate)
            budget.count()
        if outcome.blameless:
            raise BuildError(f"nothing can be built any more: {outcome.message}")
        return outcome

    def trial(self, case: Case, candidate: Candidate) -> Outcome:
        """Build, check and time a candidate; not logged."""
        # of this run: since an earlier one the machine may have changed
        best_us = self._best_us.get(case)
        reference, unit_us = self.reference(case), self._unit_us.get(case)
        job = Try(case, self.device, candidate, TRIAL_SECONDS, self.settings.seed, best_us)
        if unit_us is not None and candidate != reference:
            job = msgspec.structs.replace(job, reference=reference, unit_us=unit_us)
        start = time.monotonic()
        allowed = min(self.settings.timeout, max(LATE_SECONDS, self.end - start))
        if self.beside:
            outcome, seconds = self.beside.tried(job, allowed)
        else:
            outcome = self.worker.run(job, allowed)
            seconds = time.monotonic() - start
        cut = allowed < self.settings.timeout
        if outcome is None or (cut and outcome.status == "timeout"):
            raise _TimeOver  # which is not the candidate's fault, so it is not logged
        self.times.tried(seconds)
        if candidate == reference and outcome.status == "ok":
            self._unit_us.setdefault(case, outcome.timings[pace.TRIED].median_us)
        if (cost := self.cost(case, outcome)) < math.inf:
            self._best_us[case] = min(cost, self._best_us.get(case, math.inf))
        return outcome

    def cost(self, case: Case, tried: Outcome | Record) -> float:
        """The microseconds that a candidate took, at the pace of all; infinite where it failed."""
        if tried.status != "ok":
            return math.inf
        return pace.at(self._unit_us.get(case), tried.timings)

    def reference(self, case: Case) -> Candidate | None:
        """What the trials of a case are timed beside, once it has been tried: the default knobs,
        which serve it where nothing is tuned. None on GPUs, whose clocks are watched.
        """
        if backends.of(self.device).builds_ahead:
            return None
        if case not in self._references:
            self._references = {case: self.untuned(case)}
        return self._references[case]

    def measure(self, job: Heat | Final | Training, timeout: float) -> Outcome:
        """What comes of a job that measures, with nothing else going on."""
        return self.beside.run(job, timeout) if self.beside else self.worker.run(job, timeout)

    def forget(self) -> None:
        """The candidates that are in hand are not tried."""
        if self.beside:
            self.beside.forget()

    def interrupt(self) -> None:
        """From now on what was found is settled, as fast as can be, and nothing else is begun."""
        self.summary.interrupted = True
        if self.ahead:
            self.ahead.close()


def _note_best(progress: Progress, candidate: Candidate, cost: float) -> None:
    """Note a candidate that is better than all before."""
    if cost < progress.best_us:
        progress.best_us = cost
        progress.best = f"{candidate.schedule} {knobs.describe(candidate.knobs)}"


def _begin(
    beside: Beside, case: Case, known: Mapping[Candidate, float], candidate: Candidate
) -> None:
    """Prepare a candidate, unless it need not be tried."""
    if candidate not in known:
        beside.begin(case, candidate)


def _choose(
    ahead: Ahead,
    case: Case,
    known: Mapping[Candidate, float],
    preferred: Sequence[Candidate],
    others: Sequence[Candidate],
) -> Candidate:
    """What a search tries next: something known, for which nothing is built, else what is ready."""
    free = next((c for c in (*preferred, *others) if c in known), None)
    return free or ahead.choose(case, preferred, others)
