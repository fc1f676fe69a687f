"""The worker: whatever a candidate does to its process, the tuner gets an outcome and the next
candidate a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from grids import exhaustive

from lntune import device as device_module
from lntune import schedule
from lntune.case import Case
from lntune.errors import BuildError
from lntune.kernels import compiler
from lntune.measure import trial
from lntune.measure.jobs import (
    Build,
    Candidate,
    Check,
    Final,
    Heat,
    Job,
    Open,
    Prepare,
    Training,
    Try,
)
from lntune.measure.kept import Kept
from lntune.measure.worker import Worker

FAULTY, HOSTILE = (Path(__file__).parent / name for name in ("faulty", "hostile"))
CASE = Case("layer_norm", 64, "float32", 8)


def job(name: str, case: Case = CASE, **knobs: object) -> Try:
    """A short trial of a schedule of tests/faulty at its default knobs."""
    items = tuple({"first": 1, "second": False, **knobs}.items())
    return Try(case, device_module.current(), Candidate(name, items), 0.001)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def faulty_schedules() -> Iterator[None]:
    """The schedules of tests/faulty are found, here and in the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LNTUNE_SCHEDULES", f"{FAULTY}{os.pathsep}{HOSTILE}")
        schedule._load.cache_clear()
        yield
    schedule._load.cache_clear()


@pytest.fixture(scope="module")
def worker(faulty_schedules: None) -> Iterator[Worker]:
    """One worker for all tests that leave it fit for work."""
    with Worker() as process:
        yield process
    assert process.pid is None


def state(pid: int) -> str:
    """A process's state in /proc ("S", "Z", ...), or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def zombies() -> list[int]:
    """Children of this process that have ended and were not waited for."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and int(fields[1]) == os.getpid():
                pids.append(int(stat.parent.name))
    return pids


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """True as soon as the condition holds, False when it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_good_candidate(worker: Worker) -> None:
    """A right candidate is built, checked and timed; the child stays."""
    outcome = worker.run(job("plain"), 60)
    assert (outcome.status, outcome.message) == ("ok", "")
    assert set(outcome.timings) == {"tuned"}
    assert outcome.timings["tuned"].median_us > 0
    assert 0 < outcome.errors["y"] <= 1
    pid = worker.pid
    assert worker.run(job("plain", second=True), 60).status == "ok"
    assert worker.pid == pid


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        exhaustive(("aborts", "run", "SIGABRT")),
        exhaustive(("segfaults", "run", "SIGSEGV")),
        ("kernel_segfaults", "run", "SIG"),
        # what it said last on its standard error
        exhaustive(("exits", "run", "(exit code 3): out of luck")),
        ("hangs", "timeout", "2.0 s"),
        exhaustive(("kills_its_parent", "run", "SIGSYS: it sent a signal to a process")),
        ("writes_everywhere", "run", "wrote on descriptors that are not its own"),
    ],
)
def test_a_candidate_that_kills_its_worker(
    worker: Worker, name: str, status: str, says: str
) -> None:
    """A crash or a hang is the outcome of its candidate, with the child's last words, and the next
    one gets a new child that works.
    """
    worker.start()
    pid, before = worker.pid, worker.restarts
    assert pid is not None
    outcome = worker.run(job(name), 2.0 if name == "hangs" else 60)
    assert outcome.status == status
    assert says in outcome.message
    assert not outcome.timings
    assert worker.restarts == before + 1
    assert state(pid) == "gone"  # waited for, no zombie
    assert worker.run(job("plain"), 60).status == "ok"
    assert worker.pid not in (None, pid)
    assert zombies() == []


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("raises", "compile", "cannot schedule this"),
        ("wrong", "wrong", "times what is allowed"),
        ("wrong_but_fast", "wrong", "y: "),
    ],
)
def test_a_candidate_that_fails_in_order(worker: Worker, name: str, status: str, says: str) -> None:
    """An exception or a wrong answer costs no process, is not timed, and its message is short
    whatever was raised.
    """
    worker.run(job("plain"), 60)
    pid = worker.pid
    outcome = worker.run(job(name), 60)
    assert outcome.status == status
    assert says in outcome.message
    assert len(outcome.message) < 1000
    assert not outcome.timings
    assert worker.run(job("plain"), 60).status == "ok"
    assert worker.pid == pid


def test_knobs_that_do_not_exist(worker: Worker) -> None:
    """Unknown knobs, values and schedules make a candidate invalid, and the message has the near
    miss.
    """
    outcome = worker.run(job("plain", frist=1), 60)
    assert outcome.status == "invalid"
    assert "'first'" in outcome.message
    assert worker.run(job("plain", first=3), 60).status == "invalid"
    outcome = worker.run(job("plian"), 60)
    assert outcome.status == "invalid"
    assert "'plain'" in outcome.message


def test_knobs_that_do_not_fit(worker: Worker) -> None:
    """Knobs that a schedule has something against make a candidate invalid, with the schedule's own
    words.
    """
    cached, here = schedule.get("cached_rows"), device_module.current()
    setting = dataclasses.replace(cached.default(CASE, here), write="streamed", parallel=False)
    reason = cached.reason_invalid(setting, CASE, here)
    assert reason is not None
    outcome = worker.run(Try(CASE, here, Candidate.of("cached_rows", setting), 0.001), 60)
    assert (outcome.status, outcome.message) == ("invalid", reason)


@pytest.mark.parametrize("kind", get_args(Job))
def test_jobs_cross_as_they_are(kind: type) -> None:
    """Each kind of job comes out of JSON as what it went in, and as nothing else."""
    here, candidate = device_module.current(), job("plain").candidate
    contents = {
        Open: (here,),
        Build: (CASE, here, candidate),
        Check: (CASE, here, candidate),
        Prepare: (CASE, here, candidate),
        Try: (CASE, here, candidate, 0.5, 3, 7.5),
        Heat: (CASE, here, (candidate,), 0.5, 3),
        Final: (CASE, here, (candidate,), 0.5, 0.25, 3, candidate),
        Training: (CASE, here, candidate, candidate, 0.5, 3),
    }
    asked = kind(*contents[kind])
    assert msgspec.json.decode(msgspec.json.encode(asked), type=Job) == asked


def test_a_candidate_that_prints(worker: Worker) -> None:
    """Neither what looks like an answer nor more output than a pipe holds comes between a candidate
    and its outcome.
    """
    for _ in range(3):
        assert worker.run(job("noisy"), 60).status == "ok"


@pytest.mark.parametrize("variant", ["plain", "weight32+bias+stats"])
def test_every_form_of_arguments_is_timed(worker: Worker, variant: str) -> None:
    """Kernels without an affine and with statistics are measured as well, as trial and as final."""
    case = Case("layer_norm", 64, "bfloat16", 6, variant)
    trial = job("plain", case)
    assert worker.run(trial, 60).status == "ok"
    final = worker.run(Final(case, trial.device, (trial.candidate,), 0.001), 60)
    assert (final.status, final.message, final.winner) == ("ok", "", 0)
    assert set(final.timings) == {"tuned", "eager", "copy"}


def test_a_final_tells_of_those_that_did_not_win(worker: Worker) -> None:
    """Every finalist but the winner is a rival: its schedule, knobs and code, its errors, and as
    many samples as the winner has, since they are of the same rounds.
    """
    trial = job("plain")
    candidates = trial.candidate, job("plain", second=True).candidate
    final = worker.run(Final(CASE, trial.device, candidates, 0.001), 60)
    (rival,) = final.rivals
    assert final.winner is not None
    other = candidates[1 - final.winner]
    assert (rival.schedule, rival.knobs) == (other.schedule, other.knobs)
    assert rival.code == schedule.get("plain").code
    assert rival.timing.median_us >= final.timings["tuned"].median_us
    assert len(rival.timing.samples_us) == len(final.timings["tuned"].samples_us)
    assert rival.errors.keys() == final.errors.keys()
    assert 0 < rival.errors["y"] <= 1


def test_a_worker_killed_between_jobs(worker: Worker) -> None:
    """A child that dies while it has nothing to do is replaced; the next candidate is not
    blamed.
    """
    assert worker.run(job("plain"), 60).status == "ok"
    assert worker.pid is not None
    pid = worker.pid
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: state(pid) in ("Z", "gone"))
    assert worker.run(job("plain"), 60).status == "ok"
    assert state(pid) == "gone"


def test_a_worker_killed_during_a_job(worker: Worker) -> None:
    """A child killed at work (by the system, out of memory) is a failed run of that candidate at
    once, not at its timeout.
    """
    worker.start()
    pid = worker.pid
    assert pid is not None
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    outcome = worker.run(job("hangs"), 30)
    killer.join()
    assert outcome.status == "run"
    assert "SIGKILL" in outcome.message
    assert worker.run(job("plain"), 60).status == "ok"
    assert zombies() == []


def test_an_interrupt_during_a_job(worker: Worker) -> None:
    """Ctrl-C while a job runs ends the child with it; the next job gets its own answer and not the
    one left over.
    """
    worker.start()
    pid = worker.pid
    assert pid is not None
    interrupter = threading.Timer(
        0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
    )
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        worker.run(job("hangs"), 30)
    interrupter.join()
    assert worker.pid is None
    assert state(pid) == "gone"
    assert worker.run(job("raises"), 60).status == "compile"


def test_stop_and_start(worker: Worker) -> None:
    """Stopping twice, or what never ran, is nothing; a stopped worker starts again by itself. No
    descriptor is left open.
    """
    Worker().stop()
    worker.stop()
    worker.stop()
    gc.collect()
    before = descriptors()
    assert worker.run(job("plain"), 60).status == "ok"
    assert worker.run(job("aborts"), 60).status == "run"
    worker.stop()
    assert worker.pid is None
    assert descriptors() == before


class Lost(Worker):
    """A worker whose child says of every job that it lost its GPU."""

    program = (
        "import sys; sys.path[:] = sys.argv[3:]; import msgspec; from lntune.measure.jobs import"
        " Outcome; from lntune.measure.serving import serve; serve(int(sys.argv[1]),"
        " int(sys.argv[2]), lambda line: msgspec.json.encode(Outcome('run', 'CUDA error',"
        " lost=True)))"
    )


def test_a_child_that_is_of_no_more_use() -> None:
    """A child whose GPU's context is broken is ended, its answer counts, and the next job gets a
    new one.
    """
    with Lost() as worker:
        worker.start()
        pid = worker.pid
        assert pid is not None
        outcome = worker.run(job("plain"), 60)
        assert (outcome.status, outcome.message) == ("run", "CUDA error")
        assert (worker.pid, worker.restarts) == (None, 1)
        assert state(pid) == "gone"
        worker.start()
        assert worker.pid not in (None, pid)


def test_killed_by_another_thread(worker: Worker) -> None:
    """`kill` ends what the child does from any thread; the job is a failed run, and the next one
    gets a new child. Twice is nothing.
    """
    worker.start()
    killer = threading.Timer(0.5, worker.kill)
    killer.start()
    outcome = worker.run(job("hangs"), 30)
    killer.join()
    assert outcome.status == "run"
    assert "SIGKILL" in outcome.message
    worker.kill()
    assert worker.run(job("plain"), 60).status == "ok"


class Sleeper(Worker):
    """A worker whose child sleeps for as many seconds as it is told, without TVM and PyTorch."""

    program = (
        "import sys, time, types; sys.path[:] = sys.argv[3:]; sys.modules['torch'] ="
        " types.ModuleType('torch'); from lntune.measure.serving import serve;"
        " serve(int(sys.argv[1]), 0, lambda content: [time.sleep(float(content)), b'done'][1],"
        " lambda: None)"
    )


def test_time_that_it_is_stopped_counts_for_nothing() -> None:
    """A child that another thread stops in the middle of a job goes on afterwards, and what it was
    stopped for is not of its limit, which holds otherwise. One that is to be started meanwhile
    waits.
    """
    with Sleeper() as worker:
        worker.pause()
        later = threading.Timer(0.1, worker.resume)
        later.start()
        worker.start()
        assert not later.is_alive()
        pid, states = worker.pid, list[str]()
        assert pid is not None

        def stop() -> None:
            worker.pause()
            worker.pause()
            before = worker.clock()
            states.append(state(pid))
            time.sleep(1.1)
            assert worker.clock() == before
            worker.resume()
            worker.resume()

        stopper = threading.Timer(0.1, stop)
        stopper.start()
        assert worker.answer(0.4, 1.0) == b"done"
        stopper.join()
        assert (states, worker.pid) == (["T"], pid)
        late = worker.answer(20.0, 0.1)
        assert not isinstance(late, bytes) and late.status == "timeout"


def test_one_that_is_stopped_can_be_ended() -> None:
    """`stop` ends a child that stands still, and the next one does not."""
    with Sleeper() as worker:
        worker.start()
        pid = worker.pid
        assert pid is not None
        worker.pause()
        assert state(pid) == "T"
        worker.stop()
        assert state(pid) == "gone"
        worker.resume()
        assert worker.answer(0.0, 20.0) == b"done"


@pytest.fixture
def in_this_process() -> Iterator[None]:
    """Jobs leave nothing behind."""
    yield
    trial._prepared.clear()
    trial._kept = Kept()


@pytest.mark.slow
def test_what_was_prepared_is_timed(monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    """A candidate that was prepared is not built again to be timed; another one is, and what was
    prepared before is given up. One that is wrong stays with nobody.
    """
    one, other = job("plain"), job("plain", second=True)
    prepared = trial.run(Prepare(CASE, one.device, one.candidate))
    assert (prepared.status, prepared.timings) == ("ok", {}) and prepared.errors["y"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "in_memory", lambda *_, **__: pytest.fail("built"))
        tried = trial.run(one)
    assert (tried.status, tried.errors) == ("ok", prepared.errors)
    assert tried.timings["tuned"].median_us > 0
    trial.run(Prepare(CASE, one.device, one.candidate))
    assert trial.run(other).status == "ok" and not trial._prepared
    assert trial.run(Prepare(CASE, one.device, job("wrong").candidate)).status == "wrong"
    assert not trial._prepared


@pytest.mark.slow
def test_a_kernel_that_is_wrong_by_several_threads(
    monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    """It is prepared by one thread; whether threads share its rows rightly is found before it is
    timed, by all of them.
    """
    right = compiler.in_memory
    teams: set[int] = set()

    def built(*arguments: Any, **named: Any) -> Callable[..., None]:
        kernel = right(*arguments, **named)

        def called(*tensors: Any) -> None:
            kernel(*tensors)
            teams.add(torch.get_num_threads())
            if torch.get_num_threads() > 1:
                tensors[-1][-1] += 1

        return called

    monkeypatch.setattr(compiler, "in_memory", built)
    one, threads = job("plain"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert trial.run(Prepare(CASE, one.device, one.candidate)).status == "ok"
        assert teams == {1}
        outcome = trial.run(one)
    finally:
        torch.set_num_threads(threads)
    assert outcome.status == "wrong" and outcome.message.endswith(", by all threads")
    assert teams == {1, 2} and not outcome.timings


PARENT = """
    import sys, threading, os
    from pathlib import Path
    from lntune import device
    from lntune.case import Case
    from lntune.measure.jobs import Candidate, Try
    from lntune.measure.worker import Worker

    worker = Worker()
    worker.start()
    print(worker.pid, flush=True)
    case = Case("layer_norm", 64, "float32", 8)
    candidate = Candidate("hangs", (("first", 1), ("second", False)))
    if sys.argv[1] == "stopped":
        threading.Timer(1.0, worker.pause).start()
    if sys.argv[1] != "idle":
        worker.run(Try(case, device.current(), candidate, 0.001), 300)
    threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no parent-death signal")
@pytest.mark.parametrize("doing", [exhaustive("idle"), exhaustive("busy"), "stopped"])
def test_a_worker_dies_with_its_parent(doing: str) -> None:
    """kill -9 of the tuner leaves no worker behind, not even one in the middle of a candidate that
    never ends, or in one that is stopped while another one is timed.
    """
    command = [sys.executable, "-c", textwrap.dedent(PARENT), doing]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert state(child) not in ("Z", "gone")
            if doing == "busy":
                time.sleep(1.0)
            elif doing == "stopped":
                assert eventually(lambda: state(child) == "T")
        finally:
            parent.kill()
    # Z: an orphan whose new parent does not wait
    assert eventually(lambda: state(child) in ("Z", "gone"))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "No such file"),
        ("#!/bin/sh\necho 'cannot import tvm' >&2\nexit 1\n", "cannot import tvm"),
        ("#!/bin/sh\nexit 7\n", "exit code 7"),
        ("not a program", "format"),
    ],
    ids=["missing", "fails with a word", "fails without", "not a program"],
)
def test_a_worker_that_does_not_start(
    script: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that does not come up is a BuildError that says why; nothing of it stays, and a later
    start may succeed.
    """
    python = tmp_path / "python"
    if script is not None:
        python.write_text(script)
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    gc.collect()
    before = descriptors()
    with Worker() as worker:
        with pytest.raises(BuildError, match="worker process did not start") as error:
            worker.run(job("plain"), 60)
        assert says in str(error.value)
        assert worker.pid is None
    assert descriptors() == before
    assert zombies() == []


def test_threads() -> None:
    """The child computes with the number of threads asked for."""
    with Worker(threads=1) as worker:
        assert "1 threads" in worker.run(job("tells_threads"), 60).message


def test_the_current_folder_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child imports from where this process does, whatever lies in the folder it is started
    in.
    """
    for name in ("torch", "json", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with Worker() as worker:
        assert worker.run(job("plain"), 60).status == "ok"
