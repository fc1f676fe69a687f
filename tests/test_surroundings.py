"""What the system tells of the time of a measurement, read from files of the tests' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from made_up_records import record

from lntune import timing
from lntune.system import surroundings
from lntune.system.surroundings import Notice, Surroundings

CORE = min(os.sched_getaffinity(0))


class Machine:
    """Files as Linux has them under `root`, and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 100.0
        self.cpu = f"sys/devices/system/cpu/cpu{CORE}"

    def write(self, path: str, text: object) -> None:
        """A file below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def stat(self, idle: int, steal: int) -> None:
        """Ticks of all cores."""
        self.write("proc/stat", f"cpu  100 0 50 {idle} 0 0 0 {steal} 7 7\ncpu0 1 2 3")

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of which a second passes in every test."""
    made = Machine(tmp_path)
    monkeypatch.setattr(surroundings, "time", made)
    return made


def noticed(machine: Machine, seconds: float = 1.0, **files: Any) -> list[Notice]:
    """What is told of a time in the course of which files change; `after` is done in it."""
    watched = Surroundings(machine.root)
    files["after"]()
    machine.now += seconds
    return watched.noticed()


@pytest.mark.parametrize(("ticks", "text"), [(30, "took 15 % of the time"), (3, ""), (0, "")])
def test_stolen_time(machine: Machine, ticks: int, text: str) -> None:
    """What a hypervisor takes is told from 2 % on, and is no disturbance by itself: it is reckoned
    with what others use.
    """
    machine.stat(1000, 50)
    found = noticed(machine, after=lambda: machine.stat(1200 - ticks, 50 + ticks))
    assert [n.disturbs for n in found] == [False] * bool(text)
    assert all(text in n.text for n in found)


@pytest.mark.parametrize(
    ("cgroup", "file", "before", "after"),
    [
        ("0::/", "sys/fs/cgroup/cpu.stat", "throttled_usec 5", "throttled_usec 400005"),
        (
            "0::/user/job",
            "sys/fs/cgroup/user/cpu.stat",
            "throttled_usec 0",
            "throttled_usec 400000",
        ),
        (
            "3:cpu,cpuacct:/job\n2:memory:/job",
            "sys/fs/cgroup/cpu/job/cpu.stat",
            "throttled_time 0",
            "throttled_time 400000000",
        ),
    ],
)
def test_quotas(machine: Machine, cgroup: str, file: str, before: str, after: str) -> None:
    """A quota that stops the process, of its control group or of one above, in either version,
    disturbs; one that stops it for a moment is told, and one that does not is not.
    """
    machine.write("proc/self/cgroup", cgroup)
    machine.write(file, f"usage_usec 9\nnr_periods 7\nnr_throttled 3\n{before}")

    def stopped(times: int, line: str) -> None:
        machine.write(file, f"usage_usec 9\nnr_periods 7\nnr_throttled {times}\n{line}")

    found = noticed(machine, after=lambda: stopped(8, after))
    assert found == [Notice("the control group's quota stopped it 5x, 0.40 s", True)]
    assert noticed(machine, after=lambda: None) == []
    assert noticed(machine, after=lambda: stopped(9, after)) == [
        Notice("the control group's quota stopped it 1x, 0.00 s", False)
    ]


def test_heat(machine: Machine) -> None:
    """Cores of this process, or their package, that are slowed for heat disturb; others' do not."""
    for what in ("core", "package"):
        machine.write(f"{machine.cpu}/thermal_throttle/{what}_throttle_count", 4)
    machine.write("sys/devices/system/cpu/cpu99999/thermal_throttle/core_throttle_count", 1)

    def hot(count: int, cpu: str) -> None:
        machine.write(f"{cpu}/thermal_throttle/core_throttle_count", count)

    assert noticed(machine, after=lambda: hot(7, machine.cpu)) == [
        Notice("cores were slowed for heat 3x", True)
    ]
    assert noticed(machine, after=lambda: hot(9, "sys/devices/system/cpu/cpu99999")) == []


@pytest.mark.parametrize(
    ("khz", "text"),
    [(2_500_000, "the clock went from 3500 to 2500 MHz"), (3_400_000, ""), (4_200_000, "4200")],
)
def test_clocks(machine: Machine, khz: int, text: str) -> None:
    """A clock that changes by more than a tenth disturbs, whichever way it goes."""
    file = f"{machine.cpu}/cpufreq/scaling_cur_freq"
    machine.write(file, 3_500_000)
    found = noticed(machine, after=lambda: machine.write(file, khz))
    assert [n.disturbs for n in found] == [True] * bool(text)
    assert all(text in n.text for n in found)


def test_nothing_is_made_up(machine: Machine) -> None:
    """Where files are missing, empty or rubbish nothing is told, nor of a time too short for their
    ticks.
    """
    assert noticed(machine, after=lambda: None) == []
    for rubbish in ("", "cpu", "cpu a b", "nr_throttled", "-"):
        for path in (
            "proc/stat",
            "proc/self/cgroup",
            "sys/fs/cgroup/cpu.stat",
            f"{machine.cpu}/cpufreq/scaling_cur_freq",
            f"{machine.cpu}/thermal_throttle/core_throttle_count",
        ):
            machine.write(path, rubbish)
        assert noticed(machine, after=lambda: None) == []
    machine.stat(1000, 0)
    assert noticed(machine, 0.1, after=lambda: machine.stat(1000, 500)) == []


def test_this_machine() -> None:
    """The files that are here can be read."""
    watched = Surroundings()
    assert isinstance(watched.noticed(), list)


@pytest.mark.parametrize("disturbs", [True, False])
def test_it_is_written_down(disturbs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was noticed is kept with a measurement, marks it where it disturbs, and is what its
    record says of that; short measurements are not watched.
    """
    notice = Notice("cores were slowed for heat 3x", disturbs)
    monkeypatch.setattr(Surroundings, "noticed", lambda _: [notice])
    monkeypatch.setattr(timing.Contention, "share", lambda _: 0.0)
    monkeypatch.setattr(timing.disturbance, "why", lambda *_: "")
    measured = timing.measure({"f": lambda: None}, 0.2, rounds=1)
    assert (measured.noticed, measured.busy) == ((notice.text,), disturbs)
    assert timing.measure({"f": lambda: None}, 0.01, rounds=1).noticed == ()
    kept = record(busy=measured.busy, noticed=measured.noticed)
    assert kept.disturbance == (notice.text if disturbs else "")
