"""How time is measured: on a clock of the tests' own, so that nothing here depends on the
machine.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lntune import certainty, timing
from lntune.log.records import Timing


class Clock:
    """Stands still but for what contenders take; `calls` is the order in which they were called."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def contender(self, name: str, seconds: float | Callable[[], float]) -> Callable[[], None]:
        """A function that takes `seconds`, a number or what a function gives."""

        def run() -> None:
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that `timing` reads."""
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_every_round_has_every_contender_once(clock: Clock) -> None:
    """Each contender gives one sample a round, and the order changes from round to round."""
    names = {"a", "b", "c", "d"}
    order: list[str] = []

    def noting(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.now += 1e-3

        return run

    measured = timing.measure({name: noting(name) for name in names}, seconds=0.0, rounds=20)
    assert {name: len(t.samples_us) for name, t in measured.timings.items()} == dict.fromkeys(
        names, 20
    )
    # 1 ms is longer than a sample has to be: one untimed call and one timed, side by side, for each
    # contender and round.
    sampled = order[-2 * 4 * 20 :]
    assert sampled[::2] == sampled[1::2]
    rounds = [tuple(sampled[i : i + 8 : 2]) for i in range(0, len(sampled), 8)]
    assert all(set(r) == names for r in rounds)
    assert len(set(rounds)) > 10


def test_the_order_depends_on_the_seed_alone(clock: Clock) -> None:
    """The same seed gives the same order, another seed another."""

    def order(seed: int) -> list[str]:
        clock.calls.clear()
        timing.measure(
            {name: clock.contender(name, 1e-3) for name in "abcde"}, 0.0, rounds=10, seed=seed
        )
        return list(clock.calls)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_samples_are_times_per_call(clock: Clock) -> None:
    """A sample is the time of one call in microseconds, however many calls it is made of; the
    median is over the samples.
    """
    noise = random.Random(0)
    measured = timing.measure(
        {
            "fast": clock.contender("fast", 2e-6),
            "slow": clock.contender("slow", 5e-3),
            "varying": clock.contender("varying", lambda: noise.choice((1e-3, 2e-3, 9e-3))),
        },
        seconds=0.0,
        rounds=9,
    ).timings
    assert measured["fast"].samples_us == pytest.approx([2.0] * 9, rel=1e-3)
    assert measured["slow"].samples_us == pytest.approx([5000.0] * 9)
    assert {round(v) for v in measured["varying"].samples_us} == {1000, 2000, 9000}
    for t in measured.values():
        assert t.median_us == pytest.approx(statistics.median(t.samples_us))


@pytest.mark.parametrize("seconds", [1e-9, 1e-7, 1e-6, 3e-5, 2e-4, 1.0])
def test_a_sample_is_long_against_the_clock(clock: Clock, seconds: float) -> None:
    """Short functions are called until a sample takes about SAMPLE_SECONDS, or often enough; a long
    one once.
    """
    each = timing._seconds(clock.contender("f", seconds))
    calls = timing._calls_per_sample({"f": each})["f"]
    assert calls >= min(4096, timing.SAMPLE_SECONDS / seconds / 2)
    assert calls == 1 or calls * seconds <= 2.01 * timing.SAMPLE_SECONDS


@pytest.mark.parametrize("disturbed", [(1,), (2,), (5,), (1, 2), (4, 9), (1, 3, 5, 7)])
def test_a_turn_of_the_scheduler_is_no_long_call(clock: Clock, disturbed: tuple[int, ...]) -> None:
    """Some calls that wait while it is found out how long a call takes change nothing."""
    made = iter(range(1_000_000))

    def waiting() -> float:
        return 8e-3 if next(made) in disturbed else 1e-5

    assert timing._seconds(clock.contender("f", waiting)) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("seconds", "groups"),
    [
        ({"a": 1e-5, "b": 1.4e-5}, [{"a", "b"}]),
        ({"a": 1e-5, "b": 1.6e-5}, [{"a"}, {"b"}]),
        ({"b": 1.45e-5, "a": 1e-5, "eager": 3e-5, "copy": 2e-5}, [{"a", "b"}, {"eager", "copy"}]),
        ({"a": 1.0, "b": 1e-9}, [{"a"}, {"b"}]),
    ],
)
def test_contenders_that_are_alike_have_samples_alike(
    seconds: dict[str, float], groups: list[set[str]]
) -> None:
    """Their samples have the same number of calls; those of others have as many as make them as
    long.
    """
    counts = timing._calls_per_sample(seconds)
    found = {count: {n for n, c in counts.items() if c == count} for count in counts.values()}
    assert sorted(found.values(), key=sorted) == sorted(groups, key=sorted)


def test_measuring_stops_when_the_time_is_over(clock: Clock) -> None:
    """Rounds go on until the time is over, and there are never fewer than asked for."""
    contenders = {"a": clock.contender("a", 0.01), "b": clock.contender("b", 0.03)}
    long = timing.measure(contenders, seconds=2.0).timings
    assert len(long["a"].samples_us) == len(long["b"].samples_us) == 25  # 2 x (10 + 30) ms a round
    short = timing.measure(contenders, seconds=0.0, rounds=3).timings
    assert len(short["a"].samples_us) == len(short["b"].samples_us) == 3


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_is_left_as_it_was(clock: Clock, enabled: bool, fails: bool) -> None:
    """The garbage collector is off while samples are taken and afterwards as before, also when a
    contender raises.
    """
    states: list[bool] = []

    def contender() -> None:
        # longer than a sample: one call warms up, three find that out, the others are samples
        clock.now += 1e-3
        states.append(gc.isenabled())
        if fails and len(states) == 5:
            raise RuntimeError("broken")

    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                timing.measure({"f": contender}, 0.0, rounds=5)
        else:
            timing.measure({"f": contender}, 0.0, rounds=5)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert not any(states[4:])


@pytest.mark.parametrize(
    ("others", "busy"), [(None, None), (0.0, False), (0.14, False), (0.16, True), (1.0, True)]
)
def test_busy(monkeypatch: pytest.MonkeyPatch, others: float | None, busy: bool | None) -> None:
    """A measurement is marked busy when others used more than BUSY_SHARE of the machine, and
    neither so nor quiet when that is not known.
    """
    monkeypatch.setattr(timing, "Contention", lambda: SimpleNamespace(share=lambda: others))
    measured = timing.measure({"f": lambda: None}, 0.0, rounds=1)
    assert (measured.others, measured.busy) == (others, busy)


@pytest.mark.parametrize("others", [None, 0.0])
def test_what_the_samples_show_counts_whatever_the_load(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, others: float | None
) -> None:
    """Calls that mostly wait for a turn of the scheduler are a disturbed measurement, also where
    nobody is seen to use the machine.
    """
    monkeypatch.setattr(timing, "Contention", lambda: SimpleNamespace(share=lambda: others))
    noise = random.Random(0)
    waiting = timing.measure(
        {"f": clock.contender("f", lambda: noise.choice((5e-6, 7.993e-3, 7.993e-3)))},
        0.0,
        rounds=20,
    )
    assert waiting.busy is True
    steady = timing.measure(
        {"f": clock.contender("f", lambda: noise.uniform(1e-3, 2e-3))}, 0.0, rounds=20
    )
    assert steady.busy is (None if others is None else False)


@pytest.mark.parametrize(
    ("now", "share"),
    [
        ((110.0, 30.0, 5.0), 0.0),  # this process did all the work
        ((120.0, 20.0, 5.0), 0.5),  # 20 s busy, of which 10 are ours, in 5 s on 4 cores
        ((105.0, 30.0, 5.0), 0.0),  # the two clocks do not agree; never below 0
        ((900.0, 10.0, 5.0), 1.0),  # never above 1
        ((100.0, 10.0, 0.1), None),  # too short for a clock that ticks every 10 ms
        (None, None),  # /proc went away
    ],
)
def test_contention(monkeypatch: pytest.MonkeyPatch, now: Any, share: float | None) -> None:
    """The share of others is the time all cores were busy, less this process's own, over the time
    there was.
    """
    readings = [(100.0, 10.0, 0.0), now]
    if now is not None and now[1] == 30.0:
        readings[0] = (100.0, 20.0, 0.0)
    monkeypatch.setattr(timing.Contention, "_read", staticmethod(lambda: readings.pop(0)))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    contention = timing.Contention()
    assert contention.share() == (None if share is None else pytest.approx(share))


def test_contention_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not say what others do, nothing is made up."""

    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert timing.Contention().share() is None


def test_ratio_pairs_the_rounds() -> None:
    """The ratio is the median over rounds of what was measured in the same round, so a drift of the
    machine cancels; without samples it is the ratio of the medians.
    """
    slow = Timing((10.0, 20.0, 40.0, 80.0, 160.0), 40.0)
    fast = Timing((5.0, 10.0, 20.0, 40.0, 10.0), 10.0)
    assert timing.ratio(slow, fast) == 2.0  # the medians alone would say 4
    assert timing.ratio(Timing((), 9.0), Timing((), 3.0)) == 3.0
    assert timing.ratio(fast, fast) == 1.0


def raced(clock: Clock, us: Callable[[], float], best_us: float | None) -> Timing:
    """A candidate's samples, whose calls take what `us` says in microseconds, in a race of 40
    ms.
    """
    contender = clock.contender("f", lambda: us() * 1e-6)
    enough = timing.race(0.04, best_us)
    return timing.measure({"f": contender}, 0.04, enough=enough).timings["f"]


@pytest.mark.parametrize(
    ("us", "seconds"), [(900.0, 0.08), (1000.0, 0.08), (1029.0, 0.08), (1040.0, 0.04), (1140, 0.04)]
)
def test_the_promising_get_more_samples(clock: Clock, us: float, seconds: float) -> None:
    """A candidate that may be the best is measured twice as long as one that is some per cent
    behind; the first of all, which has nobody to beat, as long as any.
    """
    assert len(raced(clock, lambda: us, 1000.0).samples_us) == pytest.approx(
        seconds / (2e-6 * us), abs=1
    )
    assert len(raced(clock, lambda: us, None).samples_us) == pytest.approx(
        0.04 / (2e-6 * us), abs=1
    )


def test_who_is_far_behind_gets_few_samples(clock: Clock) -> None:
    """A candidate that takes 1.3 times what the best one does, or more, is told by five samples."""
    noise = random.Random(0)
    for factor in (1.3, 2.0, 50.0):
        counts = [
            len(raced(clock, lambda f=factor: 1000 * f * noise.gauss(1, 0.02), 1000.0).samples_us)
            for _ in range(50)
        ]
        assert statistics.mean(counts) <= 5.2


def test_the_best_is_not_lost_in_a_race(clock: Clock) -> None:
    """Of 300 candidates that are the best, measured while the machine is up to 10 % slower than it
    was for the one before, samples scatter by 3 % and every fifth call is interrupted, none is
    given up after the five samples that tell who is far behind.
    """
    noise = random.Random(1)
    for _ in range(300):
        moment = noise.uniform(1, 1.1)
        taken = raced(
            clock,
            lambda m=moment: 1000 * m * noise.gauss(1, 0.03) * (4 if noise.random() < 0.2 else 1),
            1000.0,
        )
        assert len(taken.samples_us) > 5


@pytest.mark.parametrize(
    ("scatter", "least", "most"), [(0.001, 1.0, 1.3), (0.08, 1.2, 3.9), (0.4, 4.0, 4.1)]
)
def test_ratios_are_measured_until_they_are_precise(
    clock: Clock, scatter: float, least: float, most: float
) -> None:
    """The more samples scatter the longer, up to a limit; a copy's scatter does not count."""
    draw = random.Random(7)

    def around(seconds: float, scatter: float) -> Callable[[], float]:
        return lambda: seconds * draw.lognormvariate(0, scatter)

    contenders = {
        "a": clock.contender("a", around(4e-4, scatter)),
        "b": clock.contender("b", around(4.1e-4, scatter)),
        "copy": clock.contender("copy", around(3e-4, 0.3)),
    }
    begun = clock.now
    enough = timing.precise(1.0, 4.0, ["a", "b", "not measured"])
    timings = timing.measure(contenders, 1.0, enough=enough).timings
    assert least <= clock.now - begun <= most
    error = certainty.paired(timings["a"].samples_us, timings["b"].samples_us).error
    assert (error <= 1.2 * timing.PRECISE) == (most < 4.0)
