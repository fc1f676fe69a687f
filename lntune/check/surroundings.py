"""What a process has beside its memory, by name, so that what a kernel changes of it is seen: how
numbers are rounded, threads, processors, signal handlers, open files, folders, limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ACTION, _MASK, _FLAGS = 152, 16, 136
"""Bytes of the C library's struct sigaction on 64-bit Linux, at most: the handler and the signals
that are blocked take the first, most of the mask is never written, and flags begin far behind.
"""
_RESTORER = 0x04000000
"""A flag that the C library sets by itself."""
_OWN = ("/proc/",)
"""Files that looking for open files opens."""


def _c_function(name: str, result: Any = ctypes.c_int) -> Any:
    """A function of the C library or of what is loaded beside it; None where there is none."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.restype = result
    return function


def _handlers() -> dict[str, bytes]:
    """What becomes of each signal: handler, flags and mask as the C library has them."""
    sigaction, found = _c_function("sigaction"), {}
    if sigaction is None or sys.platform != "linux":
        return {}
    for number in sorted(signal.valid_signals()):
        action = ctypes.create_string_buffer(_ACTION)
        if sigaction(int(number), None, action) == 0:
            flags = int.from_bytes(action.raw[_FLAGS : _FLAGS + 4], sys.byteorder) & ~_RESTORER
            kept = action.raw[:_MASK].ljust(_FLAGS, b"\0") + flags.to_bytes(4, sys.byteorder)
            found[signal.strsignal(number) or str(int(number))] = kept.ljust(_ACTION, b"\0")
    return found


def _files() -> dict[str, str]:
    """Open descriptors, and what they lead to."""
    found = {}
    for entry in list(Path("/proc/self/fd").glob("*")):
        with contextlib.suppress(OSError):
            leads = str(entry.readlink())
            if not leads.startswith(_OWN):
                found[entry.name] = leads
    return found


def _environment() -> dict[str, str]:
    """Environment variables as the C library has them, which setenv in a kernel changes, and as
    Python has.
    """
    found = {f"{name} (Python's)": value for name, value in os.environ.items()}
    listed = None
    with contextlib.suppress(ValueError):
        listed = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    for number in range(1 << 16):
        if not listed or not (entry := listed[number]):
            break
        name, _, value = entry.partition(b"=")
        found[os.fsdecode(name)] = os.fsdecode(value)
    return found


def _umask() -> str:
    """The mask of new files, where it can be read without being set."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return line.split()[1]
    return ""


def _limits() -> dict[str, Any]:
    """Limits of what the process may use."""
    try:
        import resource
    except ImportError:
        return {}
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def _rounding() -> int:
    """How this thread rounds numbers, as fegetround says."""
    function = _c_function("fegetround")
    return int(function()) if function is not None else 0


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _openmp_threads() -> int:
    function = _c_function("omp_get_max_threads")
    return int(function()) if function is not None else 0


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _processors() -> frozenset[int]:
    """Where this thread may run, all threads of the process beside it."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    return frozenset(os.sched_getaffinity(0))


def _defaults() -> tuple[Any, ...]:
    """What PyTorch has been told for all that follows in this thread."""
    import torch

    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


_ONES: Mapping[str, Callable[[], Any]] = {
    "how numbers are rounded": _rounding,
    "the number of PyTorch's threads": _torch_threads,
    "the number of OpenMP's threads": _openmp_threads,
    "the processors that it may run on": _processors,
    "the handler of the signal": _handlers,
    "the signals that are blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    "the open file": _files,
    "the working folder": _working_folder,
    "the umask": _umask,
    "the environment variable": _environment,
    "the limit": _limits,
    "its priority": lambda: os.getpriority(os.PRIO_PROCESS, 0),
    "PyTorch's defaults": _defaults,
}


def seen() -> dict[str, Any]:
    """All of it now, by name."""
    return {name: look() for name, look in _ONES.items()}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was, in words; empty where all is."""
    for name, was in before.items():
        if was == now[name]:
            continue
        if not isinstance(was, dict):
            return f"changed {name}"
        which = sorted(k for k in was.keys() | now[name].keys() if was.get(k) != now[name].get(k))
        if name == "the open file":
            opened = [k for k in which if k not in was]
            verb = "left a file open" if opened else "closed or replaced a file"
            return f"{verb}, descriptor {', '.join(opened or which)}"
        return f"changed {name} {which[0]}"
    return ""


def round_to_nearest(way: int = 0) -> None:
    """Have this thread round as it should, as fesetround does."""
    if (function := _c_function("fesetround")) is not None:
        function(way)


def restore(before: Mapping[str, Any]) -> None:
    """Put back what can be, which values of environment variables and closed files cannot, so that
    what comes next does not suffer from it.
    """
    import torch

    round_to_nearest(before["how numbers are rounded"])
    if torch.get_num_threads() != before["the number of PyTorch's threads"]:
        torch.set_num_threads(before["the number of PyTorch's threads"])
    if before["the processors that it may run on"]:
        os.sched_setaffinity(0, before["the processors that it may run on"])
    handlers = _handlers()
    for number in signal.valid_signals():
        name = signal.strsignal(number) or str(int(number))
        if handlers.get(name) != (action := before["the handler of the signal"].get(name)):
            _c_function("sigaction")(int(number), action, None)
    signal.pthread_sigmask(signal.SIG_SETMASK, before["the signals that are blocked"])
    if before["the working folder"]:
        with contextlib.suppress(OSError):
            os.chdir(before["the working folder"])
    if before["the umask"]:
        os.umask(int(before["the umask"], 8))
    for name in _environment().keys() - before["the environment variable"].keys():
        ctypes.CDLL(None).unsetenv(os.fsencode(name))
    for number in _files().keys() - before["the open file"].keys():
        with contextlib.suppress(OSError):
            os.close(int(number))
