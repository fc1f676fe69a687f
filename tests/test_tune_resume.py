"""A tuning run that goes on from what earlier runs have logged, whatever ended them: no trial is
made twice, unless something is different or it is asked for.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from fake_gpu import FakeGpu
from fake_worker import FakeWorker, Job, always_ok, cost_of, fake, finals, settings, tried
from typer.testing import CliRunner
from usable_searches import USABLE

from lntune import schedule, tune
from lntune.backends.cuda import launcher
from lntune.case import Case
from lntune.cli import app
from lntune.errors import BuildError, LogError, StoreError, ToolchainError
from lntune.log import records
from lntune.log.records import LogWarning, Record, Timing
from lntune.measure import trial
from lntune.measure.jobs import Candidate, Final, Outcome, Try
from lntune.tune import loop
from lntune.versions import Code

__all__ = ["fake"]

FAULTY = Path(__file__).parent / "faulty"
CASE = Case("layer_norm", 64, "float32", 8)
PLAIN = 4
"""Candidates of the schedule `plain`."""


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedules of tests/faulty beside the shipped ones."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(FAULTY))
    schedule._load.cache_clear()
    yield
    schedule._load.cache_clear()


class Killed(BaseException):
    """What ends a run without any of it noticing, as kill -9 does."""


def killed_at(count: int) -> Callable[[Job], Outcome]:
    """Answers of a worker whose run is killed in its trial of this number."""
    left = [count]

    def answer(job: Job) -> Outcome:
        left[0] -= isinstance(job, Try)
        if left[0] < 0:
            raise Killed
        return always_ok(job)

    return answer


def trials(log_dir: Path) -> list[Record]:
    """The trials of the test's log."""
    return records.read([log_dir], role="trial")


def rewrite(log_dir: Path, change: Callable[[Record], Record]) -> None:
    """Have all of the log's records be others."""
    kept = records.read([log_dir])
    shutil.rmtree(log_dir)
    for record in kept:
        records.append(log_dir, change(record))


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("name", USABLE)
def test_a_killed_run_goes_on(
    name: str, at: int, tmp_path: Path, log_dir: Path, fake: type[FakeWorker]
) -> None:
    """Whichever trial a run is killed in, the same command makes that and the rest: both together
    make what one run would have made, each once and in its order, and the same knobs win.
    """
    asked = settings("plain", "aborts", "hangs", "raises", search=name)
    (expected,) = tune.tune([CASE], replace(asked, log_dir=tmp_path / "other")).finals
    one = tried(fake)
    fake.jobs.clear()
    fake.answer = staticmethod(killed_at(at))
    with pytest.raises(Killed):
        tune.tune([CASE], asked)
    assert len(trials(log_dir)) == at
    lost = fake.jobs.pop()
    fake.answer = staticmethod(always_ok)
    summary = tune.tune([CASE], asked)
    assert tried(fake) == one and one[at] == lost.candidate  # type: ignore[union-attr]
    assert (summary.trials, summary.earlier.total()) == (len(one) - at, at)
    assert [f.knobs for f in summary.finals] == [expected.knobs]


def test_the_same_command_tries_what_is_left(log_dir: Path, fake: type[FakeWorker]) -> None:
    """The number of trials asked for is that of new ones; when nothing is left the finalists are
    measured once more all the same, which is said with the way to try all again.
    """
    for known, new in ((0, 3), (3, 1), (4, 0)):
        fake.jobs.clear()
        summary = tune.tune([CASE], settings("plain", trials=3))
        assert (summary.trials, len(tried(fake)), summary.earlier) == (
            new,
            new,
            {"ok": known} if known else {},
        )
        assert len(finals(fake)) == 1 and len(summary.finals) == 1
        assert any("nothing was left to try" in note for note in summary.notes) == (not new)
    assert "1 case" in summary.notes[0] and "--again" in summary.notes[0]
    assert {*finals(fake)[0].candidates} >= {min(candidates_of(log_dir), key=cost_of)}
    fake.jobs.clear()
    summary = tune.tune([CASE], settings("plain", again=True))
    assert len(tried(fake)) == PLAIN and not summary.earlier and not summary.notes
    assert set(candidates_of(log_dir).values()) == {2}


def test_what_was_never_settled_comes_first(fake: type[FakeWorker]) -> None:
    """Where a run had no time for all cases the same command goes on with the others, which it
    names before it begins; then with those that other work disturbed; --again has them as they are
    asked for.
    """
    cases = [msgspec.structs.replace(CASE, hidden=hidden) for hidden in (64, 128, 256)]

    def disturbed(job: Job) -> Outcome:
        return msgspec.structs.replace(always_ok(job), busy=isinstance(job, Final))

    fake.answer = staticmethod(disturbed)
    tune.tune(cases[:1], settings("plain", trials=1))
    fake.answer = staticmethod(always_ok)
    tune.tune(cases[1:2], settings("plain", trials=1))
    for again, hidden in ((False, [256, 64, 128]), (True, [64, 128, 256])):
        fake.jobs.clear()
        said: list[str] = []
        chosen = settings("plain", trials=1, again=again)
        tune.tune(cases, chosen, foretell=said.append)
        assert [job.case.hidden for job in finals(fake)] == hidden
        assert said[0].startswith(f"tuning 3 cases: layer_norm 8x{hidden[0]} float32, ")


def candidates_of(log_dir: Path) -> Counter[Candidate]:
    """How often each candidate has been tried."""
    return Counter(Candidate.of_record(r) for r in trials(log_dir))


SCATTERED = {"tuned": Timing((1.0, 1.0, 9.0, 9.0, 9.0, 9.0), 9.0)}
OTHERS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "rows": lambda r: {"case": msgspec.structs.replace(r.case, rows=9)},
    "variant": lambda r: {"case": msgspec.structs.replace(r.case, variant="plain")},
    "code": lambda _: {"code": Code("of yesterday")},
    "device": lambda r: {"device": msgspec.structs.replace(r.device, cores=99)},
    "threads": lambda r: {"threads": r.threads + 1},
    "tvm": lambda r: {"versions": {**r.versions, "tvm": "0.1"}},
    "torch": lambda r: {"versions": {**r.versions, "torch": "1.0"}},
    "a version unknown": lambda _: {"versions": {}},
    "busy": lambda _: {"busy": True},
    "scattered": lambda _: {"timings": SCATTERED},
    "no time": lambda _: {"timings": {}},
    "unknown knobs": lambda _: {"knobs": {"third": 1}},
    "unknown schedule": lambda _: {"schedule": "plane"},
    "role": lambda _: {"role": "comparison"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_another_measurement(what: str, log_dir: Path, fake: type[FakeWorker]) -> None:
    """Trials are made again where the rows, the variant, the code, the device, the threads or a
    version are others, where other work disturbed them, and where what they tried is not to be
    told.
    """
    tune.tune([CASE], settings("plain"))
    rewrite(log_dir, lambda r: msgspec.structs.replace(r, **OTHERS[what](r)))
    fake.jobs.clear()
    summary = tune.tune([CASE], settings("plain"))
    assert len(tried(fake)) == PLAIN and not summary.earlier


@pytest.mark.parametrize("busy", [None, False])
def test_what_is_the_same_measurement(
    busy: bool | None, log_dir: Path, fake: type[FakeWorker]
) -> None:
    """Trials stand, whoever made them and whether or not it is known that the machine was quiet,
    and whatever the order of their knobs.
    """
    tune.tune([CASE], settings("plain", seed=1))

    def changed(record: Record) -> Record:
        knobs = dict(reversed(record.knobs.items()))
        return msgspec.structs.replace(record, run="another", busy=busy, knobs=knobs)

    rewrite(log_dir, changed)
    fake.jobs.clear()
    assert tune.tune([CASE], settings("plain")).earlier == {"ok": PLAIN}
    assert tried(fake) == []


@pytest.mark.parametrize("status", ["invalid", "compile", "run", "wrong", "timeout"])
def test_failures_stand(status: Any, fake: type[FakeWorker]) -> None:
    """What failed in whatever way is not tried again, never wins, and its reason is given where
    nothing else is left; asked to, a run tries it again.
    """
    fake.answer = staticmethod(lambda _: Outcome(status, "so it is"))
    tune.tune([CASE], settings("plain"))
    fake.answer = staticmethod(always_ok)
    fake.jobs.clear()
    summary = tune.tune([CASE], settings("plain"))
    assert fake.jobs == [] and summary.finals == [] and summary.earlier == {status: PLAIN}
    assert f"{PLAIN} {status}: so it is" in summary.untuned[str(CASE)]
    assert any("--again" in note for note in summary.notes)
    assert tune.tune([CASE], settings("plain", again=True)).statuses == {"ok": PLAIN}


def test_the_last_word_counts(log_dir: Path, fake: type[FakeWorker]) -> None:
    """Of several trials of a candidate the latest stands, be it a failure, but for those that other
    work disturbed.
    """
    tune.tune([CASE], settings("plain"))
    fast, slow, *_ = sorted(trials(log_dir), key=lambda r: r.median() or 0)
    records.append(log_dir, msgspec.structs.replace(fast, status="run", message="now", timings={}))
    timings = {"tuned": Timing((1.0,), 0.001)}
    records.append(log_dir, msgspec.structs.replace(slow, busy=True, timings=timings))
    fake.jobs.clear()
    summary = tune.tune([CASE], settings("plain"))
    assert tried(fake) == [] and summary.earlier == {"ok": PLAIN - 1, "run": 1}
    (final,) = summary.finals
    assert final.knobs == slow.knobs != fast.knobs
    assert Candidate.of_record(fast) not in finals(fake)[0].candidates


def test_a_torn_line(log_dir: Path, fake: type[FakeWorker]) -> None:
    """A trial of which half a line was written is made again, and no other."""
    fake.answer = staticmethod(killed_at(3))
    with pytest.raises(Killed):
        tune.tune([CASE], settings("plain"))
    (path,) = log_dir.glob("*/*.jsonl")
    torn = trials(log_dir)[-1]
    path.write_bytes(path.read_bytes()[:-30])
    fake.answer = staticmethod(always_ok)
    fake.jobs.clear()
    with pytest.warns(LogWarning, match="skipped"):
        tune.tune([CASE], settings("plain"))
    assert len(tried(fake)) == PLAIN - 2 and Candidate.of_record(torn) in tried(fake)


def test_ctrl_c_before_the_first_new_trial(fake: type[FakeWorker]) -> None:
    """A run that is interrupted in its first trial is settled among those of earlier runs."""
    tune.tune([CASE], settings("plain", trials=3))
    best = min(tried(fake), key=cost_of)

    def answer(job: Job) -> Outcome:
        if isinstance(job, Try):
            raise KeyboardInterrupt
        return always_ok(job)

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE], settings("plain"))
    assert summary.interrupted and summary.untuned == {}
    assert [f.knobs for f in summary.finals] == [best.knobs]


def fails_with(code: int) -> Callable[..., None]:
    """A function that fails with an error of the system."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


FAULTS = {
    "a full disk": (os, "fsync", errno.ENOSPC, "No space left on device"),
    "read-only": (Path, "open", errno.EROFS, "Read-only file system"),
    "an error of the disk": (os, "fsync", errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_log_that_cannot_be_written_any_more(
    fault: str, log_dir: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """A disk that is full or read-only in the middle of a run ends it with an error that names the
    log, the reason and the remedy; the log has all trials before, and with the disk mended the same
    command makes the others.
    """
    owner, name, code, reason = FAULTS[fault]

    with monkeypatch.context() as patch:

        def answer(job: Job) -> Outcome:
            if isinstance(job, Try) and len(tried(fake)) == 3:
                patch.setattr(owner, name, fails_with(code))
            return always_ok(job)

        fake.answer = staticmethod(answer)
        with pytest.raises(LogError) as raised:
            tune.tune([CASE], settings("plain"))
    assert str(log_dir) in str(raised.value) and reason in str(raised.value)
    assert "--log-dir" in str(raised.value)
    before = [Candidate.of_record(r) for r in trials(log_dir)]
    assert before == tried(fake)[:2]
    fake.answer = staticmethod(always_ok)
    fake.jobs.clear()
    tune.tune([CASE], settings("plain"))
    assert len(tried(fake)) == PLAIN - 2 and not {*before} & {*tried(fake)}


def test_a_folder_that_is_read_only_from_the_start(
    monkeypatch: pytest.MonkeyPatch, fake: type[FakeWorker]
) -> None:
    """It is found out before anything is run."""
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", fails_with(errno.EROFS))
        with pytest.raises(LogError, match=r"cannot write.*Read-only file system.*--log-dir"):
            tune.tune([CASE], settings("plain"))
    assert fake.jobs == []


def test_a_folder_that_vanishes(log_dir: Path, fake: type[FakeWorker], tmp_path: Path) -> None:
    """A log folder that goes away in the middle of a run ends it with an error that says so, and is
    not made anew without what was in it; brought back, it serves the same command.
    """
    away = tmp_path / "away"

    def answer(job: Job) -> Outcome:
        if isinstance(job, Try) and len(tried(fake)) == 3:
            log_dir.rename(away)
        return always_ok(job)

    fake.answer = staticmethod(answer)
    with pytest.raises(LogError, match=rf"{log_dir}.*is there no more.*--log-dir"):
        tune.tune([CASE], settings("plain"))
    assert not log_dir.exists()
    away.rename(log_dir)
    fake.answer = staticmethod(always_ok)
    summary = tune.tune([CASE], settings("plain"))
    assert (summary.trials, summary.earlier.total()) == (PLAIN - 2, 2)


@pytest.mark.parametrize("error", [StoreError, ToolchainError])
def test_a_machine_that_can_build_no_more(
    error: type[BuildError],
    log_dir: Path,
    fake: type[FakeWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the cache's disk is full or the compiler is gone in the middle of a run, it ends with
    an error that says so and blames no candidate: mended, the same command tries what is left.
    """

    def fail(*_: object, **__: object) -> None:
        raise error("there is no room")

    monkeypatch.setattr(trial.compiler, "in_memory", fail)
    fake.answer = staticmethod(
        lambda job: trial.run(job) if len(tried(fake)) == 3 else always_ok(job)
    )
    with pytest.raises(BuildError, match="nothing can be built any more: there is no room"):
        tune.tune([CASE], settings("plain"))
    assert [r.status for r in records.read([log_dir])] == ["ok", "ok"]
    fake.answer = staticmethod(always_ok)
    assert tune.tune([CASE], settings("plain")).statuses == {"ok": PLAIN - 2}


def test_what_is_said_of_earlier_runs(
    log_dir: Path, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary tells the trials of this run from those of earlier ones, by status, in words and
    as JSON; the lines of progress count them too, from the start.
    """
    monkeypatch.setattr("lntune.report.progress.PLAIN_SECONDS", 0)
    command = ["tune", "layer_norm", "--hidden", "64", "--dtype", "float32", "--rows", "8"]
    command += ["--schedule", "plain", "--search", "exhaustive", "--trials", "3"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and "earlier runs" not in first.output
    fake.answer = staticmethod(
        lambda job: Outcome("wrong", "off") if isinstance(job, Try) else always_ok(job)
    )
    second = CliRunner().invoke(app, command)
    assert "1 trial (1 wrong) in " in second.output
    assert "beside 3 of earlier runs (3 ok)" in second.output
    assert "float32: 0 trials and 3 of earlier runs, best" in second.output
    assert "; 1 trial and 3 of earlier runs, 1 wrong" in second.output
    facts = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (facts["trials"], facts["earlier_trials"]) == (0, 4)
    assert facts["earlier_statuses"] == {"ok": 3, "wrong": 1}
    fake.answer = staticmethod(always_ok)
    facts = json.loads(CliRunner().invoke(app, [*command, "--json", "--again"]).stdout)
    assert (facts["trials"], facts["earlier_trials"], facts["notes"]) == (3, 0, [])


class Listed:
    """Builders that build nothing and remember what they were asked for; what comes next is the
    last of what may.
    """

    def __init__(self, *_: object) -> None:
        self.asked: list[Candidate] = []
        self.made.append(self)

    made: ClassVar[list[Listed]] = []

    def __enter__(self) -> Listed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    close = __exit__

    def begin(self, case: Case, candidates: Any, following: Any = None) -> None:
        """Candidates of a case, and those of the case after it."""
        self.asked += [*candidates, *(following[1] if following else ())]

    def also(self, case: Case, candidates: Any) -> None:
        """More of them."""
        self.asked += candidates

    def outcome(self, case: Case, candidate: Candidate) -> Outcome:
        """Nothing speaks against it; rivals of earlier runs are asked for, too."""
        return Outcome("ok")

    def choose(self, case: Case, preferred: Any, others: Any) -> Candidate:
        """One that was to be built."""
        chosen: Candidate = (preferred or others)[-1]
        assert chosen in self.asked
        return chosen


def test_nothing_is_built_that_is_known(
    fake_gpu: FakeGpu, log_dir: Path, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU what earlier runs have tried is not built ahead either, of the case in hand and of
    the next one.
    """
    monkeypatch.setattr(loop, "Ahead", Listed)
    cases = [CASE, Case("layer_norm", 96, "bfloat16", 4)]
    asked = settings("shared_row", search="", trials=3, device=launcher.device(0))
    tune.tune(cases, asked)
    known = {(r.case, Candidate.of_record(r)) for r in trials(log_dir)}
    assert len(known) == 6
    fake.jobs.clear()
    summary = tune.tune(cases, asked)
    assert summary.earlier == {"ok": 6} and summary.trials == 6
    assert not known & {(job.case, job.candidate) for job in fake.jobs if isinstance(job, Try)}
    first, second = Listed.made[-2:]
    counts = Counter(first.asked)
    counts.subtract(second.asked)
    assert counts.total() == 2 * 6, "each is asked for twice"
