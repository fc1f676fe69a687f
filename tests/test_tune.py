"""The tuning loop: what it tries, what it logs, what wins, and how it ends, however it ends."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_worker import (
    FakeWorker,
    Job,
    always_ok,
    candidates,
    cost_of,
    fake,
    final_outcome,
    finals,
    settings,
    took,
    tried,
)
from grids import product
from usable_searches import USABLE

from lntune import device as device_module
from lntune import schedule, search, tune
from lntune.case import Case
from lntune.errors import (
    BuildError,
    InputError,
    LntuneError,
    LogError,
    ScheduleError,
    ToolchainError,
    UnknownNameError,
)
from lntune.log import records
from lntune.log.records import Record, Rival, Timing
from lntune.measure.jobs import Candidate, Final, Open, Outcome, Try
from lntune.system import toolchain
from lntune.tune import Progress, Settings, loop, run, settling, times
from lntune.versions import Code

__all__ = ["fake"]

FAULTY = Path(__file__).parent / "faulty"
CASE = Case("layer_norm", 64, "float32", 8)
OTHER = Case("layer_norm", 100, "bfloat16", 4)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedules of tests/faulty beside the shipped ones, and a log folder of the test's own."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(FAULTY))
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("LNTUNE_TEST_MARKS", str(tmp_path))
    schedule._load.cache_clear()
    yield
    schedule._load.cache_clear()


def logged(tmp_path: Path, role: str = "trial") -> list[Record]:
    """The records of the test's log, by role."""
    return [r for r in records.read([tmp_path / "log"]) if r.role == role]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> float:
    """A time for a run that never ends for want of it, though its finals are as short as they may
    be.
    """
    monkeypatch.setattr(times, "FINAL_SHARE", 1e-4)
    return 600.0


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: float) -> None:
    """Two cases, four trials each: every trial is in the log, and each case has a final that holds
    the winner, the default knobs, eager and a copy with all their samples, errors and everything
    the result depends on.
    """
    monkeypatch.setenv("LNTUNE_SCHEDULES", "")
    seen: list[tuple[str, int, int]] = []
    summary = tune.tune(
        [CASE, OTHER],
        Settings(trials=4, seconds=brief),
        lambda p: seen.append((p.phase, p.index, p.trials)),
    )
    trials, finals = logged(tmp_path), logged(tmp_path, "final")
    assert [t.case for t in trials] == [CASE] * 4 + [OTHER] * 4
    assert [f.case for f in finals] == [CASE, OTHER]
    assert summary.finals == finals
    assert (summary.trials, summary.statuses["ok"], summary.interrupted, summary.untuned) == (
        8,
        8,
        False,
        {},
    )
    assert summary.seconds > 0
    assert summary.log_dir == tmp_path / "log"
    for record in (*trials, *finals):
        assert record.status == "ok"
        assert record.device == device_module.current()
        assert record.versions == toolchain.versions()
        assert record.code == schedule.get(record.schedule).code
        assert record.threads >= 1
        assert record.run == trials[0].run != ""
        assert "T" in record.time
        assert record.time.endswith("+00:00")
        assert set(record.errors) == {"y"}
        assert 0 < record.errors["y"] <= 1
        assert record.versus_eager["y"] > 0
        assert all(t.samples_us and t.median_us > 0 for t in record.timings.values())
        plan = schedule.get(record.schedule)
        assert plan.reason_invalid(plan.knobs(**record.knobs), record.case, record.device) is None
    for default, *others in (trials[:4], trials[4:]):
        assert set(default.timings) == {"tuned"}
        for other in others:
            assert set(other.timings) == {"tuned", "default"} and other.default is not None
            assert (other.default.schedule, other.default.knobs) == (
                default.schedule,
                default.knobs,
            )
    for final in finals:
        assert set(final.timings) == {"tuned", "default", "eager", "copy"}
        # interleaved: one sample each a round
        assert len({len(t.samples_us) for t in final.timings.values()}) == 1
        assert len(final.timings["tuned"].samples_us) >= 9
        measured = [t for t in trials if t.case == final.case]
        others = [(rival.schedule, rival.knobs) for rival in final.rivals]
        for schedule_name, knobs in ((final.schedule, final.knobs), *others):
            assert any((t.schedule, t.knobs) == (schedule_name, knobs) for t in measured)
        assert {final.schedule, *dict(others)} == {t.schedule for t in measured}
    assert [s for s in seen if s[0] == "search"] == [
        ("search", index, n) for index in (0, 1) for n in range(5)
    ]
    assert [s[0] for s in seen if s[1] == 0][-2:] == ["final", "done"]


def test_a_run_among_broken_schedules(tmp_path: Path, brief: float) -> None:
    """Candidates that crash, hang, raise or answer wrongly are logged as what they did, the run
    goes on, and the good one wins, though the wrong one would have been the fastest.
    """
    names = ("aborts", "hangs", "raises", "wrong_but_fast", "plain")
    summary = tune.tune([CASE], settings(*names, trials=len(names), timeout=3.0, seconds=brief))
    expected = {
        "aborts": "run",
        "hangs": "timeout",
        "raises": "compile",
        "wrong_but_fast": "wrong",
        "plain": "ok",
    }
    trials = logged(tmp_path)
    # the default knobs of each schedule come first
    assert {t.schedule: t.status for t in trials} == expected
    assert all(t.message and not t.timings for t in trials if t.status != "ok")
    assert summary.statuses == {"ok": 1, "run": 1, "timeout": 1, "compile": 1, "wrong": 1}
    (final,) = logged(tmp_path, "final")
    assert (final.schedule, final.status) == ("plain", "ok")
    assert set(final.timings) == {"tuned", "default", "eager", "copy"}


def test_a_finalist_that_fails_now(tmp_path: Path, brief: float) -> None:
    """A candidate that worked in its trial and kills the final is found out, logged, and the others
    are measured without it. It is built anew there, since the process that tried it died.
    """
    chosen = settings("fickle", "aborts", "plain", trials=3, timeout=20.0, seconds=brief)
    summary = tune.tune([CASE], chosen)
    assert summary.statuses == {"ok": 2, "run": 1}
    assert {(r.schedule, r.status) for r in logged(tmp_path, "final")} == {
        ("fickle", "run"),
        ("plain", "ok"),
    }
    assert [f.schedule for f in summary.finals] == ["plain"]
    assert [r.schedule for r in records.finals(logged(tmp_path, "final")).values()] == ["plain"]


def test_no_candidate_survives(tmp_path: Path, fake: type[FakeWorker]) -> None:
    """A case without any survivor has no final; the summary says so, and the next case is tuned."""
    fake.answer = staticmethod(
        lambda job: (
            always_ok(job) if job.case == OTHER else Outcome("wrong", "y: off", errors={"y": 3.0})
        )
    )
    summary = tune.tune([CASE, OTHER], settings("plain"))
    assert list(summary.untuned) == [str(CASE)]
    assert [f.case for f in summary.finals] == [OTHER]
    assert {t.status for t in logged(tmp_path) if t.case == CASE} == {"wrong"}


def test_wrong_never_wins(fake: type[FakeWorker]) -> None:
    """Only candidates with status ok reach the final, whatever timings come with the others."""

    def answer(job: Job) -> Outcome:
        if isinstance(job, Final) or job.candidate.schedule == "plain":
            return always_ok(job)
        return Outcome("wrong", "y: off", {"tuned": Timing((0.1,), 0.1)})

    fake.answer = staticmethod(answer)
    (final,) = tune.tune([CASE], settings("wrong", "plain")).finals
    assert final.schedule == "plain"
    assert {c.schedule for job in finals(fake) for c in job.candidates} == {"plain"}


def test_what_a_case_had_competes_again(tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Tuned again, with a search that does not come by it, a case's winner of before is tried and
    in the final; not when its schedule has changed since, when it was another device's, or when the
    search came by it.
    """
    (before,) = tune.tune([CASE], settings("cached_rows")).finals
    fake.jobs.clear()
    tune.tune([CASE], settings("cached_rows", trials=1, again=True))
    assert len(tried(fake)) == 2 and tried(fake)[1].knobs == before.knobs
    assert before.knobs in [c.knobs for c in candidates(fake.jobs[-1])]
    for changes in (
        {"code": Code("of yesterday")},
        {"device": msgspec.structs.replace(before.device, cores=99)},
    ):
        other = tmp_path / str(changes)
        records.append(other, msgspec.structs.replace(before, **changes))
        fake.jobs.clear()
        tune.tune([CASE], settings("cached_rows", trials=1, log_dir=other))
        assert len(tried(fake)) == 1
    fake.jobs.clear()
    tune.tune([CASE], settings("cached_rows", again=True))
    assert [c.knobs for c in tried(fake)].count(before.knobs) == 1


@pytest.mark.parametrize("culprits", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}], ids=str)
def test_the_final_goes_on_without_the_culprits(
    tmp_path: Path, fake: type[FakeWorker], culprits: set[int]
) -> None:
    """Whichever of three finalists makes the final fail, the fastest of the others wins."""
    ranked: list[Candidate] = []

    def answer(job: Job) -> Outcome:
        if isinstance(job, Final) and not ranked:
            ranked.extend(job.candidates)
        if isinstance(job, Final) and any(ranked.index(c) in culprits for c in job.candidates):
            return Outcome("run", "the worker died (SIGSEGV)")
        return always_ok(job)

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE], settings("plain"))
    good = [c for i, c in enumerate(ranked) if i not in culprits]
    assert [f.knobs for f in summary.finals] == [c.knobs for c in sorted(good, key=cost_of)[:1]]
    failed = [r for r in logged(tmp_path, "final") if r.status == "run"]
    assert len(failed) == len(culprits)
    assert bool(summary.untuned) is (not good)


def test_finalists_that_fail_only_together(fake: type[FakeWorker]) -> None:
    """When each finalist works alone but not beside the others (memory, time), the best in the
    search wins.
    """
    fake.answer = staticmethod(
        lambda job: Outcome("timeout", "late") if len(candidates(job)) > 1 else always_ok(job)
    )
    (final,) = tune.tune([CASE], settings("plain")).finals
    assert final.knobs == min(tried(fake), key=cost_of).knobs
    assert "eager" in final.timings


def test_broken_default_knobs_do_not_spoil_the_final(fake: type[FakeWorker]) -> None:
    """Where what serves the case untuned did not work in the search, the final goes without it;
    where only the final shows that, too.
    """
    default = Candidate.of(
        "cached_rows", schedule.get("cached_rows").default(CASE, device_module.current())
    )
    fake.answer = staticmethod(
        lambda job: (
            Outcome("run", "died")
            if default in (*candidates(job), getattr(job, "default", None))
            else always_ok(job)
        )
    )
    for chosen in (("plain", "cached_rows"), ("plain",)):
        fake.jobs.clear()
        (final,) = tune.tune([CASE], settings(*chosen, again=True)).finals
        assert final.status == "ok" and "default" not in final.timings and final.default is None
        assert any(job.default for job in finals(fake)) == (chosen == ("plain",))


@pytest.mark.parametrize("chosen", [("plain",), ("plain", "cached_rows")])
def test_the_default_of_a_final_is_what_serves_untuned(
    chosen: tuple[str, ...], fake: type[FakeWorker]
) -> None:
    """Whichever schedules are tuned and win, the winner is compared with the default knobs of the
    operator's first schedule, and the record says which these are. Unless that schedule is tuned
    they are measured in the final only and cannot win.
    """
    name, plan = next(iter(schedule.for_op("layer_norm", "cpu").items()))
    default = Candidate.of(name, plan.default(CASE, device_module.current()))
    fake.answer = staticmethod(
        lambda job: final_outcome(job, 0) if isinstance(job, Final) else always_ok(job)
    )
    (final,) = tune.tune([CASE], settings(*chosen)).finals
    assert final.schedule == "plain" and final.timings["default"].median_us == 50
    assert final.default == records.Setting(name, default.knobs)
    assert (default in [c for job in fake.jobs for c in candidates(job)]) == (name in chosen)


def test_a_final_has_time_to_be_measured_again(fake: type[FakeWorker]) -> None:
    """What is left of a case's share for its final may be spent where other work disturbs the first
    measurement, and no more.
    """
    tune.tune([CASE], settings("plain", seconds=40.0, trials=3))
    (job,) = finals(fake)
    assert (
        0 < job.seconds <= 2
        and job.retry_seconds > 0
        and job.seconds + job.retry_seconds <= 40.0 * times.FINAL_SHARE
    )
    fake.jobs.clear()
    tune.tune([CASE], settings("plain", seconds=0.5, trials=1, again=True))
    assert [job.retry_seconds for job in finals(fake)] == [0.0]


@pytest.mark.parametrize("name", USABLE)
def test_every_search(name: str, tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Every search starts with the default knobs, tries each candidate at most once, keeps to its
    number of trials, finds the optimum when it may try everything, and reaches every schedule.
    """
    tune.tune([CASE], settings("plain", "cached_rows", search=name, trials=5))
    trials = logged(tmp_path)
    plain = schedule.get("plain")
    assert len(trials) == 5
    assert (
        trials[0].knobs == Candidate.of("plain", plain.default(CASE, device_module.current())).knobs
    )
    fake.jobs.clear()
    (final,) = tune.tune([CASE], settings("plain", "cached_rows", search=name, again=True)).finals
    spaces = [
        Candidate.of(n, k)
        for n in ("plain", "cached_rows")
        for k in schedule.get(n).space(CASE, device_module.current())
    ]
    assert sorted(map(repr, tried(fake))) == sorted(map(repr, spaces))
    assert cost_of(Candidate.of_record(final)) == min(map(cost_of, spaces))


@pytest.mark.parametrize("name", ["random", "local"])
def test_the_seed_decides_what_is_tried(name: str, fake: type[FakeWorker]) -> None:
    """The same seed tries the same candidates in the same order; another seed others."""

    def tried_with(seed: int) -> list[Candidate]:
        fake.jobs.clear()
        tune.tune(
            [Case("layer_norm", 1024, "bfloat16", 512)],
            settings("cached_rows", search=name, trials=12, seed=seed, again=True),
        )
        return tried(fake)

    assert tried_with(1) == tried_with(1)
    assert tried_with(1) != tried_with(2)


@pytest.mark.parametrize("chosen", [("plain",), ("cached_rows",), ("plain", "cached_rows")])
def test_only_the_schedules_asked_for(chosen: tuple[str, ...], fake: type[FakeWorker]) -> None:
    """With schedules named nothing else is tried or can win."""
    tune.tune([CASE], settings(*chosen))
    assert {c.schedule for job in fake.jobs for c in candidates(job)} == set(chosen)


class Clock:
    """A clock that moves when a trial is run."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def rules(self, patch: pytest.MonkeyPatch) -> None:
        """The run goes by this clock."""
        patch.setattr(loop, "time", self)
        patch.setattr(run, "time", self)
        patch.setattr(settling, "time", self)
        patch.setattr(run, "Budget", functools.partial(search.Budget, clock=self.monotonic))


def test_the_time_is_shared_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """The budget is divided among the cases that are left, a part of each is kept for the final,
    what one case leaves goes to the next, and when it is over the rest is named as untuned. By a
    clock that trials move by a second each.
    """
    clock = Clock()
    clock.rules(monkeypatch)
    wide = [Case("layer_norm", h, "float32", 512) for h in (1024, 2048, 4096)]

    def answer(job: Job) -> Outcome:
        clock.now += 1.0 if isinstance(job, Try) else 40.0 if job.case == wide[1] else job.seconds
        return always_ok(job)

    fake.answer = staticmethod(answer)
    # without the shipped logs' winners
    summary = tune.tune(wide, settings("cached_rows", seconds=60.0, log_dir=tmp_path / "log"))
    counts = [sum(job.case == case and isinstance(job, Try) for job in fake.jobs) for case in wide]
    # 60 s / 3 cases, less the final's share of 30 %, and less a trial that would end when that
    # begins
    assert counts[0] == 13
    # half of what is left, which is more: the final took less than was kept for it
    assert counts[1] in (15, 16)
    assert counts[2] == 0  # the second final overran
    assert list(summary.untuned) == [str(wide[2])]
    assert [f.case for f in summary.finals] == wide[:2]


class Slow:
    """A machine on which all takes its time: `start` seconds for the worker, `trial` to build and
    check a candidate, here and in finals.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker], start: float, trial: float
    ) -> None:
        self.clock = Clock()
        self.clock.rules(monkeypatch)

        def started(_: FakeWorker) -> None:
            self.clock.now += start

        def answer(job: Job) -> Outcome:
            self.clock.now += trial * len(candidates(job))
            self.clock.now += job.seconds if isinstance(job, Final) else 0.0
            return always_ok(job)

        monkeypatch.setattr(fake, "start", started)
        fake.answer = staticmethod(answer)


@pytest.mark.parametrize(
    ("trial", "seconds", "cases"), product((0.1, 0.5, 1.0), (8.0, 12.0, 20.0, 60.0), (1, 3))
)
def test_a_budget_is_the_whole_run(
    trial: float,
    seconds: float,
    cases: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake: type[FakeWorker],
) -> None:
    """The start of the worker and every final are in the budget: a run ends in it, or less than a
    trial later, and uses most of it where there is enough to try, however long building and
    checking take.
    """
    slow = Slow(monkeypatch, fake, 4.0, trial)
    wide = [Case("layer_norm", 1024 * (i + 1), "float32", 512) for i in range(cases)]
    summary = tune.tune(wide, settings("cached_rows", seconds=seconds, log_dir=tmp_path / "log"))
    assert summary.finals and summary.finals[0].case == wide[0]
    assert slow.clock.now - 1000 == pytest.approx(summary.seconds)
    assert summary.seconds <= seconds + trial
    assert len(summary.finals) + len(summary.untuned) == cases
    if cases == 1:
        assert summary.seconds >= 0.6 * seconds
    if seconds == 60:
        assert summary.untuned == {} and summary.notes == []


def test_a_budget_too_small_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Where the worker's start takes all of the budget the first case gets a trial and a short
    final, the others nothing, and it is said how long the start took and what budget is of use.
    """
    Slow(monkeypatch, fake, 4.0, 0.2)
    summary = tune.tune([CASE, OTHER], settings("plain", seconds=2.0, log_dir=tmp_path / "log"))
    assert (summary.trials, [f.case for f in summary.finals]) == (1, [CASE])
    assert summary.untuned == {str(OTHER): "the time was over"}
    assert summary.notes == [
        "the budget of 2.0 s is too short: to start the process that measures took 4.0 s of it; 13"
        " s or more are of use"
    ]
    assert [job.seconds for job in finals(fake)] == [0.1]


@pytest.mark.parametrize("seconds", [9.0, 10.0])
def test_a_short_budget(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Of a budget below ten seconds it is said that hardly anything is tried, however fast the
    worker starts.
    """
    Slow(monkeypatch, fake, 1.0, 0.2)
    summary = tune.tune([CASE], settings("plain", seconds=seconds, log_dir=tmp_path / "log"))
    assert [note[:32] for note in summary.notes] == ["the budget of 9.0 s is short: in"] * (
        seconds < 10
    )


def test_a_final_begins_in_time_for_calls_that_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Where a call takes a fifth of a second a final's least number of calls takes many seconds:
    they are kept for it, and finalists are left out for which there is no time.
    """
    clock = Clock()
    clock.rules(monkeypatch)

    def answer(job: Job) -> Outcome:
        calls = 18 * (len(job.candidates) + 2) if isinstance(job, Final) else 5
        clock.now += 0.5 + 0.2 * calls
        outcome = always_ok(job)
        return msgspec.structs.replace(
            outcome, timings={name: Timing((2e5,), 2e5) for name in outcome.timings}
        )

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE], settings("plain", seconds=30.0, log_dir=tmp_path / "log"))
    assert summary.finals and summary.seconds <= 30
    assert len(finals(fake)[0].candidates) < 4


def test_a_trial_that_outlasts_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """A candidate that hangs when the time is nearly over is cut short before its own limit; what
    is not its fault is not logged, the case is settled among the others and the run ends.
    """
    clock, limits = Clock(), []
    clock.rules(monkeypatch)

    def answer(worker: FakeWorker, job: Job, timeout: float) -> Outcome:
        if isinstance(job, Open):
            return Outcome("ok")
        limits.append(timeout)
        fake.jobs.append(job)
        clock.now += 1.0
        if len(limits) == 3:
            clock.now += timeout
            return Outcome("timeout", "no answer")
        return always_ok(job)

    monkeypatch.setattr(fake, "run", answer)
    summary = tune.tune(
        [CASE], settings("plain", seconds=20.0, timeout=30.0, log_dir=tmp_path / "log")
    )
    assert limits[:3] == [20.0, 19.0, 18.0]
    assert summary.statuses == {"ok": 2} and len(logged(tmp_path)) == 2
    assert [f.case for f in summary.finals] == [CASE]


def test_why_candidates_failed_is_reported(fake: type[FakeWorker]) -> None:
    """The commonest reason comes first, in the words of the first candidate that failed so; a case
    without any survivor has it beside its name.
    """
    count = 0

    def answer(job: Job) -> Outcome:
        nonlocal count
        count += 1
        return (
            Outcome("compile", "no header")
            if count == 1
            else Outcome("wrong", f"y: {count}.5 times the tolerance")
        )

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE], settings("plain", trials=4))
    assert [(r.status, r.count, r.message) for r in summary.failures.reasons()] == [
        ("wrong", 3, "y: 2.5 times the tolerance"),
        ("compile", 1, "no header"),
    ]
    assert summary.untuned == {
        str(CASE): "no candidate was built, right and in time (3 wrong: y: 2.5 times the tolerance)"
    }


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_in_a_final(interrupts: int, tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Ctrl-C while finalists are measured: the best one is measured once more, shortly, and is the
    winner, and no other case is begun. A second Ctrl-C ends the run at once, without it.
    """
    came = 0

    def answer(job: Job) -> Outcome:
        nonlocal came
        if isinstance(job, Final) and came < interrupts:
            came += 1
            raise KeyboardInterrupt
        return always_ok(job)

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE, OTHER], settings("plain"))
    assert summary.interrupted and all(job.case == CASE for job in fake.jobs)
    assert summary.finals == logged(tmp_path, "final")
    assert [f.knobs for f in summary.finals] == (
        [min(tried(fake), key=cost_of).knobs] if interrupts == 1 else []
    )
    first, short = finals(fake)
    assert short.seconds < first.seconds
    assert short.candidates == (min(tried(fake), key=cost_of),)


def test_an_interrupt_in_a_case_without_a_trial(fake: type[FakeWorker]) -> None:
    """Ctrl-C in the first trial: the summary says that there is nothing to settle."""

    def answer(_: Job) -> Outcome:
        raise KeyboardInterrupt

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE, OTHER], settings("plain"))
    assert summary.interrupted and summary.finals == []
    assert summary.untuned == {str(CASE): "interrupted before its first trial was over"}


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupt_keeps_what_was_found(at: int, tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Ctrl-C in the search ends it: the trials are in the log, the case is settled among them,
    later cases are left alone.
    """

    def observe(progress: Progress) -> None:
        if progress.phase == "search" and progress.trials == at:
            raise KeyboardInterrupt

    summary = tune.tune([CASE, OTHER], settings("plain"), observe)
    assert summary.interrupted
    assert len(logged(tmp_path)) == at == summary.trials
    (final,) = logged(tmp_path, "final")
    assert (final.case, final.schedule) == (CASE, "plain")
    assert summary.finals == [final]
    assert all(job.case == CASE for job in fake.jobs)


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_while_a_trial_is_logged(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Ctrl-C when a trial is on disk and not noted elsewhere yet waits until it is: log, counts and
    winner agree.
    """
    append, written = records.append, []

    def interrupted(folder: Path, record: Record) -> None:
        append(folder, record)
        written.append(record)
        if len(written) == at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(records, "append", interrupted)
    summary = tune.tune([CASE, OTHER], settings("plain"))
    assert summary.interrupted
    assert len(logged(tmp_path)) == at == summary.trials
    assert summary.finals == logged(tmp_path, "final")
    assert [f.case for f in summary.finals] == [CASE]


def test_an_interrupt_while_the_winner_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Ctrl-C in the moment the winner is written: the run ends with it, and its summary has it as
    the log does.
    """
    append = records.append

    def interrupted(folder: Path, record: Record) -> None:
        append(folder, record)
        if record.role == "final":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(records, "append", interrupted)
    summary = tune.tune([CASE, OTHER], settings("plain"))
    assert summary.interrupted
    assert [f.case for f in logged(tmp_path, "final")] == [CASE]
    assert summary.finals == logged(tmp_path, "final")


@pytest.mark.parametrize("phase", ["first", "final"])
def test_an_interrupt_at_any_other_time(phase: str, tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Ctrl-C before the first trial, or while settling, ends the run in order too, and what was
    logged stays.
    """

    def observe(progress: Progress) -> None:
        if progress.phase == phase or (phase == "first" and not progress.trials):
            raise KeyboardInterrupt

    summary = tune.tune([CASE, OTHER], settings("plain"), observe)
    assert summary.interrupted
    assert summary.finals == []
    assert len(logged(tmp_path)) == (0 if phase == "first" else 4)


def test_an_interrupt_while_the_worker_starts(
    monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Ctrl-C in the seconds in which the worker comes up is an interrupted run, too."""

    def start(_: FakeWorker) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "start", start)
    assert tune.tune([CASE], settings("plain")).interrupted


def test_an_interrupt_before_anything_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """Ctrl-C before there is a worker: the summary names the log all the same."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Worker", interrupted)
    summary = tune.tune([CASE], settings("plain", log_dir=tmp_path))
    assert (summary.interrupted, summary.log_dir) == (True, tmp_path)


def test_a_failing_log_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """When the disk is full in the middle, the run ends with a LogError, and what was logged before
    is there.
    """
    append, count = records.append, 0

    def fails_later(folder: Path, record: Record) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise LogError("cannot append: no space left")
        append(folder, record)

    monkeypatch.setattr(records, "append", fails_later)
    with pytest.raises(LogError, match="no space"):
        tune.tune([CASE], settings("plain"))
    assert len(logged(tmp_path)) == 2


def test_a_log_that_cannot_be_written(tmp_path: Path, fake: type[FakeWorker]) -> None:
    """A log folder that cannot be written is found out before anything is run."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LogError, match=r"file.*--log-dir"):
        tune.tune([CASE], settings("plain", log_dir=tmp_path / "file" / "log"))
    assert fake.jobs == []


def test_the_log_folder_can_be_chosen(tmp_path: Path, fake: type[FakeWorker]) -> None:
    """Settings win over LNTUNE_LOG_DIR."""
    summary = tune.tune([CASE], settings("plain", trials=1, log_dir=tmp_path / "mine"))
    assert summary.log_dir == tmp_path / "mine"
    assert len(records.read([tmp_path / "mine"])) == 2
    assert records.read([tmp_path / "log"]) == []


@pytest.mark.parametrize(
    ("cases", "changes", "error", "says"),
    [
        ([], {}, InputError, "no cases"),
        ([CASE], {"seconds": -1.0}, InputError, "budget: got -1.0"),
        ([CASE], {"seconds": math.nan}, InputError, "budget"),
        ([CASE], {"trials": 0}, InputError, "trials: got 0"),
        ([CASE], {"timeout": 0.0}, InputError, "timeout"),
        ([CASE], {"search": "lokal"}, UnknownNameError, "'local'"),
        ([CASE], {"schedules": ("cached_row",)}, UnknownNameError, "'cached_rows'"),
        ([Case("layer_nrom", 64, "float32", 8)], {}, UnknownNameError, "'layer_norm'"),
        ([Case("layer_norm", 64, "float32", 8, "wieght")], {}, UnknownNameError, "'weight'"),
        ([CASE, Case("layer_norm", 64, "float32", 0)], {}, InputError, "rows: got 0"),
    ],
)
def test_settings_that_make_no_sense(
    cases: list[Case],
    changes: dict[str, Any],
    error: type[LntuneError],
    says: str,
    fake: type[FakeWorker],
) -> None:
    """Every mistake is named, with the near miss where there is one, before anything is run."""
    with pytest.raises(error) as raised:
        tune.tune(
            cases,
            (
                settings(**{"schedules": (), **changes})
                if "schedules" not in changes
                else Settings(**changes)
            ),
        )
    assert says in str(raised.value)
    assert fake.jobs == []


def test_spaces_are_enumerated_when_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run only schedules of the user's are asked for all their settings, to see whether
    they can be used; those that come with lntune are not.
    """
    asked: list[str] = []
    enumerate_space = schedule.Schedule.space

    def space(self: schedule.Schedule, *arguments: Any) -> list[Any]:
        asked.append(self.name)
        return enumerate_space(self, *arguments)

    monkeypatch.setattr(schedule.Schedule, "space", space)
    tune.check_settings(Settings(), [CASE])
    assert "plain" in asked
    assert not {s.name for s in schedule.all_schedules().values() if s.shipped} & set(asked)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]) -> None:
    """Without a C++ compiler tuning says so, and what to do, before anything is run."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="no-such-compiler"):
        tune.tune([CASE], settings("plain"))
    assert fake.jobs == []


def test_a_tvm_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]) -> None:
    """A TVM that lntune does not work with is refused before anything is run."""
    monkeypatch.setattr(toolchain, "incompatible", lambda: ["apache-tvm 0.1 is not 0.27.*"])
    with pytest.raises(ToolchainError, match=r"0\.1 is not"):
        tune.tune([CASE], settings("plain"))
    assert fake.jobs == []


LIMITED = """
from dataclasses import dataclass
from lntune.knobs import knob
from lntune.schedule import Schedule

@dataclass(frozen=True)
class Knobs:
    size: int = knob(1, tuple(range(1, 31)), "any")
    most: int = knob(0, (0, 64, 96), "a limit", last=True)

def default(case, device):
    return Knobs()

def valid(knobs, case, device):
    return None

SCHEDULES = (Schedule("limited", "layer_norm", "cpu", Knobs, default, valid, None),)
"""
"""A schedule with a knob that is tried last."""


@pytest.mark.parametrize(("trials", "first"), [(None, 30), (20, 18), (4, 4)])
def test_knobs_that_are_tried_last(
    trials: int | None,
    first: int,
    tmp_path: Path,
    fake: type[FakeWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their other values are tried with the best of the others, in the last tenth of the budget;
    what wins so competes again in the next run.
    """
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "limited.py").write_text(LIMITED, encoding="utf-8")
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path))

    def answer(job: Job) -> Outcome:
        costs = [100.0 - c.knobs["size"] % 3 - c.knobs["most"] for c in candidates(job)]
        timings = {"tuned": took(costs[0]), "eager": took(50.0)}
        rivals = tuple(
            Rival(c.schedule, c.knobs, took(us))
            for c, us in zip(candidates(job)[1:], costs[1:], strict=True)
        )
        return Outcome("ok", "", timings, {"y": 0.5}, {"y": 1.0}, winner=0, rivals=rivals)

    fake.answer = staticmethod(answer)
    tune.tune([CASE], settings("limited", trials=trials))
    limits = [candidate.knobs["most"] for candidate in tried(fake)]
    assert limits == [0] * first + [64, 96][: (trials or 99) - first]
    best = {candidate.knobs["size"] for candidate in tried(fake) if candidate.knobs["most"]}
    assert best <= {2}
    if not trials:
        fake.jobs.clear()
        tune.tune([CASE], settings("limited", trials=1, again=True))
        assert tried(fake)[-1].knobs == {"size": 2, "most": 96}


def test_a_schedule_whose_default_raises(
    monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """A mistake in the default() or valid() of a user's schedule names the schedule and its file
    before anything is run.
    """
    import dataclasses

    def broken(*_: Any) -> str | None:
        raise ZeroDivisionError("division by zero")

    plain = schedule.get("plain")
    for field in ("default", "valid"):
        monkeypatch.setattr(
            schedule, "get", lambda *_, f=field: dataclasses.replace(plain, **{f: broken})
        )
        with pytest.raises(ScheduleError, match=r"faulty\.py.*'plain'.*ZeroDivisionError"):
            tune.tune([CASE], settings("plain"))
    assert fake.jobs == []


def test_a_worker_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a worker there is no run: a BuildError says why."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(BuildError, match="nonexistent"):
        tune.tune([CASE], settings("plain"))


RUN = """
    import sys
    from lntune import tune
    from lntune.case import Case

    def observe(progress):
        print(progress.trials, flush=True)

    settings = tune.Settings(search="exhaustive", seconds=None)
    tune.tune([Case("layer_norm", 64, "float32", 8)], settings, observe)
"""


def test_kill_9_loses_at_most_the_trial_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """After kill -9 of the whole tuning process the log can be read without a warning and holds
    every trial that was reported, and the next run makes none of these again.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "LNTUNE_SCHEDULES": "",
    }
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN)],
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        reported = 0
        try:
            while reported < 5:
                line = run.stdout.readline()
                assert line, "the run ended by itself"
                reported = int(line)
            time.sleep(0.05)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
    trials = logged(tmp_path)  # a LogWarning is an error in tests
    assert len(trials) >= reported
    assert all(t.status == "ok" and t.timings["tuned"].samples_us for t in trials)
    monkeypatch.setenv("LNTUNE_SCHEDULES", "")
    schedule._load.cache_clear()
    tune.tune([CASE], settings(trials=3))
    known = {Candidate.of_record(t) for t in trials if not t.disturbance}
    assert len(tried(fake)) == 3 and not known & {*tried(fake)}
    assert logged(tmp_path)[: len(trials)] == trials
