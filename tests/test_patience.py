"""A time limit finds what hangs, and not what others keep from the cores it needs. On a /proc of
the tests' own.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lntune.measure import worker
from lntune.measure.jobs import Outcome
from lntune.measure.worker import Worker
from lntune.system import patience
from lntune.system.patience import Starvation

TICK = os.sysconf("SC_CLK_TCK")


class Machine:
    """A /proc and a clock. `run` lets time go by, in which cores idle and threads compute."""

    def __init__(self, root: Path) -> None:
        self.root, self.now, self.idle, self.used = root, 50.0, 7.0, {}
        self.children: dict[str, str] = {}

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def run(self, seconds: float, idle: float = 0.0, **threads: float) -> None:
        """Time goes by: cores idle for so many seconds, a thread "process_thread" computes for so
        many.
        """
        self.now += seconds
        self.idle += idle
        (self.root / "stat").write_text(f"cpu  1 2 3 {int(self.idle * TICK)} 5 6 7 8\ncpu0 1\n")
        for name, computed in threads.items():
            pid, tid = name.strip("t").split("_")
            self.used[tid] = self.used.get(tid, 3.0) + computed
            task = self.root / pid / "task" / tid
            task.mkdir(parents=True, exist_ok=True)
            task.joinpath("stat").write_text(
                f"{tid} (a (name) ) S "
                + " ".join("0" * 10)
                + f" {int(self.used[tid] * TICK)} 0 0 0"
            )
            task.joinpath("children").write_text(self.children.get(tid, ""))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One on which process 8 has the threads 8 and 9."""
    fake = Machine(tmp_path)
    monkeypatch.setattr(patience, "time", fake)
    fake.run(0.0, t8_8=0.0, t8_9=0.0)
    return fake


def test_what_others_keep_from_its_cores_is_starved(machine: Machine) -> None:
    """No core was idle, and no thread had the CPU time it may take: it waits for cores."""
    watched = Starvation(8, machine.root)
    machine.run(5.0, t8_8=2.0, t8_9=2.5)
    assert watched.starved(5.0)
    machine.run(5.0, t8_8=2.0, t8_9=2.5)  # ten seconds now, of which its busiest thread had five
    assert not watched.starved(5.0)


def test_what_computes_for_its_whole_time_hangs(machine: Machine) -> None:
    """A thread that had a core to itself has no excuse, however busy the machine."""
    watched = Starvation(8, machine.root)
    machine.run(5.0, t8_8=4.9, t8_9=0.0)
    assert not watched.starved(5.0)


def test_what_sleeps_while_cores_are_idle_hangs(machine: Machine) -> None:
    """It could have computed."""
    watched = Starvation(8, machine.root)
    machine.run(5.0, idle=4.0, t8_8=0.1, t8_9=0.0)
    assert not watched.starved(5.0)
    machine.run(5.0, idle=0.5, t8_8=0.1, t8_9=0.0)
    assert watched.starved(5.0)


def test_what_it_has_started_counts(machine: Machine) -> None:
    """A compiler that the process waits for computes in its place; and so do threads that were not
    there before.
    """
    watched = Starvation(8, machine.root)
    machine.children["8"] = "20 21"
    machine.run(5.0, t8_8=0.0, t8_9=0.0, t20_20=-3.0, t21_21=-3.0)
    assert watched.starved(5.0)
    machine.run(0.1, t21_21=4.8)
    assert not watched.starved(5.0)


def test_nothing_is_made_up(tmp_path: Path) -> None:
    """Where the system does not say, or the process is gone, nobody is starved."""
    assert not Starvation(8, tmp_path).starved(1.0)
    (tmp_path / "stat").write_text("cpu 1\n")
    assert not Starvation(8, tmp_path).starved(1.0)


class _Slow(Worker):
    """A worker whose child answers after a time, without importing anything."""

    program = """
import sys, time
sys.path[:] = sys.argv[3:]
from lntune.measure import frames
answers = int(sys.argv[1])
frames.send(answers, frames.packed(frames.receive(0)[0], frames.READY))
while (job := frames.receive(0)) is not None:
    frames.send(answers, frames.packed(job[0], frames.TAKEN))
    time.sleep(float(job[1]))
    frames.send(answers, frames.packed(job[0], frames.ANSWER, b"done"))
"""


def starved(monkeypatch: pytest.MonkeyPatch, *answers: bool) -> list[float]:
    """Have `Starvation` answer so, the last for ever; the limits it was asked about."""
    left, asked = list(answers), []

    def answer(limit: float) -> bool:
        asked.append(limit)
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(worker, "Starvation", lambda _: SimpleNamespace(starved=answer))
    return asked


def test_a_starved_child_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer comes after the limit and is taken, and the child lives on; who is not patient
    kills it at the limit.
    """
    asked = starved(monkeypatch, True)
    with _Slow() as child:
        assert child.answer(0.5, 0.2, patient=True) == b"done"
        assert child.restarts == 0 and asked and set(asked) == {0.2}
        late = child.answer(0.5, 0.1)
        assert isinstance(late, Outcome) and late.message == "no answer within 0.1 s; killed"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has got its cores back, or has taken many times its limit, is killed."""
    asked = starved(monkeypatch, True, False)
    with _Slow() as child:
        assert isinstance(child.answer(60.0, 0.1, patient=True), Outcome)
        assert len(asked) == 2
        starved(monkeypatch, True)
        begun = time.monotonic()
        gave_up = threading.Timer(30.0, child.kill)
        gave_up.start()
        outcome = child.answer(60.0, 0.5, patient=True)
        gave_up.cancel()
        assert (
            isinstance(outcome, Outcome)
            and outcome.status == "timeout"
            and time.monotonic() - begun >= 0.5 * patience.MOST
        )
        assert (
            "nor within 2." in outcome.message
            and "while others used the machine; killed" in outcome.message
        )
