"""Temporary folders of processes that are killed: nothing of what they and their compilers made
stays.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from lntune.errors import BuildError
from lntune.measure.worker import Worker
from lntune.system import paths, scratch, toolchain
from lntune.system.scratch import Scratch

KEPT = (
    "import os, signal, tempfile; tempfile.mkstemp(prefix='cc'); tempfile.mkdtemp(prefix='tmpxft');"
    " os.kill(os.getpid(), signal.SIGKILL)"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of the test's own."""
    # torch.compile has set it where it was used before
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv(scratch.SYSTEM, raising=False)
    return folder


def left(folder: Path) -> list[str]:
    """What is in a folder."""
    return [f.name for f in folder.iterdir()]


def test_a_program_that_is_killed_leaves_nothing(temporary: Path) -> None:
    """What a compiler has in TMPDIR when it dies is removed."""
    assert toolchain.run([sys.executable, "-c", KEPT]).returncode < 0
    assert left(temporary) == []


def test_an_interrupt_of_a_compiler_leaves_nothing(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that an interrupt ends, and what it has started ends too."""
    started = []
    communicate = subprocess.Popen.communicate

    def interrupted(process: Any, *arguments: Any, **named: Any) -> Any:
        if "sleep" not in str(process.args):
            return communicate(process, *arguments, **named)
        while not [f for f in temporary.glob("*/*") if f.name == "started"]:
            time.sleep(0.01)
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toolchain.run(["sh", "-c", "sleep 600 & touch $TMPDIR/started; wait"])
    assert left(temporary) == [] and nothing_of(started[0])


def test_a_worker_leaves_nothing(temporary: Path) -> None:
    """What a worker's compilers have in TMPDIR is removed with the worker, which is killed in any
    case; private caches are no part of it.
    """

    class Dying(Worker):
        program = KEPT

    with pytest.raises(BuildError, match="did not start"), Dying() as worker:
        worker.start()
    assert left(temporary) == []


def test_folders_that_last_are_the_systems(temporary: Path) -> None:
    """A child's private cache and what torch.compile built lie in the system's temporary folder,
    not in the child's own.
    """
    own = Scratch()
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from lntune.system import paths, scratch;"
        " print(scratch.system()); print(paths.private())"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", own.environment)
        output = toolchain.subprocess.run(
            [sys.executable, "-c", code],
            env=own.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert output.split() == [str(temporary), str(paths._private(str(temporary)))]
    assert own.environment["TMPDIR"] != str(temporary)
    assert Path(own.environment["TORCHINDUCTOR_CACHE_DIR"]).parent == temporary
    own.remove()


def test_what_a_killed_process_left_goes_with_the_next(temporary: Path) -> None:
    """A folder that nobody holds is removed when another is made; one that is held stays."""
    dead = temporary / "lntune-scratch-dead"
    dead.mkdir()
    (dead / "cc1.s").touch()
    held = Scratch()
    other = Scratch()
    assert not dead.exists() and Path(held.environment["TMPDIR"]).exists()
    other.remove()
    held.remove()
    assert left(temporary) == []


def test_files_that_a_killed_child_was_making(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie where they will be found, and go with its folder; so do those beside them."""
    cache, own = tmp_path / "cache", Scratch()
    monkeypatch.setattr(os, "environ", own.environment)
    with pytest.raises(FileNotFoundError), scratch.whole(cache / "kernel.so") as half:
        half.with_suffix(".cc").touch()
        (cache / "of another.so").touch()
        own.remove()
        assert left(cache) == ["of another.so"]
    assert left(temporary) == []


def test_a_folder_that_was_thought_left(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that another process removes before it is locked is made again, and so is one that
    it is about to remove.
    """
    hold, folders = scratch._held, list[str]()

    def held(folder: str) -> int:
        folders.append(folder)
        if len(folders) == 1:
            raise BlockingIOError
        descriptor = hold(folder)
        if len(folders) == 2:
            Path(folder).rmdir()
        return descriptor

    monkeypatch.setattr(scratch, "_held", held)
    own = Scratch()
    assert len(folders) == 3 and own.environment["TMPDIR"] == folders[2]
    own.remove()


OUTLIVED = """
import sys, time
sys.path[:] = sys.argv[2:]
from lntune.measure.worker import Worker
class Busy(Worker):
    program = sys.argv[1]
with Busy() as worker:
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""
COMPILES = """
import os, pathlib, subprocess, sys
sys.path[:] = sys.argv[3:]
from lntune.measure import frames
from lntune.system import scratch
with scratch.whole(pathlib.Path(os.environ["CACHE"], "kernel.so")):
    compiler = subprocess.Popen(["sleep", "600"])
    frames.send(int(sys.argv[1]), frames.packed(frames.receive(0)[0], frames.READY))
    compiler.wait()
"""
ITSELF = """
import os, pathlib, sys
sys.path[:] = sys.argv[2:]
from lntune.system import scratch, toolchain
cache = pathlib.Path(os.environ["CACHE"])
cache.mkdir()
files = "touch $TMPDIR/cc1.s $CACHE/kernel.so; echo $$ >$CACHE/../group"
os.environ["CXX"] = f"sh -c 'sleep 600 & {files}; wait'"
toolchain.run_compiler([], cache / "kernel.so")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("program", ["a worker's compiler", "a compiler of its own"])
def test_a_process_that_is_killed(program: str, temporary: Path, tmp_path: Path) -> None:
    """kill -9 of a process: what it has started ends, workers and compilers, and temporary folders
    and the files that were being made are removed at once.
    """
    cache = tmp_path / "cache"
    environment = {**os.environ, "TMPDIR": str(temporary), "CACHE": str(cache)}
    code = OUTLIVED if program == "a worker's compiler" else ITSELF
    parent = subprocess.Popen(
        [sys.executable, "-c", code, COMPILES, *sys.path], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    if code == ITSELF:
        while not ((marker := tmp_path / "group").exists() and marker.read_text().endswith("\n")):
            time.sleep(0.01)
        worker = int(marker.read_text())
    else:
        worker = int(parent.stdout.readline())
    assert left(temporary) and left(cache) and group(worker)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 60
    while time.monotonic() < until and (left(temporary) or left(cache) or group(worker)):
        time.sleep(0.01)
    assert (left(temporary), left(cache), group(worker)) == ([], [], [])


def nothing_of(leader: int) -> bool:
    """True when a process group has ended, after a while at most."""
    until = time.monotonic() + 60
    while group(leader) and time.monotonic() < until:
        time.sleep(0.01)
    return not group(leader)


def group(leader: int) -> list[str]:
    """The processes of a group that have not ended."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            if int(rest.split()[2]) == leader and rest.split()[0] != "Z":
                processes.append(name)
    return processes


def test_no_folder_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room the child has the environment of its parent."""
    monkeypatch.setattr(
        tempfile,
        "mkdtemp",
        lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    own = Scratch()
    assert own.environment == dict(os.environ)
    own.remove()
