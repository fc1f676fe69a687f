"""How the time of a tuning run is divided between trying candidates and measuring the best of them
again: what either takes is learned as the run goes on.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from lntune.tune import finals

TRIAL_SECONDS = 0.04
FINAL_SHARE = 0.3
"""Part of a case's time kept for measuring the finalists again."""
LEAST_FINAL, MOST_FINAL, FINAL_WITHOUT_LIMIT = 0.3, 2.0, 1.0
"""Seconds of measuring in a final that has the time it wants; where time is short it is
SHORT_FINAL.
"""
SHORT_FINAL = 0.1
BESIDE_SHARE = 1 / 3
"""What a final takes besides to measure with the other cache, as a share of its measuring."""
TRAINING_SECONDS, TRAINING_CALLS = 0.3, 72
"""Seconds for which steps of training are timed behind the final of a backward, and what they take
at least, in calls of the backward alone: a dozen of either contender, three times as long.
"""
HEAT_SHARE, LEAST_HEAT, MOST_HEAT = 0.15, 0.06, 0.4
"""Part of the time kept for the final that is spent on racing before it, and seconds of that."""
HEAT_CALLS = 200
"""Calls of all together in a race at least."""
OTHERS = 2
"""Contenders of a final beside candidates: eager and a copy."""
CALLS = 30
"""Calls of each contender in a final at least: nine rounds of a sample and of a call before it, and
those that find out how many calls a sample has.
"""
BYTE_SECONDS = 13e-9
"""What a trial and a final with one candidate take for each byte that a call moves, most of it to
make inputs and to check: measured on two cores of an EPYC (family 25 model 1), 134 MB a call.
"""
SEARCHED = 5.0
"""Seconds with which a case of a CPU has dozens of trials, where a trial is not yet known."""
WORTH = 12
"""Trials that a case has before another one is begun: with fewer, mostly default knobs would be
measured, which serve a case without any.
"""
NOTHING_LEFT = 0.7
"""The part of a budget that the start of the process which measures may take at most."""
LITTLE = 10.0
"""Seconds of a budget below which hardly anything is tuned."""


class Times:
    """What trials and finals of a run have taken, in seconds."""

    def __init__(self) -> None:
        self._trials: deque[float] = deque(maxlen=8)
        self._longer = 1.0
        self.training = False
        """Whether steps of training are timed behind the final of the case."""
        self.listing = 0.0
        """What it took to list the candidates of the last case."""
        self.bytes = 0.0
        """What a call of the last case moves at least."""

    def tried(self, seconds: float) -> None:
        """A trial took so long."""
        self._trials.append(seconds)

    def finished(self, expected: float, seconds: float) -> None:
        """A final that was expected to take so long took so long; what is expected of the next ones
        follows.
        """
        if expected > 0:
            self._longer = min(3.0, max(0.5, self._longer * seconds / expected))

    @property
    def trial(self) -> float:
        """What the next trial takes: as long as most of the last ones; 0 before the first."""
        return statistics.median(self._trials) if self._trials else 0.0

    @property
    def building(self) -> float:
        """What it takes to build and check a candidate."""
        return max(0.0, self.trial - TRIAL_SECONDS)

    def fixed(self, contenders: int, best_us: float) -> float:
        """What a final with so many candidates takes beside measuring: each is built and checked
        once more; or the calls it makes in any case, where these take longer than measuring would.
        """
        built = contenders * self.building
        called = CALLS * (contenders + OTHERS) * best_us * 1e-6 if math.isfinite(best_us) else 0.0
        return self._longer * (built + called)

    def final(self, contenders: int, best_us: float) -> float:
        """What a final with so many candidates takes at least, and what comes behind it."""
        return self.fixed(contenders, best_us) + SHORT_FINAL + self.steps(best_us)

    def steps(self, best_us: float) -> float:
        """What timing steps of training takes: two kernels are built for it. 0 where that is not
        done.
        """
        if not self.training:
            return 0.0
        called = TRAINING_CALLS * best_us * 1e-6 if math.isfinite(best_us) else 0.0
        return 2 * self.building + max(TRAINING_SECONDS, called)

    def least(self, moved: float) -> float:
        """What a case of which a call moves so many bytes takes at least: its candidates, one
        trial, and a final with one of them. Of a larger case than the last one more.
        """
        larger = max(0.0, moved - self.bytes) * BYTE_SECONDS
        return self.listing + self.trial + self.final(1, math.inf) + larger

    def share(self, remaining: float, cases: int, moved: float, trials: int | None = None) -> float:
        """The seconds of a case of which a call moves so many bytes, where so many cases are left
        and so much time: as much as every other one, or what WORTH trials of it take; `trials` are
        those that it may have at most.
        """
        if not self._trials:
            return shared(remaining, cases, SEARCHED)
        return shared(remaining, cases, worth(self.least(moved), self.trial, self.building, trials))


def worth(least: float, trial: float, building: float, trials: int | None) -> float:
    """Seconds of a case with WORTH trials, or as many as it may have at most, of what it takes with
    one, a trial takes, and building and checking a candidate of the final.
    """
    more = min(WORTH, WORTH if trials is None else trials) - 1
    return least + more * trial + min(more, finals.FASTEST - 1) * building


def shared(remaining: float, cases: int, worth: float) -> float:
    """Seconds of a case: as many as for every other one of so many that are left, or what a search
    is worth, where there is so much.
    """
    return max(0.0, min(remaining, max(remaining / cases, worth)))


def final_seconds(
    reserved: float | None, remaining: float | None, fixed: float
) -> tuple[float, float]:
    """(seconds of measuring in a final, but for BESIDE_SHARE, seconds to measure it again where
    other work disturbs it); `reserved` is the time that a case keeps for its final, `remaining`
    what there is of it, None where there is no limit.
    """
    if reserved is None or remaining is None:
        return FINAL_WITHOUT_LIMIT, 2 * FINAL_WITHOUT_LIMIT
    available = remaining - fixed
    whole = 1 + BESIDE_SHARE
    seconds = max(SHORT_FINAL, min(MOST_FINAL, max(LEAST_FINAL, 0.6 * reserved), available / whole))
    return seconds, max(0.0, min(reserved, available) - whole * seconds)


def heat_seconds(reserved: float | None, spare: float | None, best_us: float) -> float:
    """Seconds of racing before a final, 0 where there is no time for it; `spare` is what there is
    beyond what the final takes at least, None where there is no limit.
    """
    seconds = MOST_HEAT
    if reserved is not None and spare is not None:
        seconds = min(MOST_HEAT, HEAT_SHARE * reserved, spare)
    enough = seconds >= LEAST_HEAT and HEAT_CALLS * best_us * 1e-6 <= seconds
    return seconds if enough else 0.0


def estimate(
    seconds: float | None,
    trial_seconds: float,
    finalist_seconds: float,
    candidates: int,
    schedules: int = 1,
    training: bool = False,
) -> tuple[int, float]:
    """(trials, seconds) of a case that has so many seconds (None: no limit) and so many candidates
    of so many schedules: as many trials as leave time for the final, one at least. A trial takes
    `trial_seconds`, a candidate of the final `finalist_seconds`, beside measuring; `training`:
    steps of training are timed behind it.
    """
    times = Times()
    times.training = training
    times.tried(finalist_seconds)

    def final(trials: int) -> tuple[int, float]:
        """(candidates of the final, what it takes at least)."""
        return (count := finals.most(trials, schedules)), times.final(count, math.inf)

    trials = candidates
    if seconds is not None:
        trials = 1
        while (
            trials < candidates
            and (trials + 1) * trial_seconds + max(seconds * FINAL_SHARE, final(trials)[1])
            < seconds
        ):
            trials += 1
    fixed = times.fixed(final(trials)[0] if trials > 1 else 1, math.inf)
    steps = times.steps(math.inf)
    remaining = None if seconds is None else seconds - trials * trial_seconds - steps
    measuring, _ = final_seconds(
        None if seconds is None else seconds * FINAL_SHARE, remaining, fixed
    )
    return trials, trials * trial_seconds + fixed + measuring * (1 + BESIDE_SHARE) + steps


def too_short(seconds: float, started: float) -> list[str]:
    """What is said of a budget of which next to nothing is left when the first trial begins, and of
    one below LITTLE; nothing of others.
    """
    if started >= NOTHING_LEFT * seconds:
        least = math.ceil(2 * started + 5)
        return [
            f"the budget of {seconds:.1f} s is too short: to start the process that measures took"
            f" {started:.1f} s of it; {least} s or more are of use"
        ]
    if seconds < LITTLE:
        return [
            f"the budget of {seconds:.1f} s is short: in less than {LITTLE:.0f} s hardly anything"
            " is tried, and what is found is measured briefly"
        ]
    return []
