"""kill -9 at any moment: no torn line, no orphan, nothing left but lock files, and the next run
goes on.
"""

from __future__ import annotations

import io
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lntune.case import Case
from lntune.device import Device
from lntune.log import records
from lntune.log.records import LogWarning, Record, Timing
from lntune.system import native, scratch

DEVICE = Device("cpu", "Test CPU", "x86-64-v3", 2)


def a_record(message: str) -> Record:
    """A record of some length."""
    timings = {"tuned": Timing(tuple(map(float, range(1, 301))), 1.0)}
    case = Case("layer_norm", 1024, "float32", 64)
    return Record(
        case=case,
        device=DEVICE,
        threads=2,
        schedule="s",
        knobs={},
        status="ok",
        timings=timings,
        message=message,
        time=f"2026-01-0{message[0]}T00:00:00.000+00:00",
    )


def killed_in(work: Callable[[], None]) -> None:
    """Do work in a child of this process; it ends by SIGKILL, or well."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)


def die(*_: Any, **__: Any) -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Torn(io.FileIO):
    """A file of which `share` of a write arrives before the process is killed."""

    share = 0.5

    def write(self, data: Any, /) -> int:
        """Write a part, and die."""
        super().write(bytes(data)[: int(len(data) * self.share)])
        die()
        raise AssertionError


def at_write(share: float) -> Callable[[], None]:
    """Have this process die when so much of a write is done."""

    def prepare() -> None:
        Torn.share = share
        Path.open = lambda self, mode="r", **_: (
            Torn(self, "ab") if "a" in mode else io.FileIO(self, mode.replace("b", ""))
        )  # type: ignore[method-assign, assignment]

    return prepare


def failing_then_dying() -> None:
    """A full disk is found on flushing, and the process dies when it takes back what it wrote."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    os.fsync, os.ftruncate = full, die  # type: ignore[assignment]


MOMENTS = {
    "before the lock": lambda: setattr(__import__("fcntl"), "flock", die),
    "nothing written": at_write(0.0),
    "half written": at_write(0.5),
    "all but the end": at_write(0.999),
    "all written": at_write(1.0),
    "flush": lambda: setattr(os, "fsync", die),
    "truncation": failing_then_dying,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_record_is_whole_or_not_there(moment: str, tmp_path: Path) -> None:
    """Killed at any step of appending, a log keeps all it had, the record in hand is whole or
    skipped, the next one is whole, and beside the log there is its lock file alone.
    """
    records.append(tmp_path, a_record("1 before"))

    def work() -> None:
        MOMENTS[moment]()
        records.append(tmp_path, a_record("2 killed"))

    killed_in(work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogWarning)
        messages = [r.message for r in records.read([tmp_path])]
        assert messages == [
            "1 before",
            *(
                ["2 killed"]
                if moment in ("all written", "flush", "truncation") or "2 killed" in messages
                else []
            ),
        ]
        records.append(tmp_path, a_record("3 after"))
        assert [r.message for r in records.read([tmp_path])] == [*messages, "3 after"]
    assert sorted(f.suffix for f in tmp_path.rglob("*") if f.is_file()) == [".jsonl", ".lock"]


@pytest.mark.parametrize("moment", ["begun", "half written", "before the name", "after the name"])
def test_a_built_file_is_whole_or_not_there(moment: str, tmp_path: Path) -> None:
    """Killed while it is stored, a built file has its name with all its content or not at all; what
    is left is removed by the next build in that folder, of whatever kernel.
    """
    path = tmp_path / "kernel.so"

    def work() -> None:
        replace = Path.replace
        if moment == "before the name":
            Path.replace = die  # type: ignore[method-assign, assignment]
        if moment == "after the name":
            Path.replace = lambda self, target: (replace(self, target), die())  # type: ignore[method-assign, assignment, return-value]
        with native.atomic(path) as temporary:
            if moment == "begun":
                die()
            temporary.write_bytes(b"half")
            if moment == "half written":
                die()
            temporary.write_bytes(b"half and half")

    killed_in(work)
    assert path.exists() == (moment == "after the name")
    assert not path.exists() or path.read_bytes() == b"half and half"
    with native.atomic(tmp_path / "other.so") as temporary:
        temporary.write_bytes(b"new")
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        *(["kernel.so"] if moment == "after the name" else []),
        "other.so",
    ]


def test_what_others_write_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file of a process that lives is no leftover, nor is a young one of another
    machine, of whose processes nothing is known.
    """
    with native.atomic(tmp_path / "kernel.so"):
        (ours,) = tmp_path.iterdir()
        monkeypatch.setattr(scratch, "_alive", lambda pid: pid == os.getpid())
        elsewhere, old, dead = (
            ours.with_name(ours.name.replace(scratch._host(), host).replace(str(os.getpid()), pid))
            for host, pid in (("0" * 8, "77"), ("0" * 8, "78"), (scratch._host(), "79"))
        )
        for one in (elsewhere, old, dead):
            one.write_bytes(b"half")
        os.utime(old, (0, 0))
        with native.atomic(tmp_path / "other.so"):
            pass
        assert {*tmp_path.iterdir()} == {ours, elsewhere, tmp_path / "other.so"}
