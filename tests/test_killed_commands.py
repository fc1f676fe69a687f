"""Whole commands that are killed at random moments, and bringups that SIGTERM ends: no torn line,
no orphan, nothing left but lock files, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from grids import exhaustive

from lntune.log import records
from lntune.log.records import Record
from lntune.measure.jobs import Candidate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

KILLS = int(os.environ.get("LNTUNE_TEST_KILLS", "1"))
"""How often each command is killed."""
GRACE = 60.0
"""Seconds that what a killed command has started may take to end on a machine that is busy; it
takes some milliseconds.
"""
MARK = "LNTUNE_TEST_PLACE"
# Whatever the budget, what is measured at the end of a stage is measured briefly.
BRIEF = """
from lntune.commands import bringup
from lntune.backends.cpu import backend
from lntune.commands.bringup import steps
from lntune.tune import times
backend._COPIED, steps.COPY_SECONDS = 1 << 24, 0.05
times.FINAL_SHARE, bringup.BENCH_SECONDS = 1e-4, 0.05
from lntune.cli import main
main()
"""
COMMANDS = {
    "tune": [
        "tune",
        "layer_norm",
        "--hidden",
        "65",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--trials",
        "2",
        "--budget",
        "300s",
    ],
    "bringup": [
        "bringup",
        "--target",
        "cpu",
        "--grid",
        "small",
        "--ops",
        "layer_norm",
        "--no-compile",
        "--trials",
        "2",
        "--budget",
        "300s",
    ],
}


class Place:
    """Folders of a command's own: its cache, its logs, its output, the system's temporary folder as
    it sees it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache, self.logs, self.out, self.tmp = (
            folder / name for name in ("cache", "logs", "out", "tmp")
        )
        self.cache.mkdir()
        self.tmp.mkdir()
        self.environment = {
            name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"
        }
        self.environment |= {
            "LNTUNE_CACHE_DIR": str(self.cache),
            "TMPDIR": str(self.tmp),
            MARK: str(folder),
        }
        self.environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)

    def start(self, name: str, *more: object) -> subprocess.Popen[str]:
        """One of COMMANDS as a user runs it, but for BRIEF."""
        output = ("--output", self.out) if name == "bringup" else ()
        arguments = [*COMMANDS[name], "--log-dir", self.logs, "--json", *output, *more]
        command = [sys.executable, "-c", BRIEF, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def alive(self) -> dict[int, str]:
        """The processes of this place, by id: its commands and all that they started, compilers
        too.
        """
        processes = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.folder}".encode() in (process / "environ").read_bytes().split(
                    b"\0"
                ):
                    processes[int(process.name)] = (
                        (process / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
            except OSError:  # it has ended, or is another user's
                continue
        return processes

    def end(self) -> None:
        """End all processes that are there."""
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def ended(self) -> dict[int, str]:
        """What lives on after a while; at best nothing."""
        until = time.monotonic() + GRACE
        while (processes := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        return processes

    def records(self) -> list[Record]:
        """What is in the logs, every line of which is a record."""
        lines = []
        for path in self.logs.rglob("*.jsonl"):
            content = path.read_bytes()
            assert not content or content.endswith(b"\n"), "the last line is torn"
            lines += [
                msgspec.json.decode(line, type=dict[str, Any]) for line in content.splitlines()
            ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = records.read([self.logs])
        assert len(read) == len(lines)
        return read

    def left(self) -> list[str]:
        """Files that are neither records nor summaries nor built kernels, and folders in the
        temporary one.
        """
        kept = [
            path
            for path in self.tmp.iterdir()
            if not path.name.startswith(("torchinductor_", f"lntune-{os.getuid()}"))
        ]
        for folder, suffixes in (
            (self.logs, (".jsonl", ".lock")),
            (self.out, (".json", ".txt")),
            (self.cache, (".so", ".lock")),
        ):
            kept += [
                p
                for p in folder.rglob("*")
                if p.is_file() and (p.suffix not in suffixes or p.name.startswith("."))
            ]
        return [str(path.relative_to(self.folder)) for path in kept]


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


@pytest.mark.parametrize("name", ["tune", exhaustive("bringup")])
def test_killed_at_any_moment(name: str, place: Place) -> None:
    """kill -9 of the command itself, while it is imported, compiles, measures or writes: every line
    of the log is whole and stays, all it started ends, and nothing is left. A run that ends before
    its moment ends well, and so does the last one, which is not killed.

    Every third begins with an empty cache where there are many.
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


def repeated(logged: list[Record]) -> list[Record]:
    """Trials that were made though an earlier one of the same, undisturbed, is in the log."""
    made, twice = set(), []
    for record in logged:
        if record.role == "trial":
            one = (record.case, Candidate.of_record(record))
            twice += [record] if one in made else []
            made |= set() if record.disturbance else {one}
    return twice


WHEN: dict[str, Callable[[Place], bool]] = {
    "starting": lambda place: len(place.alive()) > 1,
    "searching": lambda place: logs_have(place, 1),
    "in the final": lambda place: logs_have(place, 2),
}


def logs_have(place: Place, trials: int) -> bool:
    """So many trials are logged, whole or not."""
    return any(f.read_bytes().count(b'"trial"') >= trials for f in place.logs.rglob("*.jsonl"))


@pytest.mark.parametrize("when", ["searching", *map(exhaustive, ("starting", "in the final"))])
def test_a_tuner_that_is_killed(when: str, place: Place) -> None:
    """kill -9 of the tuner alone, while its worker starts, between trials or in the final: the
    worker and all it started end, nothing but the log is left, and the same command goes on from
    it, with the trials that were logged and without making one of them again.
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
