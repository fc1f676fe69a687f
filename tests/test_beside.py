"""Workers beside each other: candidates are prepared by several, each is timed alone, and in the
order of the search; with workers of the tests' own in place of processes.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fake_worker
import pytest
from fake_worker import FakeWorker, always_ok, cost_of, fake, settings
from usable_searches import USABLE

from lntune import backends, device, schedule
from lntune.backends import device_of
from lntune.case import Case
from lntune.errors import BuildError, InputError
from lntune.log import records
from lntune.measure.jobs import Candidate, Heat, Outcome, Prepare, Try
from lntune.tune import Settings, beside, loop
from lntune.tune.beside import Beside
from lntune.tune.candidates import Candidates

__all__ = ["fake"]
CASE = Case("layer_norm", 64, "float32", 8)
FEW = Case("layer_norm", 16, "float32", 8)
HERE = device.current()


def candidate(number: int) -> Candidate:
    """A candidate that is told by its number."""
    return Candidate("some", (("number", number),))


def trial(number: int) -> Try:
    """A trial of one."""
    return Try(CASE, HERE, candidate(number), 0.01)


class Slow:
    """A worker that does as `act` says, which gets what it is asked for and the worker; it notes
    what it was told to.
    """

    def __init__(self, act: Callable[[object, Slow], Outcome]) -> None:
        self.act = act
        self.killed = threading.Event()
        self.pid: int | None = None
        self.running, self.ended = True, False

    def start(self) -> None:
        """It comes up at once."""
        self.pid = 1

    def run(self, job: object, timeout: float) -> Outcome:
        """What `act` says."""
        return self.act(job, self)

    def pause(self) -> None:
        """It stands still."""
        self.running = False

    def resume(self) -> None:
        """It goes on."""
        self.running = True

    def kill(self) -> None:
        """End what it does."""
        self.killed.set()

    def stop(self) -> None:
        """The end."""
        self.ended = True

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()


Act = Callable[[object, Slow], Outcome]


@pytest.fixture
def group() -> Iterator[Callable[..., Beside]]:
    """Makes some workers beside each other, in `workers` of the answer; all of them have ended and
    none stands still when the test is over.
    """
    made: list[Beside] = []

    def make(act: Act, count: int = 2, timeout: float = 30.0) -> Beside:
        workers = [Slow(act) for _ in range(count)]
        one = Beside(HERE, timeout, workers, Slow.start)  # type: ignore[arg-type]
        made.append(one.__enter__())
        return one

    yield make
    for one in made:
        one.close()
        assert all(w.ended and w.running for w in workers_of(one))
        assert not any(thread.is_alive() for thread in one._threads)


def workers_of(group: Beside) -> Sequence[Slow]:
    """Its workers."""
    return group._workers  # type: ignore[return-value]


def test_prepared_together_and_timed_alone(group: Callable[..., Beside]) -> None:
    """All that are in hand are prepared at the same time; they are timed in the order in which they
    were begun, by the worker that prepared them, while all others are stopped.
    """
    together = threading.Barrier(3)
    prepared: dict[Candidate, Slow] = {}
    order: list[Candidate] = []

    def act(job: object, worker: Slow) -> Outcome:
        if isinstance(job, Prepare):
            together.wait(10)
            prepared[job.candidate] = worker
            return Outcome("ok")
        assert isinstance(job, Try) and prepared[job.candidate] is worker
        assert [w.running for w in workers_of(one)] == [w is worker for w in workers_of(one)]
        order.append(job.candidate)
        return Outcome("ok", str(job.candidate.knobs["number"]))

    one = group(act, 3)
    for number in range(3):
        one.begin(CASE, candidate(number))
    outcomes = [one.tried(trial(number), 30.0)[0] for number in range(3)]
    assert [o and o.message for o in outcomes] == ["0", "1", "2"]
    assert order == [candidate(n) for n in range(3)]
    assert len(set(map(id, prepared.values()))) == 3
    assert all(w.running for w in workers_of(one))


def test_what_goes_wrong_costs_its_own_trial(group: Callable[..., Beside]) -> None:
    """A candidate that fails while it is prepared is not timed, and the others are."""
    times: list[Candidate] = []

    def act(job: object, worker: Slow) -> Outcome:
        if isinstance(job, Try):
            times.append(job.candidate)
        failed = isinstance(job, Prepare) and job.candidate == candidate(0)
        return Outcome("run", "the worker died (SIGSEGV)") if failed else Outcome("ok")

    one = group(act)
    for number in range(3):
        one.begin(CASE, candidate(number))
    outcomes = [one.tried(trial(number), 30.0)[0] for number in range(3)]
    assert [o and o.status for o in outcomes] == ["run", "ok", "ok"]
    assert times == [candidate(1), candidate(2)]


def test_what_comes_too_late(group: Callable[..., Beside]) -> None:
    """Where the time of the run is over, nobody waits for what is not prepared yet; a trial's own
    limit is the worker's business. What measures next waits for nobody long, but ends what no one
    wants any more.
    """
    asked: list[object] = []

    def act(job: object, worker: Slow) -> Outcome:
        asked.append(job)
        if isinstance(job, Prepare):
            assert worker.killed.wait(30)
            worker.killed.clear()
            return Outcome("run", "the worker died (SIGKILL)")
        return Outcome("ok")

    one = group(act)
    for number in range(2):
        one.begin(CASE, candidate(number))
    assert one.tried(trial(0), 0.02) == (None, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "PATIENCE", 0.02)
        race = Heat(CASE, HERE, (candidate(5),), 0.1)
        assert one.run(race, 30.0).status == "ok"
    assert asked[-1] == race and not any(isinstance(job, Try) for job in asked)


def test_a_race_where_most_were_timed(group: Callable[..., Beside]) -> None:
    """A race is run by the worker that has timed most of its entrants, which keeps their kernels;
    how many it has to build is known before. Everybody else stands still.
    """
    racing: list[Slow] = []

    def act(job: object, worker: Slow) -> Outcome:
        if isinstance(job, Heat):
            assert [w.running for w in workers_of(one)] == [w is worker for w in workers_of(one)]
            racing.append(worker)
        return Outcome("ok")

    one = group(act)
    first, second = workers_of(one)
    one._tried = {(CASE, candidate(n)): (second if n else first) for n in range(3)}  # type: ignore[misc]
    entrants = tuple(candidate(n) for n in range(3))
    one.wait()
    while len(one._idle) < 2:
        time.sleep(0.001)
    assert one.kept(CASE, entrants) == [candidate(1), candidate(2)]
    assert one.kept(Case("layer_norm", 65, "float32", 8), entrants) == []
    one.run(Heat(CASE, HERE, entrants, 0.1), 30.0)
    assert racing == [second]


def test_what_is_not_wanted_any_more(group: Callable[..., Beside]) -> None:
    """Candidates that a search leaves in hand keep no worker, and one that it comes back to, or
    never began, is prepared then.
    """
    prepared: list[Candidate] = []

    def act(job: object, worker: Slow) -> Outcome:
        if isinstance(job, Prepare):
            prepared.append(job.candidate)
        return Outcome("ok")

    one = group(act)
    for number in range(2):
        one.begin(CASE, candidate(number))
    while len(prepared) < 2:
        time.sleep(0.001)
    one.forget()
    for number in (7, 0):
        outcome, seconds = one.tried(trial(number), 30.0)
        assert outcome is not None and outcome.status == "ok" and seconds >= 0
    assert sorted(int(c.knobs["number"]) for c in prepared) == [0, 0, 1, 7]


def test_an_interrupt_while_one_is_timed(group: Callable[..., Beside]) -> None:
    """Ctrl-C leaves nobody stopped; the final that follows is measured by a worker that still has a
    process, as soon as it is done with what it was preparing.
    """
    measuring: list[Slow] = []
    interrupted = threading.Event()

    def act(job: object, worker: Slow) -> Outcome:
        if isinstance(job, Try):
            worker.pid = None
            interrupted.set()
            signal.raise_signal(signal.SIGINT)
        elif isinstance(job, Heat):
            measuring.append(worker)
        elif isinstance(job, Prepare) and job.candidate == candidate(1):
            assert interrupted.wait(30)
            time.sleep(0.05)
        return Outcome("ok")

    one = group(act)
    for number in range(2):
        one.begin(CASE, candidate(number))
    with pytest.raises(KeyboardInterrupt):
        one.tried(trial(0), 30.0)
    assert all(w.running for w in workers_of(one))
    assert one.run(Heat(CASE, HERE, (candidate(0),), 0.1), 30.0).status == "ok"
    assert measuring == [w for w in workers_of(one) if w.pid is not None]


def test_workers_that_do_not_come_up() -> None:
    """A run goes on with those that do; where none does, whoever waits gets the reason."""

    def start(worker: Slow) -> None:
        if worker in broken:
            raise BuildError("the worker process did not start: no memory.")
        worker.start()

    workers = [Slow(lambda *_: Outcome("ok")) for _ in range(2)]
    broken = workers[:1]
    with Beside(HERE, 30.0, workers, start) as one:  # type: ignore[arg-type]
        one.wait()
        one.begin(CASE, candidate(0))
        one.begin(CASE, candidate(1))
        assert all(one.tried(trial(n), 30.0)[0] == Outcome("ok") for n in range(2))
        assert one.notes() == [
            "there was a worker less: the worker process did not start: no memory."
        ]
    broken = workers
    with (
        Beside(HERE, 30.0, workers, start) as one,  # type: ignore[arg-type]
        pytest.raises(BuildError, match="no memory"),
    ):
        one.wait()


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as cores, and few; fewer where memory is short or cases are large, and one where
    there is one core or candidates are built ahead.
    """
    monkeypatch.setattr(beside.excess, "room", lambda: 64 << 30)
    for cores, count in ((1, 1), (2, 2), (3, 3), (64, beside.MOST)):
        monkeypatch.setattr(beside, "usable_cores", lambda cores=cores: cores)
        assert beside.count(HERE, [CASE]) == count
    assert beside.count(HERE, [CASE], 1) == 1
    assert beside.count(HERE, [CASE], 3) == 3
    assert beside.count(HERE, [CASE, Case("layer_norm", 1 << 14, "float32", 1 << 16)]) == 1
    assert beside.count(device_of("cuda:sm_90"), [CASE]) == 1
    for room, count in ((5 << 30, 2), (3 << 30, 1), (1 << 20, 1)):
        monkeypatch.setattr(beside.excess, "room", lambda room=room: room)
        assert beside.count(HERE, [CASE]) == count


def test_workers_of_the_users_own() -> None:
    """A number of workers is one, and of a GPU's run there is one."""
    with pytest.raises(InputError, match="workers"):
        loop.tune([CASE], Settings(workers=0))
    gpu = device_of("cuda:sm_90")
    with pytest.raises(InputError, match="whose candidates other processes build anyway"):
        loop.tune([CASE], Settings(workers=2, device=gpu))
    assert backends.of(gpu).builds_ahead


@pytest.mark.parametrize("search", USABLE)
@pytest.mark.parametrize("trials", [None, 4])
def test_a_run_by_several(search: str, trials: int | None, fake: type[FakeWorker]) -> None:
    """Every candidate is tried once, no more than there are to be trials; each is in the log before
    the next is timed, and the log has their order.
    """
    logged: list[int] = []

    def answer(job: fake_worker.Job) -> Outcome:
        if isinstance(job, Try):
            logged.append(len(records.read([chosen.log_dir or loop.paths.log_dir()])))
        return always_ok(job)

    fake.answer = staticmethod(answer)
    chosen = settings("cached_rows", search=search, trials=trials, workers=3)
    summary = loop.tune([FEW], chosen)
    tried = fake_worker.tried(fake)
    assert len(tried) == len(set(tried)) == summary.trials
    few = Candidates(FEW, HERE, ["cached_rows"])
    assert len(tried) == min(trials or len(few), len(few)) > 3
    assert logged == list(range(len(tried)))
    trials_logged = [r for r in records.read([summary.log_dir]) if r.role == "trial"]
    assert [Candidate.of_record(r) for r in trials_logged] == tried
    best = min(tried, key=cost_of)
    assert Candidate.of_record(summary.finals[0]) == best or search != "exhaustive"


def test_one_worker_prepares_nothing(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one core a trial is one job."""
    monkeypatch.setattr(loop, "Beside", lambda *_: pytest.fail("there are several"))
    assert loop.tune([FEW], settings("cached_rows", trials=2)).trials == 2


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="what Linux offers against them")
def test_candidates_that_die_while_others_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes: what crashes or hangs costs its own trial while it is prepared, those beside it
    are built, checked and timed, and no process stays.
    """
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(Path(__file__).parent / "faulty"))
    schedule._load.cache_clear()
    try:
        chosen = settings("plain", "kernel_segfaults", "hangs", timeout=3.0, workers=2)
        summary = loop.tune([CASE], chosen)
        logged = [r for r in records.read([summary.log_dir]) if r.role == "trial"]
    finally:
        schedule._load.cache_clear()
    of = {name: {r.status for r in logged if r.schedule == name} for name in chosen.schedules}
    assert of == {"plain": {"ok"}, "kernel_segfaults": {"run"}, "hangs": {"timeout"}}
    assert summary.finals[0].schedule == "plain"
    assert not [t for t in threading.enumerate() if t.name.startswith("Thread")]
