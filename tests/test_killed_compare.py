"""`lntune compare --measure` that is killed, stopped or interrupted in the middle of a case."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grids import exhaustive
from places import Place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


@pytest.fixture
def place(tmp_path: Path, cache_dir: Path) -> Iterator[Place]:
    """A place with what the run has built of ours and of layer norm; nothing of it lives on."""
    folders = Place(tmp_path)
    for name in ("runtime", "kernels/layer_norm"):
        if (cache_dir / name).is_dir():
            # not what other tests have built of it for GPUs and for the emulator
            ignored = shutil.ignore_patterns(".*", "*.checked", "*.gpu", "*.emulated")
            shutil.copytree(cache_dir / name, folders.cache / name, ignore=ignored)
    yield folders
    folders.end()


def started(place: Place) -> subprocess.Popen[str]:
    """The command, whose first case is logged and whose second is being measured."""
    run = place.start("compare")
    until = time.monotonic() + 300
    while not any(f.read_bytes().count(b"\n") for f in place.logs.rglob("*.jsonl")):
        if run.poll() is not None or time.monotonic() > until:
            pytest.fail(f"{run.poll()}: {run.communicate()}")
        time.sleep(0.01)
    time.sleep(0.3)
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, exhaustive(signal.SIGINT)])
def test_interrupted(number: signal.Signals, place: Place) -> None:
    """Ctrl-C and SIGTERM end it with a comparison of the case that is done and a sentence that says
    that it was interrupted; no process and no file is left.
    """
    run = started(place)
    run.send_signal(number)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == (0 if number == signal.SIGINT else 143), errors
    assert "interrupted; compared is what is in the log" in errors
    assert "Traceback" not in errors
    result = json.loads(said)
    assert len(result["cases"]) == 1
    assert place.ended() == {} and place.left() == []


def test_killed(place: Place) -> None:
    """After kill -9 nothing lives or lies about, and every line of the log is whole."""
    run = started(place)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert place.ended() == {} and place.left() == []
    assert [r.role for r in place.records()] == ["comparison"]


@pytest.mark.exhaustive
def test_stopped_and_continued(place: Place) -> None:
    """A command that is stopped for a while, with all it has started, goes on to its end."""
    run = started(place)
    stopped = [*place.alive()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert len(json.loads(said)["cases"]) == 2
    assert place.ended() == {} and place.left() == []
