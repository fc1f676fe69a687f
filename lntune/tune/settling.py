"""The end of a case: the best candidates are measured once more, against each other and against
what they are to replace, and the winner is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lntune.case import Case
from lntune.log.decision import Decision
from lntune.log.records import Record
from lntune.measure import training
from lntune.measure.jobs import Candidate, Final, Heat, Outcome, Training
from lntune.system import interrupts
from lntune.tune import decide, finals, times
from lntune.tune.state import Progress

if TYPE_CHECKING:
    from lntune.tune.run import Run


class Settling:
    """The end of one case of a run. `default` serves the case where nothing is tuned; None where it
    does not work.
    """

    def __init__(self, run: Run, case: Case, default: Candidate | None, progress: Progress) -> None:
        self._run, self._case, self._progress = run, case, progress
        self._default = default

    def settle(
        self, costs: dict[Candidate, float], end: float | None, seconds: float | None
    ) -> Record | None:
        """Measure the best candidates again, the best of each schedule among them, on fresh samples
        against eager and what served the case until now, and log the winner.

        The case has `seconds`, until `end`; no limit where None. When the measurement fails, each
        finalist is measured alone to find those that it fails with, which are logged. Interrupted
        runs have short finals. None when no candidate is left.
        """
        run, case, default = self._run, self._case, self._default
        start = time.monotonic()
        self._progress.phase = "final"
        run.observer(self._progress)
        best_us = min(costs.values(), default=math.inf)
        reserved = None if seconds is None else seconds * times.FINAL_SHARE
        costs = self._raced(costs, reserved, None if end is None else end - start)
        finalists = finals.choose(costs, default, run.journal.previous_winner(case))
        # what is left for the final itself
        steps = run.times.steps(best_us)
        remaining = None if end is None else end - time.monotonic() - steps
        while (
            remaining is not None
            and len(finalists) > 1
            and run.times.final(len(finalists), best_us) - steps > remaining
        ):
            finalists.pop()  # there is no time to build and check so many again
        fixed = run.times.fixed(len(finalists), best_us)
        share, retry = times.final_seconds(reserved, remaining, fixed)
        if run.summary.interrupted:
            share, retry = min(share, times.LEAST_FINAL), 0.0
        begun = time.monotonic()
        while finalists:
            outcome = self._attempt(finalists, default, share, retry)
            if outcome.status == "ok":
                measuring = share * (1 + times.BESIDE_SHARE)
                run.times.finished(fixed, time.monotonic() - begun - measuring)
                return self._winner(finalists, outcome, default)
            alone = {c: self._attempt([c], None, share / len(finalists)) for c in finalists}
            for candidate, failed in alone.items():
                if failed.status != "ok":
                    run.journal.record(case, candidate, failed, role="final")
            sound = [c for c in finalists if alone[c].status == "ok"]
            # the best; or each works, but not together
            if len(sound) == 1 or (sound == finalists and default is None):
                return self._winner(sound[:1], alone[sound[0]])
            finalists, default = sound, None
        return None

    def _raced(
        self, costs: dict[Candidate, float], reserved: float | None, remaining: float | None
    ) -> dict[Candidate, float]:
        """The costs after those that are near the best have raced each other, where there is time
        for it.
        """
        run, entrants = self._run, finals.heat(costs)
        if not entrants or run.summary.interrupted:
            return costs
        best_us = min(costs.values())
        spare = None
        if remaining is not None:
            count = finals.most(len(costs), len({c.schedule for c in costs}))
            spare = remaining - run.times.final(count, best_us)
        if run.beside:
            kept = run.beside.kept(self._case, entrants)
            entrants, built = finals.affordable(
                entrants, kept, run.times.building, math.inf if spare is None else spare
            )
            spare = None if spare is None else spare - built
        if not entrants:
            return costs
        seconds = times.heat_seconds(reserved, spare, best_us)
        if not seconds:
            return costs
        job = Heat(self._case, run.device, tuple(entrants), seconds, run.settings.seed)
        outcome = run.measure(job, run.settings.timeout + 4 * seconds)
        # who fails here fails in the final, which says so
        return finals.raced(costs, entrants, outcome.order) if outcome.status == "ok" else costs

    def _attempt(
        self,
        finalists: Sequence[Candidate],
        default: Candidate | None,
        seconds: float,
        retry_seconds: float = 0.0,
    ) -> Outcome:
        """Measure finalists against each other, see jobs.Final; not logged."""
        run = self._run
        job = Final(
            self._case,
            run.device,
            tuple(finalists),
            seconds,
            retry_seconds,
            seed=run.settings.seed + 1,
            default=default,
            beside_seconds=seconds * times.BESIDE_SHARE,
        )
        return run.measure(job, run.settings.timeout + 5 * seconds + retry_seconds)

    def _winner(
        self, finalists: Sequence[Candidate], outcome: Outcome, default: Candidate | None = None
    ) -> Record:
        """Log the winner of a final."""
        run, case, progress = self._run, self._case, self._progress
        outcome, decision = decide.settle(case, run.device, finalists, outcome, self._default)
        assert outcome.winner is not None
        winner = finalists[outcome.winner]
        outcome, decision = self._trained(winner, outcome, decision)
        if run.ahead:
            outcome = run.counted(case, winner, outcome)
        with interrupts.held():
            default = default if "default" in outcome.timings else None
            record = run.journal.record(case, winner, outcome, "final", default, decision)
            run.summary.finals.append(record)
        progress.phase, progress.final, progress.eager_us = "done", record, record.median("eager")
        run.observer(progress)
        return record

    def _trained(
        self, winner: Candidate, outcome: Outcome, decision: Decision
    ) -> tuple[Outcome, Decision]:
        """What came of a final with what a step of training takes by the winner and what makes its
        forward now; where it cannot be told, the passes are decided each by itself.
        """
        run, case = self._run, self._case
        if not run.times.training or run.summary.interrupted or outcome.busy:
            return outcome, decision
        forward = run.journal.kernel(training.passes(case)[0])
        if forward is None:
            return outcome, decision
        seconds = times.TRAINING_SECONDS
        job = Training(case, run.device, winner, forward, seconds, seconds, run.settings.seed + 2)
        try:
            steps = run.measure(job, run.settings.timeout + 5 * seconds)
        except KeyboardInterrupt:  # the final is worth having
            run.interrupt()
            return outcome, decision
        if steps.status != "ok" or steps.busy:
            why = steps.message or "; ".join(steps.noticed) or "others used the machine"
            run.summary.notes.append(f"{case}: what a step of training takes is not known: {why}")
            return outcome, decision
        return decide.with_training(outcome, decision, steps)
