"""Trials of a machine that becomes faster and slower: what counts is how many times as long as the
default knobs a candidate takes, in the same rounds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_worker import FakeWorker, Job, always_ok, cost_of, fake, finals, settings, took, tried

from lntune import device, schedule, timing, tune
from lntune.case import Case
from lntune.log import pace, records
from lntune.log.records import Timing
from lntune.measure import trial
from lntune.measure.jobs import Candidate, Outcome, Try
from lntune.measure.kept import Kept

__all__ = ["fake"]

CASE = Case("layer_norm", 64, "float32", 8)
HERE = device.current()
PLAN = next(iter(schedule.for_op("layer_norm", "cpu").values()))
DEFAULT = Candidate.of(PLAN.name, PLAN.untuned(CASE, HERE))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A log of the test's own, and a process that has tried nothing yet."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(trial, "_kept", Kept())
    monkeypatch.setattr(trial, "_reference", {})
    trial._inputs.cache_clear()
    yield
    trial._inputs.cache_clear()


def test_what_counts() -> None:
    """A trial's microseconds are those of a machine on which the default knobs take so many; where
    they were not timed beside it, or nobody knows what they take, those that it took.
    """
    slow = {"tuned": Timing((), 30.0), "default": Timing((), 60.0)}
    assert pace.at(40.0, slow) == 20.0
    assert pace.at(None, slow) == 30.0
    assert pace.at(40.0, {"tuned": slow["tuned"]}) == 30.0
    assert pace.at(40.0, {"tuned": slow["tuned"], "default": Timing((), 0.0)}) == 30.0


def test_a_trial_times_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of the default knobs is timed alone. Others are timed beside them, as many samples of
    both; the kernel is that of the trial before, else built once.
    """
    built: list[Candidate] = []
    kernel = trial._kernel

    def noting(case: Case, of: Any, candidate: Candidate, checked: bool = True) -> Any:
        built.append(candidate)
        return kernel(case, of, candidate, checked)

    monkeypatch.setattr(trial, "_kernel", noting)
    others = [Candidate.of(PLAN.name, s) for s in PLAN.space(CASE, HERE)]
    one, two = [c for c in others if c != DEFAULT][:2]
    assert set(trial.run(Try(CASE, HERE, DEFAULT, 0.002)).timings) == {"tuned"}
    for fresh in (False, True):
        if fresh:  # another worker, which has not tried them
            trial._reference.clear()
            monkeypatch.setattr(trial, "_kept", Kept())
        built.clear()
        for candidate in (one, two):
            job = Try(CASE, HERE, candidate, 0.002, reference=DEFAULT, unit_us=1.0)
            timings = trial.run(job).timings
            assert set(timings) == {"tuned", "default"}
            assert len({len(t.samples_us) for t in timings.values()}) == 1
        assert built == ([one, DEFAULT, two] if fresh else [one, two])


def test_a_reference_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is timed alone, and building is tried once."""
    kernel, asked = trial._kernel, []

    def failing(case: Case, of: Any, candidate: Candidate, checked: bool = True) -> Any:
        if candidate == DEFAULT:
            asked.append(candidate)
            return Outcome("compile", "no")
        return kernel(case, of, candidate, checked)

    monkeypatch.setattr(trial, "_kernel", failing)
    other = next(c for s in PLAN.space(CASE, HERE) if (c := Candidate.of(PLAN.name, s)) != DEFAULT)
    for _ in range(2):
        outcome = trial.run(Try(CASE, HERE, other, 0.002, reference=DEFAULT, unit_us=1.0))
        assert outcome.status == "ok" and set(outcome.timings) == {"tuned"}
    assert len(asked) == 1


@pytest.mark.parametrize("slower", [0.5, 1.0, 1.5])
def test_a_race_goes_by_the_pace(slower: float) -> None:
    """Whether a candidate is far behind the best is decided at the pace of the best's time: on a
    machine that is half as fast now the best is not given up, nor, on one twice as fast, is one
    that is far behind measured for long.
    """
    enough = timing.race(0.04, best_us=100.0, unit_us=120.0)
    beside = [120.0 * slower] * 5
    best, behind = ({"tuned": [us * slower] * 5, "default": beside} for us in (100.0, 130.0))
    assert not enough(best, 0.01) and enough(behind, 0.01)
    assert not enough(best, 0.05) and enough(best, 0.09)


def drifting(draw: Callable[[], float]) -> Callable[[Job], Outcome]:
    """Answers of a machine that is another time as fast at each trial, by a factor that is drawn:
    what is tried, and what is timed beside it, take as many times longer.
    """

    def answer(job: Job) -> Outcome:
        if not isinstance(job, Try):
            return always_ok(job)
        slower = draw()
        timings = {"tuned": took(slower * cost_of(job.candidate))}
        if job.reference is not None:
            timings["default"] = took(slower * cost_of(job.reference))
        return Outcome("ok", "", timings, {"y": 0.5}, {"y": 1.0})

    return answer


def test_the_best_reaches_the_final(fake: type[FakeWorker], tmp_path: Path) -> None:
    """On a machine whose speed changes by half between trials the order of candidates is that of a
    quiet one, so that the best of them is in the final. What the log has of them says it again, to
    a run that goes on from it.
    """
    noise = random.Random(3)
    fake.answer = staticmethod(drifting(lambda: noise.uniform(0.5, 1.5)))
    tune.tune([CASE], settings("cached_rows", trials=40))
    assert tried(fake)[0] == DEFAULT
    best = min(tried(fake), key=cost_of)
    assert finals(fake)[0].candidates[0] == best
    trials = [r for r in records.read([tmp_path / "log"], "layer_norm") if r.role == "trial"]
    unit_us = trials[0].timings["tuned"].median_us
    assert all(
        Candidate(r.default.schedule, tuple(r.default.knobs.items())) == DEFAULT
        for r in trials[1:]
        if r.default
    )
    costs = [pace.at(unit_us, r.timings) for r in trials]
    factor = statistics.median(c / cost_of(t) for c, t in zip(costs, tried(fake), strict=True))
    assert costs == pytest.approx([factor * cost_of(t) for t in tried(fake)])
    before = len(tried(fake))
    tune.tune([CASE], settings("cached_rows", trials=1))
    assert len(tried(fake)) == before + 1
    assert best in finals(fake)[-1].candidates
