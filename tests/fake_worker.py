"""A worker that answers a tuning run's jobs by a function, in place of a process, for tests of what
runs try, log and choose.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from lntune.log.records import Rival, Timing
from lntune.measure.jobs import Candidate, Final, Heat, Open, Outcome, Prepare, Training, Try
from lntune.tune import Settings, loop

Job = Try | Final | Training
"""What a run on a CPU asks of its worker."""

Answer = Callable[[Job], Outcome]


class FakeWorker:
    """Answers jobs by `answer` in place of a process; keeps them in `jobs`."""

    jobs: list[Job]
    answer: Answer

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self.pid = 1

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        """Nothing to start."""

    stop = kill = pause = resume = start

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()

    def run(self, job: Job | Open | Heat | Prepare, timeout: float) -> Outcome:
        """What `answer` says; the device is always ready, what is prepared is right, and a race
        ends as it must.
        """
        if isinstance(job, Open | Prepare):
            return Outcome("ok")
        if isinstance(job, Heat):
            places = range(len(job.candidates))
            return Outcome(
                "ok", order=tuple(sorted(places, key=lambda i: cost_of(job.candidates[i])))
            )
        type(self).jobs.append(job)
        return type(self).answer(job)


def tried(fake: type[FakeWorker]) -> list[Candidate]:
    """What was tried, in order."""
    return [job.candidate for job in fake.jobs if isinstance(job, Try)]


def finals(fake: type[FakeWorker]) -> list[Final]:
    """The finals, in order."""
    return [job for job in fake.jobs if isinstance(job, Final)]


def candidates(job: Job) -> tuple[Candidate, ...]:
    """What a job measures, but for the default of a final."""
    return job.candidates if isinstance(job, Final) else (job.candidate,)


def cost_of(candidate: Candidate) -> float:
    """A made-up time in microseconds that depends on the knobs alone."""
    return 10 + sum(
        (i + 1) * len(f"{name}{value}")
        + (len(value) if isinstance(value, str) else int(value)) * (i + 3)
        for i, (name, value) in enumerate(candidate.items)
    )


def always_ok(job: Job) -> Outcome:
    """Everything works."""
    if isinstance(job, Try):
        return Outcome(
            "ok", "", {"tuned": Timing((1.0,), cost_of(job.candidate))}, {"y": 0.5}, {"y": 1.0}
        )
    if isinstance(job, Training):
        steps = {"tuned": took(10.0), "eager": took(20.0)}
        return Outcome("ok", training=steps, forward=job.forward.as_setting)
    costs = [cost_of(c) for c in job.candidates]
    return final_outcome(job, costs.index(min(costs)))


def final_outcome(job: Final, winner: int) -> Outcome:
    """A final that this finalist has won; others take as long as they do, and no less than it."""
    us = cost_of(job.candidates[winner])
    timings = {"tuned": took(us)} | {
        name: took(50.0)
        for name in ("default", "eager", "copy")
        if name != "default" or job.default
    }
    rivals = tuple(
        Rival(c.schedule, c.knobs, took(max(cost_of(c), 1.1 * us)))
        for i, c in enumerate(job.candidates)
        if i != winner
    )
    return Outcome("ok", "", timings, {"y": 0.5}, {"y": 1.0}, winner=winner, rivals=rivals)


def took(us: float) -> Timing:
    """Samples that all are the same."""
    return Timing((us,) * 9, us)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """A worker of the test's own in place of the real one; everything works unless the test says
    otherwise.
    """
    worker = type("Fake", (FakeWorker,), {"jobs": [], "answer": staticmethod(always_ok)})
    monkeypatch.setattr(loop, "Worker", worker)
    return worker


def settings(*schedules: str, **fields: Any) -> Settings:
    """Settings for the schedules named; exhaustive, by one worker and without a time limit unless
    asked otherwise.
    """
    usual = {"search": "exhaustive", "schedules": schedules, "seconds": None, "workers": 1}
    return Settings(**{**usual, **fields})
