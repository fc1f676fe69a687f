"""Temporary folders of processes that are killed: nothing of what they and their compilers made stays."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from lntune import paths, scratch, toolchain
from lntune.errors import BuildError
from lntune.scratch import Scratch
from lntune.worker import Worker

KEPT = "import os, signal, tempfile; tempfile.mkstemp(prefix='cc'); tempfile.mkdtemp(prefix='tmpxft'); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of the test's own."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch.compile has set it where it was used before
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


def test_an_interrupt_of_a_compiler_leaves_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that an interrupt ends."""

    def interrupted(*_: object, env: dict[str, str], **__: object) -> None:
        (Path(env["TMPDIR"]) / "cc1.s").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toolchain.run(["c++"])
    assert left(temporary) == []


def test_a_worker_leaves_nothing(temporary: Path) -> None:
    """What a worker's compilers have in TMPDIR is removed with the worker, which is killed in any case; private caches are no part of it."""

    class Dying(Worker):
        program = KEPT

    with pytest.raises(BuildError, match="did not start"), Dying() as worker:
        worker.start()
    assert left(temporary) == []


def test_folders_that_last_are_the_systems(temporary: Path) -> None:
    """A child's private cache and what torch.compile built lie in the system's temporary folder, not in the child's own."""
    own = Scratch()
    code = f"import sys; sys.path[:] = {sys.path!r}; from lntune import paths, scratch; print(scratch.system()); print(paths.private())"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", own.environment)
        said = toolchain.subprocess.run([sys.executable, "-c", code], env=own.environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(temporary), str(paths._private(str(temporary)))]
    assert own.environment["TMPDIR"] != str(temporary)
    assert Path(own.environment["TORCHINDUCTOR_CACHE_DIR"]).parent == temporary
    own.remove()


def test_what_a_killed_process_left_goes_with_the_next(temporary: Path) -> None:
    """A folder that nobody holds is removed when another is made; one that is held stays, and so does a young one."""
    dead, young = temporary / "lntune-scratch-dead", temporary / "lntune-scratch-young"
    for folder in (dead, young):
        folder.mkdir()
        (folder / "cc1.s").touch()
    held = Scratch()
    long_ago = 1_000_000_000
    for folder in (dead, Path(held.environment["TMPDIR"])):
        os.utime(folder, (long_ago, long_ago))
    other = Scratch()
    assert not dead.exists() and young.exists() and Path(held.environment["TMPDIR"]).exists()
    other.remove()
    held.remove()
    assert left(temporary) == [young.name]


def test_no_folder_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room the child has the environment of its parent."""
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    own = Scratch()
    assert own.environment == dict(os.environ)
    own.remove()
