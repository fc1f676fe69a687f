"""What a process that runs generated code gives up before it does so, on Linux: signals to others,
files and core dumps without end, and its place among those that the system ends last.

It is against mistakes, not against attacks. What a system does not permit is left out quietly; on
others than Linux there is only the limit of files. No time that is measured depends on it: two rare
kinds of system calls are looked at, those of a GPU's driver are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import signal
import struct
import sys
from pathlib import Path

FILE_BYTES = 4 << 30
"""A file may become so long. Nothing that building and measuring writes has a hundredth of it."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# linux/landlock.h
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # the same on all architectures
_LANDLOCK_VERSION, _SCOPE_SIGNAL, _SCOPES_SINCE = 1, 2, 6
# linux/seccomp.h, linux/audit.h; kernels before 5.16 slow down processes with a filter that does
# not say SPEC_ALLOW: every store would wait (spec_store_bypass_disable=seccomp)
_SET_FILTER, _SPEC_ALLOW = 1, 4
_ALLOW, _KILL, _NOT_PERMITTED = 0x7FFF0000, 0x80000000, 0x00050000 | 1
# linux/bpf_common.h: load a word of what is known of the call; compare, and skip so many steps;
# return
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_CALL, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_SYSTEMS = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}
"""Machine -> what the filter sees it called, and the number of the system call seccomp."""
_CALLS = {
    "x86_64": {"kill": 62, "queue": 129, "tkill": 200, "tgkill": 234, "tgqueue": 297, "pidfd": 424},
    "aarch64": {
        "kill": 129,
        "queue": 138,
        "tkill": 130,
        "tgkill": 131,
        "tgqueue": 240,
        "pidfd": 424,
    },
}
"""The numbers of kill, rt_sigqueueinfo, tkill, tgkill, rt_tgsigqueueinfo, pidfd_send_signal."""
_SIGNAL_OF = {"kill": 1, "queue": 1, "tkill": 1, "tgkill": 2, "tgqueue": 2, "pidfd": 1}
"""Which argument is the signal; the first is whom it is for."""
_THREADS = ("tkill", "tgkill", "tgqueue")
"""What a C library raises signals with, abort's too, in the caller's own process."""


def confine() -> None:
    """Limit this process and all that it starts from now on. To be called before it has threads."""
    _limit("RLIMIT_CORE", 0)  # crashes are expected, and a core has gigabytes
    _limit("RLIMIT_FSIZE", FILE_BYTES)
    if sys.platform != "linux":
        return
    # where memory runs out this process goes, and not the one that keeps the log
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    keep_signals()


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies; elsewhere the closed pipe
    ends it after its job.
    """
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_signals() -> bool:
    """Have signals reach only this process and what it starts; True where the system keeps all
    others from them.

    A signal to the process that started this one, to its group or to everybody ends the sender
    (SIGSYS); one to any other process is refused.
    """
    if sys.platform != "linux" or _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    scoped = _scoped()
    return _filtered(_ALLOW if scoped else _NOT_PERMITTED) or scoped


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _limit(name: str, most: int) -> None:
    """Lower a limit of this process; the system's own stays where it is lower."""
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        lower = [most, *(n for n in (soft, hard) if n != resource.RLIM_INFINITY)]
        resource.setrlimit(kind, (min(lower), hard))


def _scoped() -> bool:
    """Have Landlock keep signals among this process and what it starts (Linux 6.12 or newer)."""
    call = _libc().syscall
    version = call(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < _SCOPES_SINCE:
        return False
    rules = struct.pack("=QQQ", 0, 0, _SCOPE_SIGNAL)
    descriptor = call(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    if descriptor < 0:
        return False
    try:
        return bool(call(_LANDLOCK_RESTRICT, descriptor, 0) == 0)
    finally:
        os.close(descriptor)


def _filtered(otherwise: int) -> bool:
    """Have a filter look at calls that send signals; `otherwise` to other processes than this one
    and those that started it. True where the system has it.
    """
    machine = platform.machine()
    if machine not in _SYSTEMS or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return False
    steps = _program(machine, os.getpid(), os.getppid(), otherwise)
    content = b"".join(struct.pack("=HBBI", *step) for step in steps)

    class Program(ctypes.Structure):
        _fields_ = (("count", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    program = Program(len(steps), content)
    number = _SYSTEMS[machine][1]
    return any(  # kernels without the flag do not slow anything down
        _libc().syscall(number, _SET_FILTER, flags, ctypes.byref(program)) == 0
        for flags in (_SPEC_ALLOW, 0)
    )


Step = tuple[int, int, int, int]
"""A step of a filter: what to do, how many to skip when it holds, when not, and a value."""


def _program(machine: str, own: int, parent: int, otherwise: int) -> list[Step]:
    """The filter, for the process `own` that `parent` has started."""
    own_group = -own & 0xFFFFFFFF
    never = [0xFFFFFFFF]  # everybody
    if parent:  # 0: it is in another container
        never += [parent, -os.getpgid(parent) & 0xFFFFFFFF]
    steps: list[Step] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _SYSTEMS[machine][0]),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for name, number in _CALLS[machine].items():
        others = _ALLOW if name in _THREADS else otherwise
        block: list[Step] = [
            (_LOAD, 0, 0, _ARGUMENTS + 8 * _SIGNAL_OF[name]),
            (_EQUAL, 0, 1, 0),  # a question whether there is such a process
            (_RETURN, 0, 0, _ALLOW),
        ]
        if name != "pidfd":  # whose first argument is no process's number
            block.append((_LOAD, 0, 0, _ARGUMENTS))
            for whom, what in (
                *((n, _ALLOW) for n in (own, 0, own_group)),
                *((n, _KILL) for n in never if n not in (own, own_group)),
            ):
                block += [(_EQUAL, 0, 1, whom), (_RETURN, 0, 0, what)]
        block.append((_RETURN, 0, 0, others))
        steps += [(_LOAD, 0, 0, _CALL), (_EQUAL, 0, len(block), number), *block]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]
