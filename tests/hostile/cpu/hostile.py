"""Schedules that do to their process, and to others, what generated code may do by mistake.

What is `HARMLESS` is right whatever it does besides; all others cost their trial. None goes on
without end where nobody stops it, and none sends a signal where the system does not refuse it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, row_sums

MOST = int(os.environ.get("LNTUNE_TEST_MOST", str(2 << 30)))
"""Bytes that are taken at most."""
DESCRIPTORS = range(3, 256)
GARBAGE = b'{"status":"ok"}\nREADY\nTAKEN\n'


def harmless() -> None:
    """Does nothing."""


def writes_everywhere() -> None:
    """A kernel that writes on every descriptor."""
    _write(GARBAGE * 3)


def writes_a_part() -> None:
    """Three bytes, and no end of a line."""
    _write(b"\0\1\2")


def writes_without_end() -> None:
    """A line of 256 MiB."""
    for _ in range(4096):
        _write(b"x" * (1 << 16))


def writes_while_it_answers() -> None:
    """A thread that writes some bytes all the time, before the answer, within it and behind it."""

    def write() -> None:
        for _ in range(20_000):
            _write(b"noise")
            time.sleep(0.0005)

    threading.Thread(target=write, daemon=True).start()
    time.sleep(0.01)


def writes_later() -> None:
    """A thread that writes some bytes when its trial is long over."""
    threading.Timer(0.1, _write, (b"noise",)).start()


def closes_everything() -> None:
    """Closes every descriptor."""
    os.closerange(0, 256)


def reads_everything() -> None:
    """Waits for something on every descriptor."""
    for descriptor in DESCRIPTORS:
        with contextlib.suppress(OSError):
            os.read(descriptor, 1 << 16)


def reads_standard_input() -> None:
    """Reads its standard input to the end."""
    assert os.read(0, 1 << 16) == b""


def prints_without_end() -> None:
    """256 MiB on its standard outputs."""
    for _ in range(2048):
        os.write(1, b"y" * (1 << 16))
        os.write(2, b"y" * (1 << 16))


def kills_its_parent() -> None:
    """SIGKILL for the tuner."""
    _send(os.getppid(), signal.SIGKILL)


def ends_its_parent() -> None:
    """SIGTERM for the tuner."""
    _send(os.getppid(), signal.SIGTERM)


def stops_its_parent() -> None:
    """SIGSTOP for the tuner, which would stand still for ever."""
    _send(os.getppid(), signal.SIGSTOP)


def kills_its_parents_group() -> None:
    """SIGKILL for the tuner and all that a shell started with it."""
    _send(-os.getpgid(os.getppid()), signal.SIGKILL)


def kills_everybody() -> None:
    """SIGKILL for all processes that it may end."""
    _send(-1, signal.SIGKILL)


def kills_its_siblings() -> None:
    """SIGKILL for what else the tuner has started, as builders are."""
    siblings = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getppid():
                siblings.append(int(path.parent.name))
    for pid in siblings:
        if pid != os.getpid():
            _send(pid, signal.SIGKILL)


def kills_itself() -> None:
    """SIGKILL for its own process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stops_itself() -> None:
    """Its own process stands still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def ignores_signals() -> None:
    """Ignores all that can be, and never ends."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)


def holds_the_interpreter() -> None:
    """Sleeps in C, and no other thread of Python runs."""
    ctypes.PyDLL(None).sleep(3600)


def eats_memory() -> None:
    """Takes memory until there is none."""
    kept = []
    for _ in range(MOST >> 24):
        block = mmap.mmap(-1, 1 << 24)
        block.write(b"x" * (1 << 24))
        kept.append(block)
    raise MemoryError(f"nobody has stopped it at {MOST} bytes")


def eats_shared_memory() -> None:
    """Takes memory as files that no process holds."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        for _ in range(MOST >> 24):
            file.write(b"x" * (1 << 24))
        raise MemoryError(f"nobody has stopped it at {MOST} bytes")


def eats_memory_elsewhere() -> None:
    """A process of its own session takes memory, while it waits for that."""
    code = f"import time; kept = [bytearray(b'x') * (1 << 24) for _ in range({MOST >> 24})]"
    words = [sys.executable, "-c", f"{code}; time.sleep(60)"]
    subprocess.run(words, start_new_session=True, check=False)


def fills_the_disk() -> None:
    """Writes files into its temporary folder until it is full."""
    for number in range(MOST >> 24):
        Path(tempfile.gettempdir(), f"part{number}").write_bytes(b"x" * (1 << 24))
    raise OSError(f"nobody has stopped it at {MOST} bytes")


def writes_a_long_file() -> None:
    """A file that would have four terabytes."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.seek(1 << 42)
        file.write(b"x")


def forks_without_end() -> None:
    """Starts processes that start processes, some in sessions of their own."""
    most, begun = int(os.environ.get("LNTUNE_TEST_FORKS", "200")), time.monotonic()
    number = 0
    while number < most and time.monotonic() < begun + 30:
        number += 1
        if not os.fork():
            if number % 3 == 0:
                os.setsid()
            time.sleep(60)
            os._exit(0)
    time.sleep(60)


def starts_threads_without_end() -> None:
    """Starts threads that sleep."""
    most = int(os.environ.get("LNTUNE_TEST_FORKS", "200"))
    threading.stack_size(1 << 16)
    for _ in range(most):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(60)


def leaves_a_daemon() -> None:
    """Ends, and leaves a process that nobody waits for, in a session of its own."""
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(600)
        os._exit(0)
    time.sleep(0.2)
    os.abort()


def leaves_shared_memory() -> None:
    """Ends, and leaves a file in memory, as libraries do that are killed."""
    Path(f"/dev/shm/torch_{os.getpid()}_1").write_bytes(b"x")
    os.abort()


def dumps_its_memory() -> None:
    """Ends so that the system would keep gigabytes of it."""
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    os.abort()


def _write(content: bytes) -> None:
    for descriptor in DESCRIPTORS:
        with contextlib.suppress(OSError):
            os.write(descriptor, content)


def _send(pid: int, number: int) -> None:
    if "Seccomp:\t2" not in Path("/proc/self/status").read_text():
        raise RuntimeError("nothing keeps its signals")
    os.kill(pid, number)


@dataclass(frozen=True)
class Knobs:
    """Knobs without effect, so that there is something to search."""

    first: int = knob(1, (1, 2), "nothing")
    second: bool = knob(False, (False, True), "nothing")


HARMLESS = (harmless, reads_standard_input, prints_without_end)
ACTS = (
    *HARMLESS,
    writes_everywhere,
    writes_a_part,
    writes_without_end,
    writes_while_it_answers,
    writes_later,
    closes_everything,
    reads_everything,
    kills_its_parent,
    ends_its_parent,
    stops_its_parent,
    kills_its_parents_group,
    kills_everybody,
    kills_its_siblings,
    kills_itself,
    stops_itself,
    ignores_signals,
    holds_the_interpreter,
    eats_memory,
    eats_shared_memory,
    eats_memory_elsewhere,
    fills_the_disk,
    writes_a_long_file,
    forks_without_end,
    starts_threads_without_end,
    leaves_a_daemon,
    leaves_shared_memory,
    dumps_its_memory,
)


def _schedule(act: Callable[[], None]) -> Schedule:
    def apply(case: Case, knobs: Knobs, device: Device) -> Any:
        import tvm

        act()
        definition = ops.get(case.op).define(case, row_sums.plain_sum)
        return tvm.IRModule(
            {"main": alignment.element_aligned(definition).with_attr("global_symbol", "main")}
        )

    return Schedule(
        act.__name__,
        "layer_norm",
        "cpu",
        Knobs,
        lambda case, device: Knobs(),
        lambda knobs, case, device: None,
        apply,
    )


SCHEDULES = tuple(_schedule(act) for act in ACTS)
