"""Recording which cases the calls of a program go through, how often, and for how long.

While nothing is recorded this costs a direct call one look at a flag. While something is, calls are
counted where they are served: direct calls and backwards in C (`lntune/kernels/direct.c`), all
others here. What is timed is the kernel alone, or PyTorch's operators where they serve, every call
on a CPU and none on a GPU, where a call has only been launched when it returns.

Counts go to their files after a second, then at growing intervals, in the end every half minute,
and when the block or the process ends: one that is killed loses what was counted since. A forked
child counts its own from its beginning.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.kernels import direct
from lntune.log import cases
from lntune.log.cases import CasesWarning, Tallies, Tally, What
from lntune.system import callers
from lntune.system.forks import INNER, held_at_fork
from lntune.torch import apart, devices

VARIABLE = "LNTUNE_RECORD_CASES"
FIRST, MOST = 1.0, 30.0
"""Seconds after which counts are written first, and between two times at most; it doubles."""
MOST_COUNTED = 4096
"""Cases and numbers of rows that are kept apart until they are written; beyond, rows are counted as
those that stand for their bucket.
"""


class _Sink:
    """A file that is recorded to, and what was counted for it and not yet written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: Tallies = {}
        self.failed = False


SINKS: list[_Sink] = []
"""The files that are recorded to; nothing is counted while there are none."""
_lock = held_at_fork(threading.Lock(), INNER)
_writing = [threading.Lock()]
_counted: Tallies = {}
_tags: dict[tuple[Case, Device | None], int] = {}
_tagged: list[tuple[Case, Device | None]] = []
_timer: list[threading.Thread] = []
_changed: list[Callable[[bool], None]] = [direct.count_calls]


def on_change(told: Callable[[bool], None]) -> Callable[[bool], None]:
    """Have `told` called with whether calls are to be counted, when that changes."""
    _changed.append(told)
    return told


def tag(case: Case, device: Device | None) -> int:
    """The number under which C counts calls of a case, whatever its rows, on a device."""
    key = case.typical, device
    with _lock:
        if key not in _tags:
            _tags[key] = len(_tagged)
            _tagged.append(key)
        return _tags[key]


def noted(kernel: Callable[..., None], case: Case, device: Device | None) -> Callable[..., None]:
    """A kernel, or what stands for one, which counts its calls while something is recorded."""
    if not SINKS:
        return kernel

    def counting(*values: Any) -> None:
        with timing(case, device):
            kernel(*values)

    return counting


def timing(case: Case, device: Device | None) -> AbstractContextManager[None]:
    """A block that serves a call of a case, counted while something is recorded."""
    if not SINKS or apart.here():
        return _NOTHING
    return _timed(What(case.op, case.hidden, case.dtype, case.rows, case.variant, device))


def eager(op: str, tensor: Tensor, hidden: int, reason: str) -> AbstractContextManager[None]:
    """A block in which PyTorch serves a call that no kernel takes, for a reason; `tensor` is its
    input, in rows of `hidden` elements. Counted while something is recorded.
    """
    if not SINKS or apart.here():
        return _NOTHING
    try:
        rows = int(tensor.numel()) // hidden if hidden else 0
        dtype, device = str(tensor.dtype).removeprefix("torch."), devices.of(tensor.device)
        what = What(op, int(hidden), dtype, rows, "", device, reason[:200])
    except Exception:  # such as sizes that are not known
        return _NOTHING
    return _timed(what)


_NOTHING: AbstractContextManager[None] = nullcontext()


@contextlib.contextmanager
def _timed(what: What) -> Iterator[None]:
    """Count what the block does, if it ends well; on a CPU with its time."""
    begun = time.perf_counter_ns()
    yield
    us = (time.perf_counter_ns() - begun) / 1e3
    count(what, Tally(1, 1, us) if _is_timed(what.device) else Tally(1))


def _is_timed(device: Device | None) -> bool:
    """Whether a call has been done when it returns."""
    return device is None or device.kind == "cpu"


def count(what: What, tally: Tally) -> None:
    """Count calls."""
    if (others := getattr(_aside, "tallies", None)) is not None:
        others[what] = others.get(what, Tally()).plus(Tally(tally.calls))
        return
    with _lock:
        if what not in _counted and len(_counted) >= MOST_COUNTED:
            what = cases.typical(what)
        _counted[what] = _counted.get(what, Tally()).plus(tally)


_aside = threading.local()


@contextlib.contextmanager
def aside() -> Iterator[Tallies]:
    """A block whose calls in this thread are not counted but given: what a graph repeats when it is
    replayed.
    """
    tallies: Tallies = {}
    _aside.tallies = tallies
    try:
        yield tallies
    finally:
        _aside.tallies = None


def repeated(tallies: Tallies) -> None:
    """Count calls that a graph repeats."""
    if SINKS:
        for what, tally in tallies.items():
            count(what, tally)


@contextlib.contextmanager
def record_cases(path: str | os.PathLike[str]) -> Iterator[None]:
    """In the block note which cases calls of lntune go through, in all threads: operator, hidden
    size, dtype, variant, rows and device, how often, and on CPUs for how long. They are added to
    the file, which `lntune tune --cases FILE` and `lntune report --cases FILE` take.

    `LNTUNE_RECORD_CASES=FILE` in the environment does so for a whole program and the processes that
    it starts, without touching its code. Several processes may have the same file.

    What is timed is the kernel alone, or PyTorch's operators where they serve; on GPUs calls are
    only counted, and kernels within a CUDA graph of your own once, when it is captured. What
    torch.compile makes of calls that no kernel takes is not seen.

    Raises:
        InputError: the file cannot be written, or is something else.
    """
    file = Path(path)
    cases.ensure(file)
    sink = _begin(file)
    try:
        yield
    finally:
        _end(sink)


def files() -> list[Path]:
    """The files that are recorded to."""
    return [sink.path for sink in SINKS]


def _begin(path: Path) -> _Sink:
    sink = _Sink(path.absolute())
    _collect()  # what was counted before is for those that were there
    SINKS.append(sink)
    _tell()
    _start_timer()
    return sink


def _end(sink: _Sink) -> None:
    _collect()
    SINKS.remove(sink)
    _tell()
    _write(sink)


def _tell() -> None:
    for told in _changed:
        told(bool(SINKS))


def _collect() -> None:
    """Give all files what was counted."""
    with _lock:
        for one in direct.take_counts():
            case, device = _tagged[one.tag]
            what = What(case.op, case.hidden, case.dtype, one.rows, case.variant, device)
            tally = Tally(one.calls, one.timed, one.ns / 1e3)
            tally = tally if _is_timed(device) else Tally(one.calls)
            _counted[what] = _counted.get(what, Tally()).plus(tally)
        for sink in SINKS:
            for what, tally in _counted.items():
                sink.pending[what] = sink.pending.get(what, Tally()).plus(tally)
        _counted.clear()


def flush() -> None:
    """Write what was counted until now."""
    _collect()
    for sink in list(SINKS):
        _write(sink)


def _write(sink: _Sink) -> None:
    """Add what is pending to a file; what cannot be written, of which it warns once, is tried again
    with what comes later.
    """
    with _writing[0]:
        with _lock:
            pending, sink.pending = sink.pending, {}
        if not pending:
            return
        try:
            cases.add(sink.path, pending)
            sink.failed = False
        except (LntuneError, OSError) as e:
            with _lock:
                for what, tally in sink.pending.items():
                    pending[what] = pending.get(what, Tally()).plus(tally)
                sink.pending = cases.folded(pending)
            if not sink.failed:
                sink.failed = True
                callers.warn(str(e), CasesWarning)


def _start_timer() -> None:
    """Have counts written from time to time."""
    if _timer and _timer[0].is_alive():
        return

    def write_now_and_then() -> None:
        pause = FIRST
        while SINKS:
            time.sleep(pause)
            with contextlib.suppress(Exception):  # such as the user's filters' errors
                flush()
            pause = min(2 * pause, MOST)

    _timer[:] = [threading.Thread(target=write_now_and_then, name="lntune-cases", daemon=True)]
    with contextlib.suppress(RuntimeError):  # no more threads: written at the end
        _timer[0].start()


def _after_fork() -> None:
    """A child has none of its parent's counts, and not its thread."""
    _writing[:] = [threading.Lock()]
    _timer.clear()
    if not SINKS:
        return
    _counted.clear()
    direct.take_counts()
    for sink in SINKS:
        sink.pending = {}
    _start_timer()
    _at_exit_of_workers()


def _at_exit_of_workers() -> None:
    """Processes of multiprocessing, such as a DataLoader's, end without atexit."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:  # a child forgets its parent's finalizers before it calls these
        util.register_after_fork(flush, lambda _: util.Finalize(None, flush, exitpriority=0))


def _from_environment() -> None:
    """Record to the file that the environment names; one warning where that cannot be."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return
    try:
        cases.ensure(Path(name))
    except Exception as e:  # a program runs without it, too
        callers.warn(f"{VARIABLE}: {e} Nothing is recorded.", CasesWarning)
        return
    _begin(Path(name))


def _at_exit() -> None:
    with contextlib.suppress(Exception):
        flush()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
_from_environment()
