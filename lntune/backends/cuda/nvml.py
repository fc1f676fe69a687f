"""NVML, the library that monitors NVIDIA's GPUs: at what clock one runs, and how much other
processes use it. Where it is missing or does not answer, these are not known, and nothing fails.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

from lntune.system.surroundings import Notice

LIBRARY = "libnvidia-ml.so.1"
# From nvml.h.
_SM_CLOCK = 1
_NOT_FOUND, _TOO_SMALL = 6, 7
_ROOM = 64
_REASONS = {
    0x04: Notice("the GPU kept within its power limit", False),
    0x08: Notice("the GPU's hardware slowed it", True),
    0x20: Notice("the GPU's driver slowed it for heat", True),
    0x40: Notice("the GPU's hardware slowed it for heat", True),
    0x80: Notice("the GPU's power supply slowed it", True),
}
"""Why clocks are lower than asked for, by bit (nvmlClocksThrottleReason...)."""


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t`, as nvmlDeviceGetComputeRunningProcesses_v3 fills it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Used(ctypes.Structure):
    """`nvmlProcessUtilizationSample_t`; shares are in percent, the time in microseconds since
    1970.
    """

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("time", ctypes.c_ulonglong),
        *((name, ctypes.c_uint) for name in ("multiprocessors", "memory", "encoder", "decoder")),
    )


_DEVICE, _COUNT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlDeviceGetHandleByUUID": (ctypes.c_char_p, ctypes.POINTER(_DEVICE)),
    "nvmlDeviceGetClockInfo": (_DEVICE, ctypes.c_int, _COUNT),
    "nvmlDeviceGetCurrentClocksThrottleReasons": (_DEVICE, ctypes.POINTER(ctypes.c_ulonglong)),
    "nvmlDeviceGetComputeRunningProcesses_v3": (_DEVICE, _COUNT, ctypes.POINTER(_Process)),
    "nvmlDeviceGetProcessUtilization": (_DEVICE, ctypes.POINTER(_Used), _COUNT, ctypes.c_ulonglong),
}
"""The parameters of what is called, as nvml.h has them."""


@functools.cache
def _library(name: str) -> Any:
    """The library, initialized; None where there is none, or no driver behind it."""
    try:
        library = ctypes.CDLL(name)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


class Nvml:
    """One GPU by its UUID, "GPU-..."; every question has the answer None where the library does not
    say.
    """

    def __init__(self, uuid: str, library: str = LIBRARY) -> None:
        self._library, self._handle, self._last = _library(library), ctypes.c_void_p(), 0
        if (
            self._call(
                "nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle), bare=True
            )
            != 0
        ):
            self._library = None

    def _call(self, name: str, *arguments: Any, bare: bool = False) -> int:
        """The function's return code; -1 where it cannot be called."""
        try:
            function = getattr(self._library, name)
        except AttributeError:  # an older library; or None, which has no functions
            return -1
        function.argtypes = SIGNATURES[name]
        return int(function(*(() if bare else (self._handle,)), *arguments))

    def clock(self) -> int | None:
        """MHz of the multiprocessors now."""
        clock = ctypes.c_uint()
        return (
            clock.value
            if self._call("nvmlDeviceGetClockInfo", _SM_CLOCK, ctypes.byref(clock)) == 0
            else None
        )

    def limits(self) -> tuple[Notice, ...]:
        """What keeps the clocks down now; nothing where that is not known."""
        reasons = ctypes.c_ulonglong()
        name = "nvmlDeviceGetCurrentClocksThrottleReasons"
        if self._call(name, ctypes.byref(reasons)) != 0:
            return ()
        return tuple(notice for bit, notice in _REASONS.items() if reasons.value & bit)

    def _processes(self) -> set[int] | None:
        """Ids of the processes that compute on it."""
        listed, count = (_Process * _ROOM)(), ctypes.c_uint(_ROOM)
        if self._call("nvmlDeviceGetComputeRunningProcesses_v3", ctypes.byref(count), listed) != 0:
            return None
        return {listed[i].pid for i in range(count.value)}

    def others(self) -> float | None:
        """Share of the multiprocessors' time, 0 to 1, that processes but this one used since the
        last question.

        In a container the library may list processes under ids that are not ours to compare: a
        single one is then this process, and of several nothing is said.
        """
        running = self._processes()
        if running is None:
            return None
        if len(running) <= 1:
            return 0.0
        if os.getpid() not in running:
            return None
        samples, count = (_Used * _ROOM)(), ctypes.c_uint(_ROOM)
        code = self._call(
            "nvmlDeviceGetProcessUtilization",
            samples,
            ctypes.byref(count),
            ctypes.c_ulonglong(self._last),
        )
        if code == _NOT_FOUND:
            return 0.0
        if code != 0:
            return None
        used = [samples[i] for i in range(count.value)]
        self._last = max([self._last, *(one.time for one in used)])
        shares: dict[int, int] = {}
        for one in used:
            if one.pid != os.getpid() and one.multiprocessors <= 100:  # noqa: PLR2004 (percent; the library leaves rubbish in unused samples)
                shares[one.pid] = max(shares.get(one.pid, 0), one.multiprocessors)
        return min(1.0, sum(shares.values()) / 100)
