"""Whole commands that are killed at random moments, and bringups that SIGTERM ends: no torn line,
no orphan, nothing left but lock files, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grids import exhaustive
from places import Place, repeated

from lntune.measure.jobs import Candidate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

KILLS = int(os.environ.get("LNTUNE_TEST_KILLS", "1"))
"""How often each command is killed."""


@pytest.fixture
def place(tmp_path: Path, cache_dir: Path) -> Iterator[Place]:
    """A place; nothing of it lives on, whatever a test finds. What is compiled of ours is taken
    from the run's.
    """
    folders = Place(tmp_path)
    shutil.copytree(
        cache_dir / "runtime", folders.cache / "runtime", ignore=shutil.ignore_patterns(".*")
    )
    yield folders
    folders.end()


@pytest.fixture(scope="module", autouse=True)
def compiled(cache_dir: Path) -> None:
    """What is compiled of ours, in the run's cache."""
    from lntune.backends.cpu import runtime
    from lntune.kernels import direct
    from lntune.torch import layer_norm_node

    runtime.ensure_library()
    direct.ensure_library()
    assert not layer_norm_node.reason_missing()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tune", "bringup"])
def test_killed_at_any_moment(name: str, place: Place) -> None:
    """kill -9 of the command itself, while it is imported, compiles, measures or writes: every line
    of the log is whole and stays, all it started ends, and nothing is left. A run that ends before
    its moment ends well, and so does the last one, which is not killed.

    Every third begins with an empty cache where there are many. In every run the tests below have
    moments that are chosen.
    """
    moments = random.Random(f"{name} {KILLS}")
    longest, before, ways = 7.0, [], []
    for number in range(KILLS):
        if KILLS > 5 and number % 3 == 0:
            shutil.rmtree(place.cache)
            place.cache.mkdir()
        begun = time.monotonic()
        run = place.start(name, "--seed", number)
        try:
            _, errors = run.communicate(timeout=moments.uniform(0, longest))
            assert run.returncode == 0, errors
            longest = min(longest, time.monotonic() - begun)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.communicate()
            assert run.returncode == -signal.SIGKILL
        ways.append(f"{time.monotonic() - begun:.1f} s: {run.returncode}")
        assert place.ended() == {}, ways
        now = place.records()
        assert now[: len(before)] == before
        assert place.left() == [], ways
        before = now
    last = place.start(name)
    facts, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert json.loads(facts)
    assert [r for r in place.records() if r in before] == before
    assert any(r.role == "final" and r.status == "ok" for r in place.records())
    if name == "tune":  # a bringup's smoke check is made again
        assert repeated(place.records()) == []
    assert place.ended() == {} and place.left() == []
    print(*ways, sep="\n")


WHEN: dict[str, Callable[[Place], bool]] = {
    "starting": lambda place: len(place.alive()) > 1,
    "searching": lambda place: logs_have(place, 1),
    "with one stopped": lambda place: logs_have(place, 1) and one_is_stopped(place),
    "in the final": lambda place: logs_have(place, 2),
}


def one_is_stopped(place: Place) -> bool:
    """A process stands still, while another one measures."""
    states = []
    for pid in place.alive():
        with contextlib.suppress(OSError):  # it has ended
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return "T" in states


def logs_have(place: Place, trials: int) -> bool:
    """So many trials are logged, whole or not."""
    return any(f.read_bytes().count(b'"trial"') >= trials for f in place.logs.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "when", ["with one stopped", *map(exhaustive, ("starting", "searching", "in the final"))]
)
def test_a_tuner_that_is_killed(when: str, place: Place) -> None:
    """kill -9 of the tuner alone, while its workers start, between trials, while one of them is
    stopped, or in the final: the workers and all they started end, nothing but the log is left,
    and the same command goes on from it, with the trials that were logged and without making one of
    them again.
    """
    run = place.start("tune")
    until = time.monotonic() + 300
    while not WHEN[when](place):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert place.ended() == {} and place.left() == []
    before = place.records()
    assert not any(r.role == "final" for r in before)
    known = {Candidate.of_record(r) for r in before if not r.disturbance}
    last = place.start("tune")
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    facts = json.loads(said)
    assert facts["earlier_trials"] == len(known) and facts["trials"] == 2
    now = place.records()
    assert now[: len(before)] == before and repeated(now) == []
    assert [r.role for r in now[len(before) :]] == ["trial", "trial", "final"]
    assert place.ended() == {} and place.left() == []


def tuning(place: Place, _: list[str]) -> bool:
    """A trial of the tuner's is logged, beside those of the smoke check."""
    return any(f.read_bytes().count(b'"trial"') >= 3 for f in place.logs.rglob("*.jsonl"))


def says(word: str) -> Callable[[Place, list[str]], bool]:
    """A line of what the command says begins with a word."""
    return lambda _, lines: any(line.startswith(word) for line in lines)


# The first stage is not in hand before the command is imported, so a moment is the end of the stage
# before.
MOMENTS = {"smoke": says("copy:"), "tune": tuning, "verify": says("tune:")}
KEPT = {
    "smoke": ["doctor", "copy"],
    "tune": ["doctor", "copy", "smoke"],
    "verify": ["doctor", "copy", "smoke", "tune"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["tune", *map(exhaustive, ("smoke", "verify"))])
def test_a_bringup_that_is_ended(moment: str, place: Place) -> None:
    """SIGTERM in the middle of a stage ends a bringup with exit code 143 and a summary of what was
    found, printed and in the folder asked for; what was measured is in the log, and nothing is
    left.
    """
    run = place.start("bringup", *(["--trials", "1000"] if moment == "tune" else ["--trials", "1"]))
    lines: list[str] = []
    assert run.stderr is not None and run.stdout is not None
    reader = threading.Thread(
        target=lambda: lines.extend(iter(run.stderr.readline, "")), daemon=True
    )  # type: ignore[union-attr]
    reader.start()
    until = time.monotonic() + 300
    while not MOMENTS[moment](place, lines):
        assert run.poll() is None and time.monotonic() < until, lines
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    summary = json.loads(run.stdout.read())
    assert run.wait(60) == 143
    reader.join(60)
    assert summary["interrupted"]
    stages = [stage["name"] for stage in summary["stages"]]
    assert stages in (KEPT[moment], [*KEPT[moment], moment]), "at most the stage in hand was done"
    written = json.loads((place.out / "summary.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == stages
    logged = place.records()
    assert len(summary["smoke"]) == len(
        [r for r in logged if r.role == "trial" and r.case.hidden >= 1000]
    )
    assert bool(summary["tuned"]) == any(r.role == "final" for r in logged) == (moment != "smoke")
    assert place.ended() == {} and place.left() == []
