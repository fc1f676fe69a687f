"""How calls are timed by the CPU's clock (GPUs are timed by their own, in backends/cuda/timing.py).

Contenders are interleaved: every round times each of them once, in a new random order, after one
untimed call, so a machine that changes its speed changes it for all, and nobody always follows the
most cache-hungry. A sample is as many calls as make it long against the clock; what is reported is
the median over rounds, with all samples kept. The garbage collector is off. Nothing is flushed: on
a CPU the input of a layer has just been written by the layer before.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lntune import certainty
from lntune.log import disturbance
from lntune.log.records import Timing
from lntune.system.surroundings import SHORTEST, Notice, Surroundings

SAMPLE_SECONDS, MOST_CALLS = 3e-4, 4096
"""How long a sample is to be, and of how many calls it is at most."""
TURN_SECONDS = 0.02
"""A call that takes longer than this does so itself: no turn of a scheduler is as long."""
ALIKE = 1.5
"""How many times as long as the quickest of them contenders take whose samples have the same number
of calls.
"""
BUSY_SHARE = 0.15
"""Share of the machine's cores that others may use before a measurement is marked busy."""

BEHIND = 1.15
"""A candidate whose quickest sample takes so many times the best one's median is not the best, nor
was the machine merely slow for a moment.
"""
CLOSE, MORE_SECONDS = 1.03, 2
"""Whose median is within this of the best one's gets so many times as long."""
PRECISE = 0.0045
"""The standard error of a ratio with which a difference of 3 % is found to be more than 1 % in nine
of ten comparisons of a dozen cases at once.
"""
LOOKS = 4
"""How often in its time a measurement is looked at for how precise it is: seldom, for it costs
milliseconds.
"""
ATTEMPTS = 3
"""How often something is measured, at most, until others leave the machine alone."""


class Measured(msgspec.Struct, frozen=True):
    """Timings by contender; `others` is the share of all cores that other processes (or the
    hypervisor) used meanwhile, None where the system does not say or the time was too short; `busy`
    when that is too much to trust or the samples themselves show a disturbance, None when neither
    can be said; `noticed` is what the system told, in words. Of a GPU also `clocks`, in MHz before,
    in and after the measurement, and the contenders that were not recorded as a graph though they
    are short, `uncaptured`.
    """

    timings: dict[str, Timing]
    others: float | None
    busy: bool | None
    clocks: tuple[int, ...] = ()
    uncaptured: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()


class Contention:
    """Measures how much of the machine others use between its creation and `share()`."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """(seconds all cores were busy or stolen, CPU seconds of this process, wall clock), None
        off Linux.
        """
        try:
            ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        mine = os.times()
        return (
            (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
            mine.user + mine.system,
            time.monotonic(),
        )

    def share(self) -> float | None:
        """Share of all cores used by others, 0..1; None where unknown or the interval is too short
        to say.
        """
        now = self._read()
        if now is None or self._start is None or now[2] - self._start[2] < 0.2:  # noqa: PLR2004 (ticks are 10 ms)
            return None
        busy, mine, wall = (a - b for a, b in zip(now, self._start, strict=True))
        return min(1.0, max(0.0, (busy - mine) / (wall * (os.cpu_count() or 1))))


def disturbed(
    timings: Mapping[str, Timing], others: float | None, notices: Sequence[Notice] = ()
) -> bool | None:
    """Whether timings cannot be trusted, given the share of the device that others used, where that
    is known, and what the system told; None when nothing is known.
    """
    if (others is not None and others > BUSY_SHARE) or any(n.disturbs for n in notices):
        return True
    shown = disturbance.why(
        {name: t.samples_us for name, t in timings.items()},
        {name: t.median_us for name, t in timings.items()},
    )
    return True if shown else None if others is None else False


def _timed(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _seconds(function: Callable[[], Any]) -> float:
    """What a call takes, by the quickest of few samples: one that waits for a turn of the scheduler
    is not a long one. The calls made to find out warm the contender up.
    """
    calls = 1
    while True:
        elapsed = _timed(function, calls)
        for _ in range(2):
            if elapsed >= SAMPLE_SECONDS and (calls > 1 or elapsed < TURN_SECONDS):
                elapsed = min(elapsed, _timed(function, calls))
        if elapsed >= SAMPLE_SECONDS or calls >= MOST_CALLS:
            return elapsed / calls
        calls = min(MOST_CALLS, max(calls * 2, int(calls * SAMPLE_SECONDS / max(elapsed, 1e-9))))


def _calls_per_sample(seconds: Mapping[str, float]) -> dict[str, int]:
    """How many calls make a sample of each contender, by the seconds of a call. Those that take
    ALIKE times have the same number: the first calls of a sample are slower than the later ones,
    and a long sample is more often disturbed, which would be taken for a difference of kernels.
    """
    counts: dict[str, int] = {}
    quickest = 0.0
    for name in sorted(seconds, key=lambda name: seconds[name]):
        if not counts or seconds[name] > ALIKE * quickest:
            quickest = seconds[name]
        counts[name] = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(quickest, 1e-9))))
    return counts


Enough = Callable[[Mapping[str, Sequence[float]], float], bool]
"""Takes the samples so far by contender, and the seconds that they took; says whether to end."""


def within(seconds: float) -> Enough:
    """Samples for so many seconds."""
    return lambda _, passed: passed >= seconds


def race(seconds: float, best_us: float | None, unit_us: float | None = None) -> Enough:
    """Samples of one contender among many that are measured one after another, of which the best so
    far takes `best_us` (None: there is none): few of one that is far behind, whose quickest sample
    says so, and MORE_SECONDS times as long as `seconds` of one that may be the best. Where a second
    contender is timed beside it, which takes `unit_us` at the pace of `best_us`, that pace counts.
    """
    if best_us is None:
        return within(seconds)

    def enough(samples: Mapping[str, Sequence[float]], passed: float) -> bool:
        taken, *beside = samples.values()
        slower = statistics.median(beside[0]) / unit_us if beside and unit_us else 1.0
        if min(taken) > BEHIND * best_us * slower:
            return True
        if passed < seconds:
            return False
        behind = statistics.median(taken) > CLOSE * best_us * slower
        return behind or passed >= MORE_SECONDS * seconds

    return enough


def precise(seconds: float, most_seconds: float, names: Sequence[str]) -> Enough:
    """Samples for so many seconds, and on until the ratios of those named to the quickest of them
    have a standard error of PRECISE at most, or `most_seconds` are over. What the ratios are
    decides nothing, so that none is favoured by when it ends.
    """
    looked = 0.0

    def enough(samples: Mapping[str, Sequence[float]], passed: float) -> bool:
        nonlocal looked
        if passed < seconds or passed - looked < seconds / LOOKS:
            return False
        looked = passed
        if passed >= most_seconds:
            return True
        here = sorted(
            (name for name in names if name in samples), key=lambda n: statistics.median(samples[n])
        )
        return all(
            certainty.paired(samples[here[0]], samples[name]).error <= PRECISE for name in here[1:]
        )

    return enough


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float,
    rounds: int = 5,
    seed: int = 0,
    enough: Enough | None = None,
) -> Measured:
    """Time the contenders for about `seconds` in all, at least `rounds` rounds; after these until
    `enough` says so, where that is given.
    """
    enough = enough or within(seconds)
    order = random.Random(seed)
    names = list(contenders)
    each = {}
    for name in names:
        contenders[name]()  # the first call may load, build or fault pages in
        each[name] = _seconds(contenders[name])
    calls = _calls_per_sample(each)
    samples: dict[str, list[float]] = {name: [] for name in names}
    contention, surroundings = Contention(), Surroundings() if seconds >= SHORTEST else None
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < rounds or not enough(samples, time.perf_counter() - start):
            order.shuffle(names)
            for name in names:
                function, count = contenders[name], calls[name]
                function()
                samples[name].append(_timed(function, count) / count * 1e6)
            done += 1
    finally:
        if collecting:
            gc.enable()
    others = contention.share()
    timings = {
        name: Timing(tuple(round(v, 4) for v in values), round(statistics.median(values), 4))
        for name, values in samples.items()
    }
    notices = surroundings.noticed() if surroundings else []
    busy = disturbed(timings, others, notices)
    return Measured(timings, others, busy, noticed=tuple(n.text for n in notices))


def quietest(
    measure_once: Callable[[], Measured], attempts: int = ATTEMPTS, seconds: float = math.inf
) -> Measured:
    """Measure until nothing disturbs it, at most `attempts` times and as often as `seconds` allow;
    the least disturbed measurement.
    """
    begun = time.monotonic()
    best = measure_once()
    each = time.monotonic() - begun
    for _ in range(attempts - 1):
        if not best.busy or time.monotonic() - begun + each > seconds:
            break
        best = min(best, measure_once(), key=_disturbance)
    return best


def _disturbance(m: Measured) -> tuple[bool, float, float]:
    """How much a measurement was disturbed, to compare with others of the same contenders: what
    waits takes longer.
    """
    return (
        bool(m.busy),
        math.inf if m.others is None else m.others,
        sum(t.median_us for t in m.timings.values()),
    )


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the ratios of samples taken in the same
    round.
    """
    pairs = list(zip(slow.samples_us, fast.samples_us, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else slow.median_us / fast.median_us


def pairwise(slow: Timing | None, fast: Timing | None) -> float | None:
    """How many times faster `fast` is: the median over rounds of the ratio within a round, which a
    drifting clock leaves alone; the ratio of medians where the rounds do not match.
    """
    if slow is None or fast is None or not fast.median_us:
        return None
    same_rounds = len(slow.samples_us) == len(fast.samples_us)
    return ratio(slow, fast) if same_rounds else slow.median_us / fast.median_us
